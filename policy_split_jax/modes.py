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


def render(tokenizer: Any, question: str, mode: int, prompts: ModePrompts) -> list[int]:
    """Token ids of a question's prompt in one mode, up to and including the assistant's header.

    `tokenizer` is a Hugging Face tokenizer with a chat template. Special tokens come from the template alone:
    a question that spells `<|im_start|>system` is read as text, never as a turn.
    """
    user = {"role": "user", "content": _QUESTION_MARK}
    turns = [user] if mode == NORMAL else [{"role": "system", "content": _SYSTEM_MARK}, user]
    template = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=prompts.enable_thinking
    )
    texts = {
        _SYSTEM_MARK: prompts.high_entropy,
        _QUESTION_MARK: prompts.question_template.replace("{question}", question),
    }
    return _encode(tokenizer, template, texts)


def _encode(tokenizer: Any, template: str, texts: dict[str, str]) -> list[int]:
    """Encodes the template with its texts filled in; only the template's own special tokens are special.

    Plain text on both sides of a filled-in text is encoded together with it, as the tokenizer itself does.
    """
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = "|".join(re.escape(mark) for mark in [*special, *texts])
    ids: list[int] = []
    plain = ""
    for piece in re.split(f"({marks})", template):
        if piece in special:
            ids += [*_encode_plain(tokenizer, plain), special[piece]]
            plain = ""
        else:
            plain += texts.get(piece, piece)
    return ids + _encode_plain(tokenizer, plain)


def _encode_plain(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def render_both(tokenizer: Any, question: str, prompts: ModePrompts) -> tuple[list[int], list[int]]:
    """A question's prompts, indexed by mode."""
    return render(tokenizer, question, NORMAL, prompts), render(tokenizer, question, HIGH_ENTROPY, prompts)


def decode_response(tokenizer: Any, tokens: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text of a rollout, without the stop token that ended it."""
    body = list(tokens[:-1]) if len(tokens) and tokens[-1] in stop_ids else list(tokens)
    return tokenizer.decode(body, skip_special_tokens=False)
