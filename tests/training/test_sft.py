"""Supervised learning against transformers' own cross-entropy on the response tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from policy_split_jax.config import OptimizerConfig
from policy_split_jax.model import huggingface
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.sft import SftBatch, SftState, make_sft_update

VOCAB, WIDTH, LENGTH = 50, 6, 5


def make_torch_model():
    torch.manual_seed(3)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            tie_word_embeddings=True,
            initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            attn_implementation="eager",
        )
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_torch_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def batch():
    """Ragged; garbage in the padding."""
    draw = np.random.default_rng(0)
    return SftBatch(
        prompts=draw.integers(0, VOCAB, (4, 1, WIDTH)).astype(np.int32),
        prompt_lengths=np.array([[3], [WIDTH], [1], [4]], np.int32),
        responses=draw.integers(0, VOCAB, (4, 1, LENGTH)).astype(np.int32),
        response_lengths=np.array([[LENGTH], [1], [3], [2]], np.int32),
    )


def torch_loss(model, batch):
    """transformers' own loss of each example, alone and unpadded; −100 leaves the prompt out."""
    total, count = 0.0, 0
    for row in range(len(batch.prompts)):
        prompt = batch.prompts[row, 0, WIDTH - batch.prompt_lengths[row, 0] :]
        response = batch.responses[row, 0, : batch.response_lengths[row, 0]]
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        total = total + model(input_ids=ids, labels=labels).loss * len(response)
        count += len(response)
    return total / count


@pytest.fixture(scope="module")
def update_and_state(saved):
    """One compiled update for all tests; SGD of rate 1 shows the gradient."""
    model = huggingface.load_config(saved)
    optimizer = optax.sgd(1.0)
    update = make_sft_update(model, optimizer)

    def fresh():
        params = huggingface.load_params(saved)
        return SftState(params, optimizer.init(params))

    return update, fresh


def test_loss_and_gradient_are_those_of_transformers(update_and_state, batch, saved, tmp_path):
    update, fresh = update_and_state
    oracle = make_torch_model()
    expected = torch_loss(oracle, batch)
    expected.backward()
    torch.optim.SGD(oracle.parameters(), lr=1.0).step()
    oracle.save_pretrained(tmp_path)

    state, loss = update(fresh(), batch)
    assert float(loss) == pytest.approx(expected.item(), abs=1e-5)  # float32, a value near 4
    theirs = huggingface.load_params(tmp_path)
    before = huggingface.load_params(saved)
    pairs = zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(theirs), strict=True)
    for (path, mine), other in pairs:
        # Two float32 backward passes of gradients below 1.
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=0, err_msg=jax.tree_util.keystr(path))
    moved = jax.tree.map(lambda old, new: float(jnp.max(jnp.abs(new - old))), before, theirs)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_padding_is_not_learnt(update_and_state, batch):
    update, fresh = update_and_state
    changed = jax.tree.map(np.copy, batch)
    beyond = np.arange(LENGTH) >= batch.response_lengths[..., None]
    changed.responses[beyond] = (changed.responses[beyond] + 1) % VOCAB
    before = np.arange(WIDTH) < WIDTH - batch.prompt_lengths[..., None]
    changed.prompts[before] = (changed.prompts[before] + 1) % VOCAB
    state, loss = update(fresh(), batch)
    other_state, other_loss = update(fresh(), changed)
    assert float(loss) == float(other_loss)
    jax.tree.map(np.testing.assert_array_equal, state.params, other_state.params)


def test_a_repeated_batch_is_learnt(saved, batch):
    model = huggingface.load_config(saved)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02, weight_decay=0.0))
    update = make_sft_update(model, optimizer, microbatches=2)
    params = huggingface.load_params(saved)
    first = torch_loss(make_torch_model(), batch).item()
    state, losses = SftState(params, optimizer.init(params)), []
    for _ in range(30):
        state, loss = update(state, batch)
        losses.append(float(loss))
    # The first loss is that of the whole batch though it came in two microbatches; 11 tokens are soon learnt.
    assert losses[0] == pytest.approx(first, abs=1e-5)
    assert losses[-1] < 0.2 < 3 < losses[0]
    assert jax.tree.leaves(params)[0].is_deleted()
