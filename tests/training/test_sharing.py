"""What a mode trains on of the other's rollouts where that is not what was sampled: each switch by itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy_split_jax import rollouts
from policy_split_jax.config import EMBEDDED, SharingConfig
from policy_split_jax.data.formats import Row
from policy_split_jax.errors import UserError
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.objective.advantages import AdvantageConfig
from policy_split_jax.policy import load_policy, model_folder
from policy_split_jax.rollouts import (
    Group,
    check_prompts,
    render_prompts,
    shared_groups,
    training_prompts,
    without_long_prompts,
)
from policy_split_jax.sampler.batcher import Rollout
from policy_split_jax.training.batch import SharedView, own_rollouts, token_mask, training_mask
from policy_split_jax.training.collate import make_batch
from policy_split_jax.training.update import UpdateConfig

PAPER = SharingConfig()
USER_TURN = SharingConfig(high_entropy_prompt="user_turn")
TEXT = SharingConfig(response="text")
RELEASED = SharingConfig("user_turn", "text")
ROWS = [Row(question, None, "test") for question in ("Make 35 from 3, 5, 4.", "2+2?")]


# ------------------------------------------------------------------------------ prompts and responses, by hand


@pytest.fixture(scope="module")
def policy():
    policy = load_policy(model_folder(EMBEDDED))
    return replace(policy, prompts=replace(policy.prompts, high_entropy="Be odd."))


def group(policy, row, *responses):
    """Responses are token ids; the modes take turns."""
    sampled = [Rollout(np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop") for ids in responses]
    modes = [at % 2 for at in range(len(responses))]
    return Group(row, render_prompts(policy, [row], 1000)[0], sampled, modes, policy.text)


def spelled(policy, text):
    """A token for each character, and the stop token."""
    ids = [token for letter in text for token in policy.tokenizer(letter)["input_ids"]]
    return [*ids, policy.tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_mode_trains_on_what_was_sampled_unless_told_otherwise(policy):
    assert [sharing.exact for sharing in (PAPER, USER_TURN, TEXT, RELEASED)] == [True, False, False, False]
    assert shared_groups(policy, [group(policy, ROWS[0], [49, 50])], PAPER, 8) is None


@pytest.mark.parametrize("sharing", [USER_TURN, RELEASED])
def test_the_prompt_of_a_shared_rollout_is_one_user_turn(policy, sharing):
    """In the high-entropy mode; the normal mode has its own prompt."""
    groups = [group(policy, row, spelled(policy, "12"), spelled(policy, "3")) for row in ROWS]
    for found, each in zip(shared_groups(policy, groups, sharing, 8), groups, strict=True):
        normal, high_entropy = (policy.tokenizer.decode(ids) for ids in found.prompts)
        question = each.row.question
        assert normal == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        turn = f"system\nBe odd.\nuser\n{question}"
        assert high_entropy == f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        assert found.prompts[NORMAL] == each.prompts[NORMAL]


@pytest.mark.parametrize("sharing", [PAPER, TEXT])
def test_the_prompt_of_a_shared_rollout_is_the_modes_own(policy, sharing):
    prompts = render_prompts(policy, ROWS, 1000)
    assert training_prompts(policy, ROWS, prompts, sharing) == render_prompts(policy, ROWS, 1000)


@pytest.mark.parametrize("sharing", [TEXT, RELEASED])
def test_a_response_is_encoded_anew_without_its_stop_token(policy, sharing):
    """`12` was sampled digit by digit, and is one token of the tokenizer's own."""
    sampled = spelled(policy, "12+3")
    [found] = shared_groups(policy, [group(policy, ROWS[0], sampled, spelled(policy, "4"))], sharing, 8)
    assert len(sampled) == 5
    assert [list(ids) for ids in found.responses] == [policy.tokenizer(text)["input_ids"] for text in ("12+3", "4")]
    assert [len(ids) for ids in found.responses] == [3, 1]


def test_a_response_stays_as_it_was_sampled_under_a_user_turn(policy):
    sampled = spelled(policy, "12+3")
    [found] = shared_groups(policy, [group(policy, ROWS[0], sampled)], USER_TURN, 8)
    assert [list(ids) for ids in found.responses] == [sampled]


def test_a_response_that_grows_is_cut_at_the_most_new_tokens(policy):
    """Half of a character becomes the sign of a broken one, of three bytes."""
    half = policy.tokenizer("é")["input_ids"][:1]
    [found] = shared_groups(policy, [group(policy, ROWS[0], half * 3)], TEXT, 4)
    assert list(found.responses[0]) == (policy.tokenizer("\ufffd")["input_ids"] * 3)[:4]


def test_a_prompt_that_only_shared_rollouts_have_must_fit_too(monkeypatch, policy):
    """Where the user turn is the longest of a question's prompts."""
    limit = max(len(ids) for pair in render_prompts(policy, ROWS, 1000) for ids in pair)

    def render(tokenizer, texts, _):
        return [[1] * (limit + (text == ROWS[1].question)) for text in texts]

    monkeypatch.setattr(rollouts, "render_user_turn", render)
    check_prompts(policy, ROWS, limit, TEXT)
    with pytest.raises(UserError) as caught:
        check_prompts(policy, ROWS, limit, USER_TURN)
    message = str(caught.value)
    assert message.startswith(f"1 of 2 questions make prompts of more than {limit} tokens, the longest {limit + 1} ")
    assert "('2+2?')" in message
    assert without_long_prompts(policy, ROWS, limit, USER_TURN) == ROWS[:1]
    assert without_long_prompts(policy, ROWS, limit, TEXT) == ROWS
    check_prompts(policy, ROWS, limit + 1, USER_TURN)


def test_each_mode_has_the_masks_of_what_it_trains_on(policy):
    """Of the other's rollouts, of which none has its stop token; what was not graded is nobody's."""
    texts = ("1+2", "3", "", "1")
    groups = [group(policy, ROWS[0], *(spelled(policy, text) for text in texts))]
    batch = make_batch(
        [groups[0].prompts],
        [groups[0].rollouts],
        [groups[0].modes],
        [[1.0, 0.0, 0.0, None]],
        max_prompt_tokens=100,
        max_new_tokens=5,
        shared=shared_groups(policy, groups, TEXT, 5),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    assert own_rollouts(batch)[..., 0].tolist() == [[[True, False, True, False]], [[False, True, False, True]]]
    tokens = np.sum(training_mask(batch), axis=-1)
    assert tokens.tolist() == [[[4, 1, 1, 0]], [[3, 2, 0, 0]]]
    # From the left.
    assert training_mask(batch)[1, 0, 0].tolist() == [True, True, True, False, False]
    alone = batch._replace(shared=None)
    assert np.sum(token_mask(batch), axis=-1).tolist() == [[4, 2, 1, 0]]
    np.testing.assert_array_equal(training_mask(alone), token_mask(batch)[None])


# ----------------------------------------------------------------------------------- updates, against PyTorch

# The first trains as the paper says, the last as the released trainer does: κ = 1 and η of the state are large.
ADVANTAGE = AdvantageConfig(alpha=0.3, kappa=1.0)
SETTINGS = UpdateConfig(advantage=ADVANTAGE, clip_low=0.02, clip_high=0.01, score_chunk=3)
SCALED = replace(ADVANTAGE, clamp="scaled_bonus", bonus_repeats=2)


def shared_view(batch, seed=7):
    """Another prompt of the high-entropy mode, other tokens; responses are longer, shorter, or empty."""
    draw = np.random.default_rng(seed)
    prompts = np.copy(batch.prompts)
    prompts[:, HIGH_ENTROPY] = draw.integers(0, 64, prompts[:, HIGH_ENTROPY].shape)
    prompt_lengths = np.copy(batch.prompt_lengths)
    prompt_lengths[:, HIGH_ENTROPY] = [11, 5, 10, 3]
    steps = draw.integers(-2, 3, batch.response_lengths.shape).astype(np.int32)
    lengths = np.clip(batch.response_lengths + steps, 0, batch.responses.shape[-1])
    lengths[0, 1] = 0
    assert {-1, 1} <= set(np.sign(lengths - batch.response_lengths).ravel().tolist())
    return SharedView(prompts, prompt_lengths, draw.integers(0, 64, batch.responses.shape).astype(np.int32), lengths)


@pytest.fixture(scope="module")
def batch(batches):
    return batches[0]._replace(shared=shared_view(batches[0]))


def parts_of(twin, batch, config):
    """The sequences of each update."""
    everyone = twin.everyone(batch)
    if config.update_order == "quarters":
        return [
            [x for x in everyone if x[0] == mode and (batch.modes[x[1], x[2]] == mode) == own]
            for own in (True, False)
            for mode in (NORMAL, HIGH_ENTROPY)
        ]
    halves = np.split(np.arange(len(batch.modes)), config.updates_per_step)
    return [[x for x in everyone if x[1] in half] for half in halves]


def assert_close(first, second, atol):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=atol, rtol=0), first, second)


def compare(twin, sgd_step, model, params, batch, config):
    """Asserts that the updates of a step are those of PyTorch; gives the parameters and the metrics."""
    found, metrics = sgd_step(model, params, batch, config, rate=0.3)
    oracle = twin.make(params)
    theirs = twin.split_step(oracle, batch, config, parts_of(twin, batch, config), rate=0.3)
    # Float32 means of some 30 tokens.
    assert metrics["loss"] == pytest.approx(np.mean(theirs.losses), rel=1e-5, abs=1e-6)
    assert max(map(abs, theirs.losses)) > 1e-3
    if config.updates_per_step == 1 or config.update_order == "quarters":
        # Else it is a mean over updates.
        assert [metrics[f"advantage_abs/{name}"] for name in MODE_NAMES] == pytest.approx(theirs.sizes, rel=1e-5)
    # Up to four steps of gradients of size 0.1, of two float32 backward passes.
    assert_close(found, twin.parameters(oracle), atol=1e-5)
    return found, metrics


@pytest.mark.parametrize(
    "config",
    [
        SETTINGS,
        replace(SETTINGS, updates_per_step=2),
        replace(SETTINGS, update_order="quarters", updates_per_step=4),
        replace(SETTINGS, update_order="quarters", updates_per_step=4, advantage=SCALED),
    ],
    ids=["one update", "two updates", "quarters", "quarters and the released bonus"],
)
def test_updates_are_those_of_pytorch(twin, bag, sgd_step, model, batch, config):
    """The bonus meets the other mode's log-probability by position."""
    found, metrics = compare(twin, sgd_step, model, bag, batch, config)
    other, others = sgd_step(model, bag, batch._replace(shared=None), config, rate=0.3)
    assert abs(metrics["loss"] - others["loss"]) > 1e-3
    assert float(jnp.max(jnp.abs(found["table"] - other["table"]))) > 1e-2


def test_the_released_step_of_a_real_model(twin, sgd_step, model, params, batch):
    config = replace(SETTINGS, update_order="quarters", updates_per_step=4, advantage=SCALED)
    compare(twin, sgd_step, model, params, batch, config)


@pytest.mark.parametrize("switch", [{"surprise": "entropy"}, {"clamp": "scaled_bonus"}, {"bonus_repeats": 2}])
def test_each_switch_of_the_bonus_in_an_update(twin, bag, sgd_step, model, batches, switch):
    config = replace(SETTINGS, advantage=replace(ADVANTAGE, **switch))
    _, metrics = compare(twin, sgd_step, model, bag, batches[0], config)
    _, plain = sgd_step(model, bag, batches[0], SETTINGS, rate=0.3)
    assert abs(metrics["advantage_abs/high_entropy"] - plain["advantage_abs/high_entropy"]) > 1e-3
    assert metrics["advantage_abs/normal"] == pytest.approx(plain["advantage_abs/normal"], rel=1e-6)


@pytest.mark.parametrize("order", ["questions", "quarters"])
def test_a_view_of_what_was_sampled_changes_nothing(bag, sgd_step, model, batches, order):
    plain = batches[0]
    view = SharedView(plain.prompts, plain.prompt_lengths, plain.responses, plain.response_lengths)
    config = replace(SETTINGS, update_order=order, updates_per_step=2)
    (found, metrics), (other, others) = (
        sgd_step(model, bag, each, config, rate=0.3) for each in (plain, plain._replace(shared=view))
    )
    same = {name: value for name, value in metrics.items() if not name.startswith(("kl_k1/", "kl_k3/"))}
    assert others == pytest.approx(same, rel=1e-5, abs=1e-5)  # the same float32 sums in another order
    assert_close(found, other, atol=1e-5)


@pytest.mark.parametrize("order", ["questions", "quarters"])
def test_microbatches_change_nothing(bag, sgd_step, model, batch, order):
    config = replace(SETTINGS, update_order=order, updates_per_step=2)
    (found, metrics), (other, others) = (
        sgd_step(model, bag, batch, replace(config, microbatch_questions=size), rate=0.3) for size in (0, 1)
    )
    assert others == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert_close(found, other, atol=1e-5)


def test_padding_changes_nothing(bag, sgd_step, model, batch):
    def wider(arrays):
        return arrays._replace(
            prompts=np.pad(arrays.prompts, [(0, 0), (0, 0), (5, 0)], constant_values=5),
            responses=np.pad(arrays.responses, [(0, 0), (0, 0), (0, 4)], constant_values=9),
        )

    logprobs = np.pad(batch.sampler_logprobs, [(0, 0), (0, 0), (0, 4)], constant_values=-30)
    wide = wider(batch)._replace(shared=wider(batch.shared), sampler_logprobs=logprobs)
    (found, metrics), (other, others) = (sgd_step(model, bag, each, SETTINGS, rate=0.3) for each in (batch, wide))
    assert others == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert_close(found, other, atol=1e-5)


# ------------------------------------------------------------------------------------------------- metrics

TRAINED = {"loss", "grad_norm", *(f"{name}/{m}" for name in ("advantage_abs", "clip_fraction") for m in MODE_NAMES)}


@pytest.fixture
def both_metrics(bag, sgd_step, model, batch):
    """With the view, and of what was sampled."""
    return [sgd_step(model, bag, each, SETTINGS)[1] for each in (batch, batch._replace(shared=None))]


def test_what_is_measured_is_what_was_sampled(both_metrics):
    """But the loss and what belongs to it; estimates of the divergence need scores of what was sampled."""
    metrics, plain = both_metrics
    estimates = {f"kl_{k}/{of}" for k in ("k1", "k3") for of in ("high_entropy_to_normal", "normal_to_high_entropy")}
    assert metrics.keys() == plain.keys() - estimates
    for name in metrics.keys() - TRAINED:
        assert metrics[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-6), name
    for name in ("loss", "advantage_abs/high_entropy", "advantage_abs/normal"):
        assert abs(metrics[name] - plain[name]) > 1e-4, name
