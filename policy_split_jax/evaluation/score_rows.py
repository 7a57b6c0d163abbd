"""Scoring given answers, for `policy-split score`."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.typing import DTypeLike

from policy_split_jax.data.formats import question_of
from policy_split_jax.errors import UserError
from policy_split_jax.model import qwen3
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL, encode_plain, render_both
from policy_split_jax.objective.scorer import TokenScores, score_rollouts
from policy_split_jax.padding import bucket, lengths, pad_left, pad_right
from policy_split_jax.policy import Policy

Record = dict[str, Any]
_ROWS = 16
_NO_LIMIT = 1 << 30


def score_answers(
    params: qwen3.Params,
    policy: Policy,
    records: Sequence[tuple[str, Record]],
    temperature: float,
    dtype: DTypeLike,
) -> Iterator[Record]:
    """Rows with `question` and `response` or `response_tokens`, or as `policy-split sample` writes them.

    Each answer is scored after both modes' prompts.

    The output adds, per mode, logprobs and entropies of each token, and the KL between the modes at each
    token, both ways (nats).
    """
    questions = [question_of(place, record) for place, record in records]
    prompts = render_both(policy.tokenizer, questions, policy.prompts)
    responses = [_response(policy, place, record) for place, record in records]
    for (_, record), tokens, scores in _scored(
        params, policy, records, prompts, responses, temperature, dtype, with_kl=True
    ):
        divergence = cast(np.ndarray, scores.kl)
        yield {
            **record,
            "response_tokens": tokens,
            "normal": _of_context(scores, NORMAL),
            "high-entropy": _of_context(scores, HIGH_ENTROPY),
            "kl_normal_to_high_entropy": divergence[NORMAL].tolist(),
            "kl_high_entropy_to_normal": divergence[HIGH_ENTROPY].tolist(),
        }


def score_contexts(
    params: qwen3.Params,
    policy: Policy,
    records: Sequence[tuple[str, Record]],
    temperature: float,
    dtype: DTypeLike,
) -> Iterator[Record]:
    """Rows with `prompt_tokens` and `response_tokens`: ids as they are, scored in that one context."""
    prompts = [(_tokens(policy, place, record, "prompt_tokens"),) for place, record in records]
    responses = [_tokens(policy, place, record, "response_tokens") for place, record in records]
    for (_, record), _, scores in _scored(
        params, policy, records, prompts, responses, temperature, dtype, with_kl=False
    ):
        yield {**record, **_of_context(scores, 0)}


def _scored(
    params: qwen3.Params,
    policy: Policy,
    records: Sequence[tuple[str, Record]],
    prompts: Sequence[tuple[list[int], ...]],
    responses: Sequence[list[int]],
    temperature: float,
    dtype: DTypeLike,
    with_kl: bool,
) -> Iterator[tuple[tuple[str, Record], list[int], TokenScores]]:
    """Each record with its response's tokens and scores [M, T]."""
    score = jax.jit(
        partial(score_rollouts, config=policy.config, dtype=dtype, temperature=temperature, with_kl=with_kl)
    )
    items = list(zip(records, prompts, responses, strict=True))
    for start in range(0, len(items), _ROWS):
        part = items[start : start + _ROWS]
        full = part + [part[-1]] * (_ROWS - len(part))
        width = bucket(max(len(tokens) for _, contexts, _ in full for tokens in contexts), _NO_LIMIT)
        length = bucket(max(len(response) for *_, response in full), _NO_LIMIT)
        scores = jax.device_get(
            score(
                params,
                np.stack([pad_left(contexts, width) for _, contexts, _ in full]),
                np.stack([lengths(contexts) for _, contexts, _ in full]),
                np.stack([pad_right([response], length) for *_, response in full]),
                np.stack([lengths([response]) for *_, response in full]),
            )
        )
        for at, (record, _, response) in enumerate(part):
            yield record, response, _of_row(scores, at, len(response))


def _of_row(scores: TokenScores, at: int, size: int) -> TokenScores:
    return jax.tree.map(lambda leaf: leaf[:, at, 0, :size], scores)


def _of_context(scores: TokenScores, context: int) -> Record:
    return {
        "logprobs": scores.logprobs[context].tolist(),
        "entropies": scores.entropy[context].tolist(),
    }


def _response(policy: Policy, place: str, record: Record) -> list[int]:
    """A row's answer; `tokens` and `text` are what `policy-split sample` calls them."""
    for column in ("response_tokens", "tokens"):
        if column in record:
            return _tokens(policy, place, record, column)
    response = record.get("response", record.get("text"))
    if not isinstance(response, str) or not response:
        raise UserError(f"{place}: response must be a text (or give response_tokens)")
    return encode_plain(policy.tokenizer, [response])[0]


def _tokens(policy: Policy, place: str, record: Record, column: str) -> list[int]:
    tokens = record.get(column)
    size = policy.config.vocab_size
    if (
        not isinstance(tokens, list)
        or not tokens
        or not all(type(token) is int and 0 <= token < size for token in tokens)
    ):
        raise UserError(f"{place}: {column} must be a list of token ids from 0 to {size - 1}, not empty")
    return tokens
