"""Who may ask our servers: on a loopback address whoever is on this machine, elsewhere whoever knows the token."""

import hmac
import ipaddress
import os

from policy_split_jax.errors import UserError

TOKEN = "POLICY_SPLIT_TOKEN"
"""The environment variable that holds the token; other users of the machine could read an option."""
_SHORTEST = 16


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an IP address."""
    return ipaddress.ip_address(address).is_loopback


def required_token(address: str) -> str | None:
    """The token of a server on this IP address; None where there is none and nobody else can ask.

    Raises UserError for an address that others reach without a token, and for a token that is easily guessed or does
    not fit into a header.
    """
    token = os.environ.get(TOKEN)
    if not token:
        if is_loopback(address):
            return None
        raise UserError(
            f"{address} is open to others: set {TOKEN} to a secret that clients have to send "
            f"(export {TOKEN}=$(openssl rand -hex 32)), or leave --host away"
        )
    if len(token) < _SHORTEST or not all("!" <= character <= "~" for character in token):
        raise UserError(f"{TOKEN}: needs at least {_SHORTEST} characters, all ASCII and none blank")
    return token


def same_token(given: str, token: str) -> bool:
    """Compares in a time that tells nothing of the token."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())


def own_names(address: str) -> set[str]:
    """The names under which a server on this IP address is asked from its own machine."""
    return {"localhost", "127.0.0.1", address}


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()
