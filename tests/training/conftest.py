"""A tiny random Qwen3, its twin in PyTorch, a policy that compiles fast, and batches for all of them."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from policy_split_jax.model import huggingface
from policy_split_jax.objective.scorer import TokenScores
from policy_split_jax.training import update as update_module
from policy_split_jax.training.batch import Batch
from policy_split_jax.training.state import init_state
from policy_split_jax.training.update import make_update

VOCAB, QUESTIONS, GROUP, WIDTH, LENGTH = 64, 4, 4, 12, 7


def torch_model():
    """Grouped queries (two to a kv head), tied embeddings, weights far from an untrained model's."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(float("norm" in name) + spread * torch.randn(weight.shape))
    return model


@pytest.fixture
def make_torch_model():
    return torch_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(saved):
    return huggingface.load_config(saved)


@pytest.fixture(scope="session")
def params(saved):
    return huggingface.load_params(saved)


def make_batch(seed):
    """Ragged prompts and responses, both modes in no order, one ungraded rollout, garbage in the padding."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, VOCAB, (QUESTIONS, GROUP, LENGTH)).astype(np.int32)
    lengths = draw.integers(1, LENGTH + 1, (QUESTIONS, GROUP)).astype(np.int32)
    lengths[0, 0], lengths[1, 1] = LENGTH, 1
    graded = np.ones((QUESTIONS, GROUP), bool)
    graded[2, 1] = False
    rewards = draw.choice([0.0, 0.25, 1.0], (QUESTIONS, GROUP)).astype(np.float32)
    rewards[:, 0], rewards[:, 3] = 1.0, 0.0
    return Batch(
        prompts=draw.integers(0, VOCAB, (QUESTIONS, 2, WIDTH)).astype(np.int32),
        prompt_lengths=np.array([[3, 9], [5, WIDTH], [2, 7], [4, 8]], np.int32),
        responses=tokens,
        response_lengths=lengths,
        modes=np.array([[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], np.int32),
        truncated=lengths == LENGTH,
        rewards=rewards,
        graded=graded,
        sampler_logprobs=draw.normal(-4.0, 0.5, tokens.shape).astype(np.float32),
    )


@pytest.fixture(scope="session")
def batches():
    return [make_batch(seed) for seed in range(3)]


# ---------------------------------------------------------------------------------- a policy that compiles fast


def _bag_scores(
    params, prompts, prompt_lengths, responses, response_lengths, *, config, dtype, remat, temperature, chunk, mesh,
    places=None, with_kl=False,
):  # fmt: skip
    """Stands in for `score_rollouts`: the next token depends on the last one and on the mean of the prompt."""
    table = params["table"]
    real = jnp.arange(prompts.shape[-1]) >= prompts.shape[-1] - prompt_lengths[..., None]
    context = jnp.einsum("pms,pmsd->pmd", real.astype(table.dtype), table[prompts]) / prompt_lengths[..., None]
    shape = (*prompts.shape[:2], *responses.shape[1:])
    last = jnp.broadcast_to(prompts[:, :, None, -1:], (*shape[:3], 1))
    before = jnp.concatenate([last, jnp.broadcast_to(responses[:, None, :, :-1], (*shape[:3], shape[3] - 1))], -1)
    logits = (table[before] + context[:, :, None, None]) @ table.T / temperature
    logp = jnp.moveaxis(jax.nn.log_softmax(logits), 1, 0)
    chosen = jnp.take_along_axis(logp, jnp.broadcast_to(responses, logp.shape[:-1])[..., None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    return TokenScores(chosen, entropy, jnp.sum(jnp.exp(logp) * (logp - logp[::-1]), -1) if with_kl else None)


class BagTwin(torch.nn.Module):
    """The same in PyTorch."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(np.asarray(table)))

    def next_logits(self, prompt, response):
        before = np.concatenate([prompt[-1:], response])[: len(response)].astype(np.int64)
        return (self.table[before] + self.table[prompt.astype(np.int64)].mean(0)) @ self.table.T


@pytest.fixture
def bag_scores():
    return _bag_scores


@pytest.fixture
def bag(monkeypatch):
    """Parameters of the stand-in policy, which the update scores with in this test."""
    monkeypatch.setattr(update_module, "score_rollouts", _bag_scores)
    return {"table": jnp.asarray(np.random.default_rng(5).normal(0, 0.7, (VOCAB, 8)), jnp.float32)}


# -------------------------------------------------------------------------------- one step, here and in PyTorch


@cache
def _compiled(model, config, rate, treedef, shapes):
    state, batch = jax.tree.unflatten(treedef, shapes)
    return make_update(model, config, optax.sgd(rate)).lower(state, batch).compile()


def _sgd_step(model, params, batch, config, *, rate=1.0, eta=0.5, seed=0):
    """The parameters after one step, and its metrics; SGD of rate 1 subtracts the gradient itself."""
    state = init_state(jax.tree.map(jnp.copy, params), optax.sgd(rate), seed, eta)
    leaves, treedef = jax.tree.flatten((state, batch))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    state, metrics = _compiled(model, config, rate, treedef, shapes)(state, batch)
    return state.params, {name: float(value) for name, value in metrics.items()}


@pytest.fixture
def sgd_step():
    return _sgd_step


def _token_scores(oracle, prompt, response, temperature=1.0):
    """(log-probabilities [t], exact entropies [t]) of one response after one prompt, alone and unpadded."""
    if isinstance(oracle, BagTwin):
        logits = oracle.next_logits(prompt, response)
    else:
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
        logits = oracle(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits / temperature, dim=-1)
    chosen = logp[torch.arange(len(response)), torch.tensor(np.asarray(response, np.int64))]
    return chosen, -(logp.exp() * logp).sum(-1)


def _sequence(batch, mode, p, i):
    """(prompt, response) that a mode trains on of a rollout: of its own as sampled, of another's as it is shared."""
    view = batch if batch.shared is None or batch.modes[p, i] == mode else batch.shared
    prompt = view.prompts[p, mode, view.prompts.shape[-1] - view.prompt_lengths[p, mode] :]
    return prompt, view.responses[p, i, : view.response_lengths[p, i]]


def _everyone(batch):
    """All sequences (mode, question, rollout) that count."""
    return [(m, p, i) for m in (0, 1) for p, i in np.ndindex(batch.modes.shape) if batch.graded[p, i]]


def _dual_mode_advantages(batch, old, config, eta):
    """Equations 1 to 4 in float64: {(mode, question, rollout): [t]}, given and returned.

    The log-probability of the other mode is that at the same position, and none where its sequence has ended.
    """
    result = {}
    for p in range(len(batch.modes)):
        graded = [i for i in range(batch.modes.shape[1]) if batch.graded[p, i]]
        rewards = np.array([batch.rewards[p, i] for i in graded], np.float64)
        correctness = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for mode, size in ((0, config.eta_normal), (1, eta)):
            bonus = []
            for i in graded:
                own = old[mode, p, i].astype(np.float64)
                other = np.zeros(len(own))
                both = min(len(own), len(old[1 - mode, p, i]))
                other[:both] = old[1 - mode, p, i][:both]
                bonus.append(-config.alpha * own - (1 - config.alpha) * other)
            everything = np.concatenate(bonus)
            for i, advantage, b in zip(graded, correctness, bonus, strict=True):
                extra = (b - everything.mean()) / (everything.std(ddof=1) + 1e-6)
                limit = abs(advantage) / config.kappa
                if config.clamp == "bonus":
                    extra = size * np.clip(extra, -limit, limit)
                else:
                    extra = np.clip(size * extra, -limit, limit)
                result[mode, p, i] = advantage + config.bonus_repeats * extra
    return result


def _split_step(oracle, batch, config, parts, *, rate=1.0, eta=0.5):
    """SGD of Policy Split on each of `parts` of the sequences (mode, question, rollout), in their order.

    Old log-probabilities and advantages are those before the first. Gives each part's loss, a mean over its tokens, and
    of each mode the share of its tokens, of all parts, that were clipped, and the mean size of their advantages.
    """

    def scores(sequence):
        return _token_scores(oracle, *_sequence(batch, *sequence), config.temperature)

    with torch.no_grad():
        start = {sequence: scores(sequence) for sequence in _everyone(batch)}
    old = {at: logprobs for at, (logprobs, _) in start.items()}
    by_entropy = config.advantage.surprise == "entropy"
    seen = {at: (-entropy if by_entropy else logprobs).numpy() for at, (logprobs, entropy) in start.items()}
    advantages = _dual_mode_advantages(batch, seen, config.advantage, eta)
    optimizer = torch.optim.SGD(oracle.parameters(), lr=rate)
    losses, clipped = [], {0: [], 1: []}
    for part in parts:
        terms = []
        for sequence in part:
            advantage = torch.tensor(advantages[sequence], dtype=torch.float32)
            ratio = torch.exp(scores(sequence)[0] - old[sequence])
            bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            terms.append(torch.minimum(ratio * advantage, bounded * advantage))
            clipped[sequence[0]].append(bounded * advantage < ratio * advantage)
        loss = -torch.cat(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return SimpleNamespace(
        losses=losses,
        clipped=[torch.cat(clipped[mode]).float().mean().item() for mode in (0, 1)],
        sizes=[np.abs(np.concatenate([advantages[at] for at in old if at[0] == mode])).mean() for mode in (0, 1)],
    )


@pytest.fixture
def twin(tmp_path):
    """The steps in PyTorch, and what the parameters are there."""

    def make(params):
        return BagTwin(params["table"]) if "table" in params else torch_model()

    def parameters(oracle):
        if isinstance(oracle, BagTwin):
            return {"table": jnp.asarray(oracle.table.detach().numpy())}
        oracle.save_pretrained(tmp_path / "twin")
        return huggingface.load_params(tmp_path / "twin")

    return SimpleNamespace(
        make=make,
        parameters=parameters,
        token_scores=_token_scores,
        everyone=_everyone,
        split_step=_split_step,
    )
