"""Who may ask the servers."""

import pytest

from policy_split_jax.access import TOKEN, host_name, required_token, same_token
from policy_split_jax.cli import main
from policy_split_jax.errors import UserError

SECRET = "0123456789abcdef"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
def test_a_loopback_address_needs_no_token_and_takes_one(monkeypatch, address):
    monkeypatch.delenv(TOKEN, raising=False)
    assert required_token(address) is None
    monkeypatch.setenv(TOKEN, SECRET)
    assert required_token(address) == SECRET


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.2", "::"])
def test_an_address_that_others_reach_needs_one(monkeypatch, address):
    monkeypatch.setenv(TOKEN, "")
    with pytest.raises(UserError, match=f"{address} is open to others: set {TOKEN} to a secret"):
        required_token(address)
    monkeypatch.setenv(TOKEN, SECRET)
    assert required_token(address) == SECRET


@pytest.mark.parametrize("token", ["short", SECRET[:-1], f"{SECRET} ", f"{SECRET}\n", f"{SECRET}é"])
def test_a_token_is_no_guess_and_fits_into_a_header(monkeypatch, token):
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(UserError, match=f"{TOKEN}: needs at least 16 characters"):
        required_token("127.0.0.1")


def test_tokens_are_compared_whatever_is_given():
    assert same_token(SECRET, SECRET)
    assert not any(same_token(given, SECRET) for given in ["", SECRET + "x", SECRET[1:], "\udcff", "é" * 16])


def test_host_names_come_without_port():
    hosts = ["A.example:80", "a.example", "[::1]:80", "a:b", ":80", ""]
    assert [host_name(host) for host in hosts] == ["a.example", "a.example", "[::1]", "a:b", "", ""]


@pytest.mark.parametrize("command", [["serve"], ["report", "runs/none", "--watch"]])
def test_opening_a_server_without_a_token_is_an_error_with_its_remedy(command, monkeypatch, capsys):
    monkeypatch.delenv(TOKEN, raising=False)
    assert main([*command, "--host", "0.0.0.0", "--port", "0"]) == 2
    assert f"0.0.0.0 is open to others: set {TOKEN}" in capsys.readouterr().err
