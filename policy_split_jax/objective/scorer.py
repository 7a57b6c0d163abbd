"""Log-probabilities, exact entropies and exact KL divergences of given tokens, in chunks over the sequence.

The language-model head is applied inside each chunk and recomputed in the backward pass, so that logits of a
whole batch `[B, T, V]` never exist.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from policy_split_jax.model import qwen3
from policy_split_jax.model.attention import Branches, implementation
from policy_split_jax.model.sharding import BATCH, batch_shards, constrain


class TokenScores(NamedTuple):
    """Of each response token under each of M contexts (the modes, where there are two)."""

    logprobs: Float[Array, "M B T"]
    """Log-probability of the token, at the scorer's temperature (nats)."""
    entropy: Float[Array, "M B T"]
    """Shannon entropy of the whole next-token distribution (nats)."""
    kl: Float[Array, "M B T"] | None
    """KL(π_m ‖ π_other) of the next-token distributions (nats); None unless asked for."""


def _divergence(logp: Float[Array, "2 B C V"]) -> Float[Array, "2 B C"]:
    """KL of each of two distributions to the other one."""
    return jnp.sum(jnp.exp(logp) * (logp - logp[::-1]), axis=-1)


def _score_chunk(
    head: Float[Array, "D V"],
    hidden: Float[Array, "M B C D"],
    targets: Int[Array, "B C"],
    temperature: float,
    with_kl: bool,
    mesh: Mesh | None,
) -> TokenScores:
    logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32) / temperature
    logits = constrain(logits, mesh, None, BATCH, None, "tp")
    logp = jax.nn.log_softmax(logits, axis=-1)
    # A one-hot sum, not a gather: its gradient is a product too, and it shards over the vocabulary.
    chosen = targets[..., None] == jnp.arange(logp.shape[-1])
    logprobs = jnp.sum(jnp.where(chosen, logp, 0.0), axis=-1)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return TokenScores(logprobs, entropy, _divergence(logp) if with_kl else None)


def score_hidden(
    head: Float[Array, "D V"],
    hidden: Float[Array, "M B T D"],
    targets: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = 256,
    with_kl: bool = False,
    mesh: Mesh | None = None,
) -> TokenScores:
    """Scores `targets`, given the hidden states that predict them.

    `hidden[m, b, t]` is the state *before* target t (`score_rollouts` makes that shift). `chunk` is the number
    of tokens of each sequence handled at once. `with_kl` needs M = 2.
    """
    length = targets.shape[1]
    size = min(chunk, length)
    chunks = -(-length // size)
    padding = chunks * size - length
    # Whole sequences: every device of a `tp` group has its part of the vocabulary for each token.
    hidden = jnp.pad(constrain(hidden, mesh, None, BATCH), ((0, 0), (0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    # The chunk axis goes first, for the loop.
    hidden_chunks = jnp.moveaxis(hidden.reshape(*hidden.shape[:2], chunks, size, hidden.shape[-1]), 2, 0)
    target_chunks = jnp.moveaxis(targets.reshape(targets.shape[0], chunks, size), 1, 0)

    # Gathered once, not in each chunk.
    head = constrain(head, mesh, None, "tp")
    score = jax.checkpoint(partial(_score_chunk, head, temperature=temperature, with_kl=with_kl, mesh=mesh))
    scores = jax.lax.map(lambda pair: score(*pair), (hidden_chunks, target_chunks))

    def join(values: Float[Array, "N M B C"]) -> Float[Array, "M B T"]:
        whole = jnp.moveaxis(values, 0, 2)
        return whole.reshape(*whole.shape[:2], chunks * size)[..., :length]

    return jax.tree.map(join, scores)


def score_rollouts(
    params: qwen3.Params,
    prompts: Int[Array, "P M S"],
    prompt_lengths: Int[Array, "P M"],
    responses: Int[Array, "P G T"],
    response_lengths: Int[Array, "P G"],
    *,
    config: qwen3.Qwen3Config,
    places: "Places | None" = None,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    temperature: float = 1.0,
    chunk: int = 256,
    with_kl: bool = False,
    mesh: Mesh | None = None,
) -> TokenScores:
    """Scores every rollout after each of its question's M prompts; arrays [M, P, G, T].

    Prompts are padded on the left, responses on the right. With `places` the sequences are packed into rows
    without that padding. Scores of padding are finite and mean nothing.
    """
    kernel = implementation(config.head_dim, mesh, dtype)
    if places is None:
        questions, group, _ = responses.shape
        # Kernels of attention know no branches.
        per_row = responses_per_row(questions, group, batch_shards(mesh)) if kernel == "xla" else 1
        layout = joined(prompts, prompt_lengths, responses, response_lengths, per_row)
    else:
        layout = packed(prompts, prompt_lengths, responses, response_lengths, places)
    rows = jax.tree.map(lambda values: constrain(values, mesh, None, BATCH), layout.rows)

    def states_before(rows: Rows) -> Float[Array, "B T D"]:
        hidden = qwen3.forward(
            params,
            rows.tokens,
            config=config,
            valid=rows.valid,
            segments=rows.segments,
            branches=layout.branches,
            dtype=dtype,
            remat=remat,
            mesh=mesh,
        )
        return layout.states(hidden)

    # The contexts are an axis of their own: a rollout's states under all of them lie on the same device. cuDNN's kernel
    # takes no further axis with a mask that all heads share, so there they come one after the other.
    states = jax.lax.map(states_before, rows) if kernel == "cudnn" else jax.vmap(states_before)(rows)
    scores = score_hidden(
        qwen3.lm_head(params, config),
        states,
        layout.targets,
        temperature=temperature,
        chunk=chunk,
        with_kl=with_kl,
        mesh=mesh,
    )
    return jax.tree.map(lambda values: layout.restore(constrain(values, mesh)), scores)


class Rows(NamedTuple):
    """Sequences as `qwen3.forward` reads them."""

    tokens: Int[Array, "*M B W"]
    valid: Bool[Array, "*M B W"]
    segments: Int[Array, "*M B W"] | None
    """Which tokens see each other (`attention.causal_mask`); None where a row is not packed."""


class Layout(NamedTuple):
    """Where prompts and responses lie in rows, and how to find their scores again.

    The state before a token predicts it: the shift made here, in two ways, is the project's only one.
    """

    rows: Rows
    branches: Branches | None
    targets: Int[Array, "B T"]
    """What is scored."""
    states: Callable[[Float[Array, "R W D"]], Float[Array, "B T D"]]
    """From the states of rows to those before the targets."""
    restore: Callable[[Float[Array, "M B T"]], Float[Array, "M P G T"]]
    """From scores of targets to scores of rollouts."""


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "starts"], meta_fields=["height", "width"])
@dataclass(frozen=True)
class Places:
    """Where each rollout lies in `height` rows of `width` columns, under every mode alike."""

    # Any: those who pass trees on put shardings, shapes and NumPy arrays in their place.
    rows: Any
    """[P, G], integers."""
    starts: Any
    """[P, G], the column of its first token; its prompt, of whichever mode, ends before it."""
    height: int
    width: int


def packed(
    prompts: Int[Array, "P M S"],
    prompt_lengths: Int[Array, "P M"],
    responses: Int[Array, "P G T"],
    response_lengths: Int[Array, "P G"],
    places: Places,
) -> Layout:
    """Every response behind its own copy of the prompt, many such sequences in a row."""
    (questions, _, before), (_, group, length) = prompts.shape, responses.shape
    cells, nowhere = (places.height, places.width), places.height * places.width
    first = (places.rows * places.width + places.starts)[..., None]
    steps = jnp.arange(length)
    filled = steps < response_lengths[..., None]
    numbers = 1 + jnp.arange(questions * group).reshape(questions, group, 1)
    at = jnp.where(filled, first + steps, nowhere)

    def put(row: Int[Array, "C"], at: Int[Array, "P G N"], values: Int[Array, "P #G #N"]) -> Int[Array, "C"]:
        return row.at[at].set(jnp.broadcast_to(values, at.shape), mode="drop")

    empty = jnp.zeros(nowhere, responses.dtype)
    tokens, segments = put(empty, at, responses), put(empty, at, numbers)

    def of_mode(prompt: Int[Array, "P S"], size: Int[Array, "P"]) -> Rows:
        column = jnp.arange(before) - before
        prompt_at = jnp.where(column >= -size[:, None, None], first + column, nowhere)
        own = put(segments, prompt_at, numbers).reshape(cells)
        return Rows(put(tokens, prompt_at, prompt[:, None]).reshape(cells), own > 0, own)

    def restore(scores: Float[Array, "M R W"]) -> Float[Array, "M P G T"]:
        return scores.reshape(scores.shape[0], -1)[:, jnp.where(filled, first + steps - 1, 0)]

    rows = jax.vmap(of_mode, in_axes=1)(prompts, prompt_lengths)
    return Layout(rows, None, jnp.roll(tokens, -1).reshape(cells), lambda hidden: hidden, restore)


def joined(
    prompts: Int[Array, "P M S"],
    prompt_lengths: Int[Array, "P M"],
    responses: Int[Array, "P G T"],
    response_lengths: Int[Array, "P G"],
    per_row: int,
) -> Layout:
    """Padded prompts, each with `per_row` of its padded responses behind it, in the same columns of every row."""
    questions, group, length = responses.shape
    rows = join_rows(prompts, prompt_lengths, responses, response_lengths, per_row)
    branches = Branches(prompts.shape[2], per_row) if per_row > 1 else None
    targets = responses.reshape(questions * group, length)

    def states(hidden: Float[Array, "R W D"]) -> Float[Array, "B T D"]:
        return _states_before(hidden, prompts.shape[2], per_row).reshape(*targets.shape, -1)

    return Layout(rows, branches, targets, states, lambda scores: scores.reshape(-1, questions, group, length))


def responses_per_row(questions: int, group: int, shards: int) -> int:
    """How many responses share one computation of their prompt, a divisor of the group's size.

    As many as leave rows that `shards` parts of the devices can divide evenly.
    """
    sizes = [size for size in range(1, group + 1) if group % size == 0 and questions * group // size % shards == 0]
    return max(sizes, default=1)


def join_rows(
    prompts: Int[Array, "P M S"],
    prompt_lengths: Int[Array, "P M"],
    responses: Int[Array, "P G T"],
    response_lengths: Int[Array, "P G"],
    per_row: int,
) -> Rows:
    """Every response behind every prompt of its question: [M, P·G/per_row, S + per_row·T].

    A row's responses follow each other; `attention.Branches` keeps them apart.
    """
    questions, contexts, width = prompts.shape
    group, length = responses.shape[1:]
    rows, tail = group // per_row, per_row * length
    outer = (contexts, questions, rows)

    def join(left: Shaped[Array, "P M S"], right: Shaped[Array, "P G T"]) -> Shaped[Array, "M B W"]:
        left = jnp.broadcast_to(jnp.moveaxis(left, 1, 0)[:, :, None], (*outer, width))
        right = jnp.broadcast_to(right.reshape(questions, rows, tail)[None], (*outer, tail))
        return jnp.concatenate([left, right], axis=-1).reshape(contexts, -1, width + tail)

    prompt_valid = jnp.arange(width) >= width - prompt_lengths[..., None]
    response_valid = jnp.arange(length) < response_lengths[..., None]
    return Rows(join(prompts, responses), join(prompt_valid, response_valid), None)


def _states_before(hidden: Float[Array, "B W D"], width: int, per_row: int) -> Float[Array, "B R T D"]:
    """The state that predicts each response token: the prompt's last, then those of the tokens before it."""
    batch, _, size = hidden.shape
    responses = hidden[:, width:].reshape(batch, per_row, -1, size)
    last = jnp.broadcast_to(hidden[:, None, width - 1 : width], (batch, per_row, 1, size))
    return jnp.concatenate([last, responses[:, :, :-1]], axis=2)
