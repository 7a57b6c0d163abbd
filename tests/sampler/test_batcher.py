"""Continuous batching by hand: add, step, look, cancel."""

import jax
import numpy as np
import pytest

from policy_split_jax.sampler.batcher import Batcher, EngineConfig, Place, Prompt, Sampling

NEVER = (900,)
PROMPT = [5, 6, 7]
LIMIT, NEW = 16, 12


@pytest.fixture
def make(config, params):
    def batcher(slots=2, decode_steps=3):
        engine = EngineConfig(config, NEVER, slots, decode_steps)
        return Batcher(engine, params, max_prompt_tokens=LIMIT, max_new_tokens=NEW)

    return batcher


def prompt(count=1, seed=0, tokens=PROMPT):
    return Prompt(tokens, jax.random.split(jax.random.key(seed), count))


def run(batcher):
    ended = {}
    while batcher.busy:
        ended |= dict(batcher.step())
    return ended


def test_rollouts_are_returned_as_they_end_under_the_name_given(make):
    batcher = make()
    batcher.add(7, prompt(1, 0), Sampling(2))
    batcher.add(9, prompt(2, 1), Sampling(NEW))
    assert [place for place, _ in batcher.step()] == [Place(7, 0)]
    assert batcher.running == 1
    ended = run(batcher)
    assert set(ended) == {Place(9, 0), Place(9, 1)}
    assert {len(rollout.tokens) for rollout in ended.values()} == {NEW}
    assert not batcher.busy


def test_a_prompt_may_come_while_others_run(make):
    alone = make()
    alone.add(1, prompt(1, 3), Sampling(NEW))
    expected = run(alone)[Place(1, 0)]
    batcher = make()
    batcher.add(0, prompt(2, 1), Sampling(NEW))
    batcher.step()
    batcher.add(1, prompt(1, 3), Sampling(NEW))
    np.testing.assert_array_equal(run(batcher)[Place(1, 0)].tokens, expected.tokens)


def test_what_has_been_sampled_can_be_looked_at(make):
    batcher = make(decode_steps=5)
    batcher.add(0, prompt(3), Sampling(NEW))
    assert batcher.partial() == []
    batcher.step()
    looks = dict(batcher.partial())
    assert set(looks) == {Place(0, 0), Place(0, 1)}
    ended = run(batcher)
    for place, rollout in looks.items():
        assert len(rollout.tokens) == 5
        np.testing.assert_array_equal(rollout.tokens, ended[place].tokens[:5])
        np.testing.assert_array_equal(rollout.logprobs, ended[place].logprobs[:5])


def test_a_cancelled_prompt_leaves_its_slots_to_others(make):
    """Name 0 has two rollouts in slots and one waiting, name 1 has not been computed: it takes over at once."""
    batcher = make()
    batcher.add(0, prompt(3, 0), Sampling(NEW))
    batcher.add(1, prompt(2, 1), Sampling(NEW))
    batcher.step()
    batcher.cancel(0)
    assert batcher.running == 0
    batcher.step()
    assert batcher.running == 2
    ended = run(batcher)
    assert set(ended) == {Place(1, 0), Place(1, 1)}
    fresh = make()
    fresh.add(1, prompt(2, 1), Sampling(NEW))
    for place, rollout in run(fresh).items():
        np.testing.assert_array_equal(ended[place].tokens, rollout.tokens)


def test_a_prompt_that_waits_can_be_cancelled(make):
    batcher = make(slots=1)
    batcher.add(0, prompt(1, 0), Sampling(4))
    batcher.add(1, prompt(1, 1), Sampling(4))
    batcher.cancel(1)
    assert set(run(batcher)) == {Place(0, 0)}


def test_one_rollout_of_a_prompt_can_be_cancelled(make):
    batcher = make(slots=3)
    batcher.add(0, prompt(3), Sampling(NEW))
    batcher.step()
    batcher.cancel(0, 1)
    assert set(run(batcher)) == {Place(0, 0), Place(0, 2)}


@pytest.mark.parametrize(
    ("tokens", "limit", "message"),
    [([], 3, "a prompt of 0 tokens; it may have 1 to 16"), ([1] * 17, 3, "a prompt of 17 tokens"),
     ([1], 0, "0 new tokens; 1 to 12 can be made"), ([1], 13, "13 new tokens")],
)  # fmt: skip
def test_what_the_engine_is_too_small_for_is_an_error(make, tokens, limit, message):
    batcher = make()
    with pytest.raises(ValueError, match=message):
        batcher.add(0, prompt(tokens=tokens), Sampling(limit))
    assert not batcher.busy
