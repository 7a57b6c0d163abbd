"""The model against transformers' `Qwen3ForCausalLM`, both in float32, on small random weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from policy_split_jax.model import huggingface, qwen3

VOCAB, LENGTH = 61, 9
# (tied embeddings, query heads, kv heads, head dim, rotary base). 24 / heads is never the head dim.
SHAPES = {
    "tied, 1 query head a kv head": (True, 2, 2, 8, 1e4),
    "untied, 2 query heads a kv head": (False, 4, 2, 10, 1e6),
    "tied, 8 query heads a kv head": (True, 8, 1, 6, 1e6),
    "untied, 8 query heads a kv head": (False, 16, 2, 4, 1e4),
}
# Which of the LENGTH positions are real tokens, a row for each of the two sequences.
LAYOUTS = {
    "no padding": ([1] * 9, [1] * 9),
    "right padding": ([1] * 9, [1] * 5 + [0] * 4),
    "left padding": ([0] * 3 + [1] * 6, [0] * 6 + [1] * 3),
    "padding inside": ([1, 1, 0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1, 0, 0]),
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def models(request, tmp_path_factory):
    """The oracle, the same weights loaded by us, and our config."""
    torch.set_num_threads(2)
    tied, heads, kv_heads, head_dim, theta = request.param
    torch.manual_seed(0)
    oracle = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            # Far from the usual start (small matrices, norms of one), where errors would hardly show.
            spread = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(float("norm" in name) + spread * torch.randn(weight.shape))
    folder = tmp_path_factory.mktemp("oracle")
    oracle.save_pretrained(folder)
    config = huggingface.load_config(folder)
    return oracle, huggingface.load_params(folder), config


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)


@partial(jax.jit, static_argnames=("config", "remat"))
def our_logits(params, tokens, valid, config, remat="none"):
    hidden = qwen3.forward(params, tokens, config=config, valid=valid, remat=remat)
    return qwen3.logits(params, hidden, config)


def oracle_logits(oracle, tokens, valid):
    valid = torch.from_numpy(np.array(valid)).long()
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    ids = torch.from_numpy(np.array(tokens)).long()
    return oracle(input_ids=ids, attention_mask=valid, position_ids=positions).logits


def our_loss(params, tokens, valid, config, remat="none"):
    """Mean cross entropy of each valid position's next token, where that is valid too."""
    scores = jax.nn.log_softmax(our_logits(params, tokens, valid, config, remat))[:, :-1]
    chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    counted = valid[:, :-1] & valid[:, 1:]
    return -jnp.sum(jnp.where(counted, chosen, 0)) / jnp.sum(counted)


our_loss_and_gradient = jax.jit(jax.value_and_grad(our_loss), static_argnames=("config", "remat"))
# Gradients are compiled for a tied and an untied shape only.
untied = pytest.mark.parametrize("models", [SHAPES["untied, 2 query heads a kv head"]], indirect=True, ids=["untied"])
tied_and_untied = pytest.mark.parametrize(
    "models",
    [SHAPES["tied, 8 query heads a kv head"], SHAPES["untied, 2 query heads a kv head"]],
    indirect=True,
    ids=["tied", "untied"],
)


def oracle_loss(oracle, tokens, valid):
    scores = oracle_logits(oracle, tokens, valid)[:, :-1]
    counted = torch.from_numpy(valid[:, :-1] & valid[:, 1:])
    target = torch.from_numpy(tokens[:, 1:]).long()
    return torch.nn.functional.cross_entropy(scores[counted], target[counted])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_logits_are_those_of_transformers(models, tokens, layout):
    oracle, params, config = models
    valid = np.array(layout, bool)
    ours = np.asarray(our_logits(params, jnp.asarray(tokens), jnp.asarray(valid), config))
    with torch.no_grad():
        theirs = oracle_logits(oracle, tokens, valid).numpy()
    assert theirs[valid].std() > 0.5
    # Logits of size 1 after two float32 layers: sums in another order differ by some 1e-6.
    np.testing.assert_allclose(ours[valid], theirs[valid], atol=1e-4, rtol=0)


@tied_and_untied
@pytest.mark.parametrize("layout", ["right padding", "left padding"])
def test_gradients_are_those_of_transformers(models, tokens, layout, tmp_path):
    oracle, params, config = models
    valid = np.array(LAYOUTS[layout], bool)
    loss, ours = our_loss_and_gradient(params, jnp.asarray(tokens), jnp.asarray(valid), config=config)
    oracle.zero_grad()
    expected = oracle_loss(oracle, tokens, valid)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), abs=1e-5)  # float32 rounding of a value near 4

    # The oracle's gradients, brought into our tree the way weights are.
    gradients = {name: weight.grad.contiguous() for name, weight in oracle.named_parameters()}
    save_file(gradients, tmp_path / "model.safetensors")
    theirs = huggingface.load_params(tmp_path, config)
    by_path = dict(jax.tree.leaves_with_path(theirs))
    assert len(by_path) == len(jax.tree.leaves(params))
    for path, gradient in jax.tree.leaves_with_path(ours):
        stacked = "layers" in jax.tree_util.keystr(path)
        pairs = zip(gradient, by_path[path], strict=True) if stacked else [(gradient, by_path[path])]
        for mine, other in pairs:
            distance = float(jnp.linalg.norm(mine - other))
            # Relative to each tensor's own norm; float32 backward passes differ by some 1e-6 of it.
            assert distance <= 1e-3 * float(jnp.linalg.norm(other)), path
            assert float(jnp.linalg.norm(other)) > 0, path


@untied
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(models, tokens, remat):
    _, params, config = models
    valid = jnp.asarray(LAYOUTS["right padding"], bool)
    evaluate = partial(our_loss_and_gradient, params, jnp.asarray(tokens), valid, config=config)
    expected, expected_gradient = evaluate()
    loss, rematerialised = evaluate(remat=remat)
    # The same sums, perhaps fused otherwise by the compiler.
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda mine, other: np.testing.assert_allclose(mine, other, atol=1e-6, rtol=1e-4),
        rematerialised,
        expected_gradient,
    )


@pytest.mark.parametrize("layout", ["right padding", "left padding", "padding inside"])
def test_what_stands_in_padding_is_seen_by_nobody(models, tokens, layout):
    _, params, config = models
    valid = np.array(LAYOUTS[layout], bool)
    garbage = np.where(valid, tokens, (tokens + 7) % VOCAB)
    assert (garbage != tokens).sum() == (~valid).sum() > 0
    score = partial(our_logits, params, valid=jnp.asarray(valid), config=config)
    before, after = score(jnp.asarray(tokens)), score(jnp.asarray(garbage))
    # Exactly: a masked score's weight is exactly zero.
    np.testing.assert_array_equal(np.asarray(before)[valid], np.asarray(after)[valid])


@pytest.mark.parametrize("layout", ["left padding", "padding inside"])
def test_where_padding_stands_does_not_matter(models, tokens, layout):
    """The same tokens packed to the left score the same: positions count valid tokens only."""
    _, params, config = models
    valid = np.array(LAYOUTS[layout], bool)
    packed_valid = -np.sort(-valid.astype(int), axis=1) > 0
    packed = np.zeros_like(tokens)
    packed[packed_valid] = tokens[valid]
    here = our_logits(params, jnp.asarray(tokens), jnp.asarray(valid), config)
    there = our_logits(params, jnp.asarray(packed), jnp.asarray(packed_valid), config)
    # Softmax sums run over another order of keys: float32 rounding.
    np.testing.assert_allclose(np.asarray(here)[valid], np.asarray(there)[packed_valid], atol=1e-5, rtol=0)
