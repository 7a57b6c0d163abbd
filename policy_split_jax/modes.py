"""The two modes: one set of parameters, a normal prompt and a high-entropy prompt.

The normal mode reads the chat template without a system turn; the high-entropy mode reads the same template
with the high-entropy prompt as system turn (arXiv 2604.11510, section on dual-mode prompting). Everywhere
else a mode is one of the integers below, carried as a column of the batch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from policy_split_jax.padding import TokenRow

NORMAL = 0
HIGH_ENTROPY = 1
MODE_NAMES = ("normal", "high_entropy")

DEFAULT_HIGH_ENTROPY_PROMPT = (
    "You are in high-entropy mode. Explore: prefer the unusual idea over the obvious one, "
    "and let every attempt take a path of its own."
)


def _mark(number: int) -> str:
    """What stands for a text while the template is rendered: private-use characters mean nothing to a template."""
    return f"\ue0f0{number}\ue0f1"


_SYSTEM_MARK, _QUESTION_MARK = _mark(0), _mark(1)


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
    users = [prompts.question_template.replace("{question}", question) for question in questions]
    texts = {_SYSTEM_MARK: [prompts.high_entropy] * len(users), _QUESTION_MARK: users}
    return _encode(tokenizer, _question_template(tokenizer, mode, prompts), texts, len(users))


def render_chat(tokenizer: Any, turns: Sequence[tuple[str, str]], mode: int, prompts: ModePrompts) -> list[int]:
    """Token ids of a conversation in one mode, up to and including the header of the assistant's next turn.

    `turns` are (role, text). In the high-entropy mode the first turn is a system turn with the high-entropy
    prompt; a system turn of the conversation's own follows in the same turn. A question alone gives what
    `render` gives it (but `question_template`, which belongs to training data).
    """
    roles = [role for role, _ in turns]
    texts = [text for _, text in turns]
    if mode == HIGH_ENTROPY and roles[:1] == ["system"]:
        texts[0] = f"{prompts.high_entropy}\n\n{texts[0]}"
    elif mode == HIGH_ENTROPY:
        roles, texts = ["system", *roles], [prompts.high_entropy, *texts]
    marks = [_mark(at) for at in range(len(texts))]
    template = _template(tokenizer, list(zip(roles, marks, strict=True)), prompts)
    return _encode(tokenizer, template, {mark: [text] for mark, text in zip(marks, texts, strict=True)}, 1)[0]


def keeps_texts(tokenizer: Any, prompts: ModePrompts) -> bool:
    """Whether the chat template has the question in the prompts of both modes, and the system turn in the one's.

    A template is a program, and may raise whatever programs raise.
    """
    normal, high_entropy = (_question_template(tokenizer, mode, prompts) for mode in (NORMAL, HIGH_ENTROPY))
    return _QUESTION_MARK in normal and _QUESTION_MARK in high_entropy and _SYSTEM_MARK in high_entropy


def shared_prefix(tokenizer: Any, mode: int, prompts: ModePrompts) -> list[int]:
    """The token ids with which every prompt of a mode begins, whatever the question.

    They end with the template's last special token before the question: what follows it is encoded together
    with the question.
    """
    before = _question_template(tokenizer, mode, prompts).partition(_QUESTION_MARK)[0]
    end = max((before.rfind(token) + len(token) for token in _special_ids(tokenizer) if token in before), default=0)
    return _encode(tokenizer, before[:end], {_SYSTEM_MARK: [prompts.high_entropy]}, 1)[0]


def system_turn(tokenizer: Any, mode: int, prompts: ModePrompts) -> list[int]:
    """The token ids that a mode puts before a conversation: none, or the high-entropy prompt's own turn.

    Raises ValueError where the template does not simply put a system turn in front.
    """
    with_system, without = (_question_template(tokenizer, which, prompts) for which in (mode, NORMAL))
    if not with_system.endswith(without):
        raise ValueError("this chat template does not put the system turn in front of the others")
    turn = with_system.removesuffix(without)
    return _encode(tokenizer, turn, {_SYSTEM_MARK: [prompts.high_entropy]}, 1)[0]


def _question_template(tokenizer: Any, mode: int, prompts: ModePrompts) -> str:
    system = [("system", _SYSTEM_MARK)] if mode == HIGH_ENTROPY else []
    return _template(tokenizer, [*system, ("user", _QUESTION_MARK)], prompts)


def _template(tokenizer: Any, turns: Sequence[tuple[str, str]], prompts: ModePrompts) -> str:
    """The chat template with these turns, as text."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=prompts.enable_thinking
    )


def _special_ids(tokenizer: Any) -> dict[str, int]:
    return {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _encode(tokenizer: Any, template: str, texts: Mapping[str, Sequence[str]], rows: int) -> list[list[int]]:
    """Encodes the template with each row's texts in place of their marks; only its own special tokens are special.

    Plain text on both sides of a filled-in text is encoded together with it, as the tokenizer itself does.
    """
    special = _special_ids(tokenizer)
    marks = "|".join(re.escape(mark) for mark in [*special, *texts])
    ids: list[list[int]] = [[] for _ in range(rows)]
    plain = [""] * rows
    for piece in re.split(f"({marks})", template):
        if piece in special:
            ids = [[*row, *text, special[piece]] for row, text in zip(ids, encode_plain(tokenizer, plain), strict=True)]
            plain = [""] * rows
        else:
            added = texts.get(piece, [piece] * rows)
            plain = [text + more for text, more in zip(plain, added, strict=True)]
    return [row + text for row, text in zip(ids, encode_plain(tokenizer, plain), strict=True)]


def encode_plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts of which nothing is special, whatever they spell."""
    distinct = list(dict.fromkeys(texts))
    if not any(distinct):
        return [[] for _ in texts]
    # verbose: whether a prompt is too long is ours to say.
    ids = tokenizer(
        distinct, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
    by_text = dict(zip(distinct, ids, strict=True))
    return [list(by_text[text]) for text in texts]


def render_both(tokenizer: Any, questions: Sequence[str], prompts: ModePrompts) -> list[tuple[list[int], list[int]]]:
    """Each question's prompts, indexed by mode."""
    normal, high_entropy = (render(tokenizer, questions, mode, prompts) for mode in (NORMAL, HIGH_ENTROPY))
    return list(zip(normal, high_entropy, strict=True))


def render_user_turn(tokenizer: Any, questions: Sequence[str], prompts: ModePrompts) -> list[list[int]]:
    """The high-entropy prompts as the released trainer gives them to normal rollouts: the text of the prompt, its
    special tokens lost, as one user turn without a system turn."""
    users = (prompts.question_template.replace("{question}", question) for question in questions)
    texts = [f"system\n{prompts.high_entropy}\nuser\n{user}" for user in users]
    return render(tokenizer, texts, NORMAL, replace(prompts, question_template="{question}"))


def encode_again(tokenizer: Any, tokens: TokenRow) -> list[int]:
    """A response's tokens as the released trainer shares them: their text without special tokens, encoded anew."""
    return encode_plain(tokenizer, [tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)])[0]


def decode_response(tokenizer: Any, tokens: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text of a rollout, without the stop token that ended it."""
    body = list(tokens[:-1]) if len(tokens) and tokens[-1] in stop_ids else list(tokens)
    return tokenizer.decode(body, skip_special_tokens=False)
