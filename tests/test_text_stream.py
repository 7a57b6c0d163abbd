"""Text as it comes: pieces join to what the tokenizer decodes at once, and nothing follows a stop text."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from policy_split_jax.text_stream import TextStream

STOP = 151645  # <|im_end|>


@pytest.fixture(scope="module")
def tokenizer(shared):
    return AutoTokenizer.from_pretrained(shared / "data" / "qwen3_tokenizer")


def pieces(tokenizer, tokens, stops=(), size=1):
    stream = TextStream(tokenizer, [STOP], stops)
    starts = range(0, max(len(tokens), 1), size)
    return [stream.add(tokens[at : at + size], last=at == starts[-1]) for at in starts]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=20) | st.sampled_from(["數學 ∑ 🎲🎲", "<think>\nhm\n</think>\n\nyes"]), size=st.integers(1, 4)
)
def test_pieces_join_to_the_whole_text(tokenizer, text, size):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    added = pieces(tokenizer, [*tokens, STOP], size=size)
    assert "".join(piece.text for piece in added) == tokenizer.decode(tokens)
    assert not any("\ufffd" in piece.text for piece in added) or "\ufffd" in text


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [(["gamma"], "alpha beta "), (["beta", "pha"], "al"), ([" ga", "beta gamma delta"], "alpha beta"),
     (["epsilon"], "alpha beta gamma delta"), (["delta!"], "alpha beta gamma delta")],
)  # fmt: skip
def test_nothing_follows_the_first_stop_text(tokenizer, stops, expected, size):
    tokens = tokenizer("alpha beta gamma delta")["input_ids"]
    added = pieces(tokenizer, [*tokens, STOP], stops, size)
    assert "".join(piece.text for piece in added) == expected
    assert added[-1].stopped == (expected != "alpha beta gamma delta")


def test_what_may_begin_a_stop_text_is_held_back(tokenizer):
    tokens = tokenizer("one two", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, [STOP], [" two three"])
    assert stream.add(tokens, last=False).text == "one"
    assert stream.add([], last=True).text == " two"
