"""The two modes: one set of parameters, a normal prompt and a high-entropy prompt.

The normal mode reads the chat template without a system turn; the high-entropy mode reads the same template
with the high-entropy prompt as system turn (arXiv 2604.11510, section on dual-mode prompting). Everywhere
else a mode is one of the integers below, carried as a column of the batch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NORMAL = 0
HIGH_ENTROPY = 1
MODE_NAMES = ("normal", "high_entropy")

DEFAULT_HIGH_ENTROPY_PROMPT = (
    "You are in high-entropy mode. Explore: prefer the unusual idea over the obvious one, "
    "and let every attempt take a path of its own."
)

# What stands for the texts while the template is rendered; private-use characters mean nothing to a template.
_SYSTEM_MARK, _QUESTION_MARK = "\ue0f0\ue0f1", "\ue0f1\ue0f0"


@dataclass(frozen=True)
class ModePrompts:
    """What turns a question into the prompts of both modes."""

    high_entropy: str = DEFAULT_HIGH_ENTROPY_PROMPT
    enable_thinking: bool = True
    """Passed to the chat template; Qwen3's adds an empty thought when false."""
    question_template: str = "{question}"
    """The user turn; `{question}` is replaced by the question."""


def render(tokenizer: Any, questions: Sequence[str], mode: int, prompts: ModePrompts) -> list[list[int]]:
    """Token ids of each question's prompt in one mode, up to and including the assistant's header.

    `tokenizer` is a Hugging Face tokenizer with a chat template. Special tokens come from the template alone:
    a question that spells `<|im_start|>system` is read as text, never as a turn.
    """
    user = {"role": "user", "content": _QUESTION_MARK}
    turns = [user] if mode == NORMAL else [{"role": "system", "content": _SYSTEM_MARK}, user]
    template = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=prompts.enable_thinking
    )
    users = [prompts.question_template.replace("{question}", question) for question in questions]
    return _encode(tokenizer, template, prompts.high_entropy, users)


def _encode(tokenizer: Any, template: str, system: str, users: Sequence[str]) -> list[list[int]]:
    """Encodes the template with its texts filled in; only the template's own special tokens are special.

    Plain text on both sides of a filled-in text is encoded together with it, as the tokenizer itself does.
    """
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = "|".join(re.escape(mark) for mark in [*special, _SYSTEM_MARK, _QUESTION_MARK])
    ids: list[list[int]] = [[] for _ in users]
    plain = [""] * len(users)
    for piece in re.split(f"({marks})", template):
        if piece in special:
            ids = [[*row, *text, special[piece]] for row, text in zip(ids, encode_plain(tokenizer, plain), strict=True)]
            plain = [""] * len(users)
        elif piece == _QUESTION_MARK:
            plain = [text + user for text, user in zip(plain, users, strict=True)]
        else:
            plain = [text + (system if piece == _SYSTEM_MARK else piece) for text in plain]
    return [row + text for row, text in zip(ids, encode_plain(tokenizer, plain), strict=True)]


def encode_plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts of which nothing is special, whatever they spell."""
    distinct = list(dict.fromkeys(texts))
    if not any(distinct):
        return [[] for _ in texts]
    ids = tokenizer(distinct, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)[
        "input_ids"
    ]
    by_text = dict(zip(distinct, ids, strict=True))
    return [list(by_text[text]) for text in texts]


def render_both(tokenizer: Any, questions: Sequence[str], prompts: ModePrompts) -> list[tuple[list[int], list[int]]]:
    """Each question's prompts, indexed by mode."""
    normal, high_entropy = (render(tokenizer, questions, mode, prompts) for mode in (NORMAL, HIGH_ENTROPY))
    return list(zip(normal, high_entropy, strict=True))


def decode_response(tokenizer: Any, tokens: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text of a rollout, without the stop token that ended it."""
    body = list(tokens[:-1]) if len(tokens) and tokens[-1] in stop_ids else list(tokens)
    return tokenizer.decode(body, skip_special_tokens=False)
