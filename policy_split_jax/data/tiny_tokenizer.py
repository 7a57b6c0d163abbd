"""The tokenizer of the embedded tiny models, built from this file and the words of their task.

Byte-level: every text encodes and decodes without loss. Numbers 0..99 and the words of the embedded prompts
are single tokens, operators and parentheses too, so that prompts are short and an expression reads as one
token per symbol, other words as one per letter. The folder loads with `transformers.AutoTokenizer.from_pretrained`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from policy_split_jax.data import countdown

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

PROMPT_WORDS = (
    *("system", "user", "assistant"),
    *("High", "entropy", " mode", " explore", " be", " unusual"),
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ("system", "user", "assistant") -%}
{{- raise_exception("unknown role " ~ message.role ~ ": use system, user or assistant") -}}
{%- endif -%}
{{- "<|im_start|>" ~ message.role ~ "\\n" ~ message.content ~ "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
"""Thinking does not exist in the tiny model: `enable_thinking` may be given and changes nothing."""

# At most two digits a piece, a word with the space before it, and any other character alone.
_PIECES = "[0-9]{1,2}| ?[A-Za-z]+|[^A-Za-z0-9]"


def build_tiny_tokenizer(folder: str | Path, task_words: Sequence[str] = countdown.WORDS) -> int:
    """Writes `tokenizer.json` and `tokenizer_config.json` (with the chat template) into `folder`.

    `task_words` and those of the prompts are single tokens. Returns the vocabulary size, special tokens included; ids
    are dense from 0 and the same on every call.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(task_words)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _tokenizer(task_words: Sequence[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    # Without merges a piece is either one whole token or its bytes: no order of merges to get wrong.
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(task_words), merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([PAD, START, END])
    return tokenizer


def _vocabulary(task_words: Sequence[str]) -> dict[str, int]:
    """Bytes by value (in the printable alphabet of byte-level BPE), then numbers, then words."""
    byte_texts = _byte_alphabet()
    numbers = [str(number) for number in range(10, 100)]
    # "00".."09" are pieces of longer numbers only ("105"); leaving them out makes those read digit by digit.
    words = ["".join(byte_texts[byte] for byte in word.encode()) for word in (*task_words, *PROMPT_WORDS)]
    return {text: index for index, text in enumerate([*byte_texts, *numbers, *words])}


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)]
