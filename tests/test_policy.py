"""A policy's texts, whole and token by token."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from policy_split_jax.modes import encode_plain
from policy_split_jax.policy import load_policy, model_folder


@pytest.fixture(scope="module")
def policy():
    return load_policy(model_folder("embedded"))


@pytest.fixture(scope="module")
def qwen(policy, shared):
    return replace(policy, tokenizer=AutoTokenizer.from_pretrained(shared / "data" / "qwen3_tokenizer"))


def test_pieces_spell_out_the_stop_token_that_the_text_lacks(policy):
    tokens = [*encode_plain(policy.tokenizer, ["(3+4)*5"])[0], policy.stop_ids[0]]
    pieces = policy.pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces[:-1]) == policy.text(tokens) == "(3+4)*5"
    assert pieces[-1] == policy.tokenizer.decode([policy.stop_ids[0]])


def test_a_character_stands_at_its_last_token(policy):
    # One token a byte here: 3 bytes, 1 and 4.
    tokens = encode_plain(policy.tokenizer, ["€a🎲"])[0]
    assert policy.pieces(tokens) == ["", "", "€", "a", "", "", "", "🎲"]


def test_pieces_of_words(qwen):
    tokens = encode_plain(qwen.tokenizer, ["So 數學 is 🎲."])[0]
    pieces = qwen.pieces(tokens)
    assert pieces[0] == "So"
    assert "".join(pieces) == "So 數學 is 🎲."


def test_whatever_was_sampled_has_pieces(qwen):
    """Bytes that make no character, too: an unfinished one at the end is in no piece."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = rng.integers(0, 256, 20)
        pieces = qwen.pieces(tokens)
        assert len(pieces) == 20
        assert qwen.tokenizer.decode(tokens.tolist()).startswith("".join(pieces))
