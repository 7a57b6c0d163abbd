import filecmp

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from policy_split_jax.data import walk
from policy_split_jax.data.tiny_tokenizer import build_tiny_tokenizer

HIGH_ENTROPY = "High-entropy mode: explore, be unusual."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    assert build_tiny_tokenizer(folder) == 360
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer, text):
    return [tokenizer.decode([token]) for token in tokenizer(text, split_special_tokens=True)["input_ids"]]


def test_ids_are_dense_and_special_tokens_come_last(tokenizer):
    assert len(tokenizer) == 360  # 256 bytes, 90 numbers of two digits, 11 words, 3 special tokens
    assert sorted(tokenizer.get_vocab().values()) == list(range(360))
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [357, 358, 359]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (357, 359, None)


def test_every_build_writes_the_same_bytes(folder, tmp_path):
    build_tiny_tokenizer(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    assert filecmp.cmpfiles(folder, tmp_path, names, shallow=False) == (names, [], [])


@settings(deadline=None)  # a busy machine is no failure
@given(st.text() | st.text(alphabet="0123456789+-*/() \n\t.,Mak<|im_end|>é日😀\u0301\u200d"))
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    plain = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(plain) == text
    assert all(token < 357 for token in plain)


def test_every_byte_has_its_value_as_id(tokenizer):
    # Characters of all UTF-8 lead bytes; none of them is a digit or inside a word.
    for character in ["!", "~", "\0", "\x7f", "\xa0", "é", "߿", "ࠀ", "日", "\uffff", "😀", "\U0010ffff"]:
        assert tokenizer(character)["input_ids"] == list(character.encode())


def test_numbers_below_a_hundred_are_one_token(tokenizer):
    for number in range(100):
        assert pieces(tokenizer, str(number)) == [str(number)]
    assert pieces(tokenizer, "105 1234") == ["10", "5", " ", "12", "34"]
    assert pieces(tokenizer, "007") == ["0", "0", "7"]


def test_operators_never_merge_with_digits(tokenizer):
    assert pieces(tokenizer, "(3+14)*5/100-7") == [
        "(",
        "3",
        "+",
        "14",
        ")",
        "*",
        "5",
        "/",
        "10",
        "0",
        "-",
        "7",
    ]
    assert pieces(tokenizer, "((2*3))") == ["(", "(", "2", "*", "3", ")", ")"]


def test_words_of_another_task(tmp_path):
    assert build_tiny_tokenizer(tmp_path, walk.WORDS) == 361
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert pieces(other, "Walk 11 to 45 around 23.") == ["Walk", " ", "11", " to", " ", "45", " around", " ", "23", "."]
    assert pieces(other, "DDRRUL") == ["D", "D", "R", "R", "U", "L"]
    assert "Make" not in pieces(other, "Make")


def test_prompts_are_short(tokenizer):
    question = ["Make", " ", "24", " from", " ", "3", ",", " ", "8", ",", " ", "15", "."]
    assert pieces(tokenizer, "Make 24 from 3, 8, 15.") == question
    words = ["High", "-", "entropy", " mode", ":", " explore", ",", " be", " unusual", "."]
    assert pieces(tokenizer, HIGH_ENTROPY) == words
    assert [pieces(tokenizer, role) for role in ("system", "user", "assistant")] == [
        ["system"],
        ["user"],
        ["assistant"],
    ]


@pytest.mark.parametrize("thinking", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_chat_template_word_for_word(tokenizer, thinking):
    question = {"role": "user", "content": " Make 24 from 3, 8, 5.\n"}
    system = {"role": "system", "content": HIGH_ENTROPY}
    answer = {"role": "assistant", "content": "3*8"}

    def text(messages, **settings):
        return tokenizer.apply_chat_template(messages, tokenize=False, **thinking, **settings)

    assert text([question], add_generation_prompt=True) == (
        "<|im_start|>user\n Make 24 from 3, 8, 5.\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text([system, question, answer]) == (
        "<|im_start|>system\nHigh-entropy mode: explore, be unusual.<|im_end|>\n"
        "<|im_start|>user\n Make 24 from 3, 8, 5.\n<|im_end|>\n"
        "<|im_start|>assistant\n3*8<|im_end|>\n"
    )
    ids = tokenizer.apply_chat_template([system, question], add_generation_prompt=True, **thinking)["input_ids"]
    assert [ids[0], ids[1], ids[-3], ids[-2]] == [
        358,
        *tokenizer("system")["input_ids"],
        358,
        *tokenizer("assistant")["input_ids"],
    ]
    assert ids.count(359) == 2


def test_unknown_role_is_refused(tokenizer):
    with pytest.raises(jinja2.TemplateError, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_special_tokens_in_text_can_be_kept_plain(tokenizer):
    assert tokenizer("<|im_end|>")["input_ids"] == [359]
    assert pieces(tokenizer, "<|im_end|>") == ["<", "|", "i", "m", "_", "e", "n", "d", "|", ">"]


def test_decoding_can_skip_special_tokens(tokenizer):
    ids = [358, *tokenizer("user\n3*8")["input_ids"], 359, 357]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n3*8"


def test_saved_again_it_stays_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": HIGH_ENTROPY},
        {"role": "user", "content": "Make 7, 日 <|im_end|>"},
    ]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert again.get_vocab() == tokenizer.get_vocab()
