"""Log-probabilities, exact entropies and exact KL divergences of given tokens, in chunks over the sequence.

The language-model head is applied inside each chunk and recomputed in the backward pass, so that logits of a
whole batch `[B, T, V]` never exist.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from policy_split_jax.model import qwen3
from policy_split_jax.model.attention import implementation
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
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, padding), (0, 0)))
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
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    temperature: float = 1.0,
    chunk: int = 256,
    with_kl: bool = False,
    mesh: Mesh | None = None,
) -> TokenScores:
    """Scores every rollout after each of its question's M prompts; arrays [M, P, G, T].

    Prompts are padded on the left, responses on the right, so that the responses of all rows lie in the same
    columns. The state before a token predicts it: the shift made here is the project's only one. Scores of
    padding are finite and mean nothing.
    """
    questions, contexts, width = prompts.shape
    group, length = responses.shape[1:]
    # Splash attention cannot tell the responses of one row from each other.
    apart = implementation(config.head_dim, mesh) == "splash"
    per_row = 1 if apart else responses_per_row(width, length, questions, group, batch_shards(mesh))
    rows = join_rows(prompts, prompt_lengths, responses, response_lengths, per_row)
    rows = jax.tree.map(lambda values: constrain(values, mesh, None, BATCH), rows)

    # The contexts are an axis of their own: a rollout's states under all of them lie on the same device.
    @jax.vmap
    def states_before(rows: Rows) -> Float[Array, "B R T D"]:
        hidden = qwen3.forward(
            params,
            rows.tokens,
            config=config,
            valid=rows.valid,
            segments=None if per_row == 1 else rows.segments,
            dtype=dtype,
            remat=remat,
            mesh=mesh,
        )
        return _states_before(hidden, width, per_row)

    scores = score_hidden(
        qwen3.lm_head(params, config),
        states_before(rows).reshape(contexts, questions * group, length, -1),
        responses.reshape(questions * group, length),
        temperature=temperature,
        chunk=chunk,
        with_kl=with_kl,
        mesh=mesh,
    )
    return jax.tree.map(lambda values: values.reshape(contexts, questions, group, length), scores)


class Rows(NamedTuple):
    """Prompts with some of their responses behind them, as `qwen3.forward` reads them."""

    tokens: Int[Array, "*M B W"]
    valid: Bool[Array, "*M B W"]
    segments: Int[Array, "*M B W"]
    """0 for the prompt, 1, 2, … for the responses, which do not see each other."""


def responses_per_row(width: int, length: int, questions: int, group: int, shards: int) -> int:
    """How many responses share one computation of their prompt, a divisor of the group's size.

    Sharing saves computing the prompt again for every response, but a row's attention grows with the square
    of its length. The most is shared that does not enlarge the attention by more than half, and that leaves
    rows which `shards` parts of the devices can divide evenly.
    """
    limit = 1.5 * group * (width + length) ** 2
    sizes = [size for size in range(2, group + 1) if group % size == 0 and questions * group // size % shards == 0]
    return max([1, *(size for size in sizes if group // size * (width + size * length) ** 2 <= limit)])


def join_rows(
    prompts: Int[Array, "P M S"],
    prompt_lengths: Int[Array, "P M"],
    responses: Int[Array, "P G T"],
    response_lengths: Int[Array, "P G"],
    per_row: int,
) -> Rows:
    """Every response behind every prompt of its question: [M, P·G/per_row, S + per_row·T]."""
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
    tokens = join(prompts, responses)
    segments = jnp.concatenate([jnp.zeros(width, jnp.int32), 1 + jnp.arange(tail) // length])
    return Rows(tokens, join(prompt_valid, response_valid), jnp.broadcast_to(segments, tokens.shape))


def _states_before(hidden: Float[Array, "B W D"], width: int, per_row: int) -> Float[Array, "B R T D"]:
    """The state that predicts each response token: the prompt's last, then those of the tokens before it."""
    batch, _, size = hidden.shape
    responses = hidden[:, width:].reshape(batch, per_row, -1, size)
    last = jnp.broadcast_to(hidden[:, None, width - 1 : width], (batch, per_row, 1, size))
    return jnp.concatenate([last, responses[:, :, :-1]], axis=2)
