"""Every program of a run, ready to be compiled for devices that are not there."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from policy_split_jax.config import RunConfig
from policy_split_jax.evaluation.evaluate import make_scorer, scored_at_once
from policy_split_jax.model import qwen3
from policy_split_jax.model.sharding import batch_shards, placed, replicated
from policy_split_jax.objective.scorer import Places
from policy_split_jax.sampler import batcher, engine
from policy_split_jax.sampler.sampling import SamplingSettings
from policy_split_jax.training.accumulate import Microbatches
from policy_split_jax.training.batch import Batch, Packing, SharedView
from policy_split_jax.training.loop import update_config
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.state import init_state, state_shardings
from policy_split_jax.training.update import UpdateConfig, make_update

PACKED = 0.9
"""The share of packed rows that holds tokens, where lengths vary (docs/scaling.md)."""

Phase = Literal["rollout", "update", "score"]


@dataclass(frozen=True)
class Program:
    """A jitted function and the abstract arguments that it is compiled for."""

    name: str
    phase: Phase
    run: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    calls: float = 0.0
    """How often a training step calls it."""
    trips: int = 1
    """How often its loop runs whose count the program does not say."""
    besides: tuple[Any, ...] = ()
    """What else lies in memory meanwhile: trees of abstract arrays with shardings."""


@dataclass(frozen=True)
class Workload:
    """How much there is to do in a training step."""

    rollouts: int
    mean_response: float
    """Tokens."""
    mean_prompt: float


def programs(config: RunConfig, model: qwen3.Qwen3Config, mesh: Mesh, work: Workload) -> list[Program]:
    """All programs of a run, for the longest prompts and responses."""
    state = abstract_state(config, model, mesh)
    return [*_rollout(config, model, mesh, state, work), _score(config, model, mesh, state.params),
            update_program(config, update_config(config), model, mesh, state, work)]  # fmt: skip


def abstract_state(config: RunConfig, model: qwen3.Qwen3Config, mesh: Mesh) -> Any:
    """The training state's shapes, and where they lie."""
    optimizer = make_optimizer(config.optimizer)
    shapes = jax.eval_shape(partial(init_state, optimizer=optimizer, seed=0, eta=0.1), qwen3.abstract_params(model))
    return placed(shapes, state_shardings(model, optimizer, mesh))


def _rollout(config: RunConfig, model: qwen3.Qwen3Config, mesh: Mesh, state: Any, work: Workload) -> list[Program]:
    rollout, dtype = config.rollout, jnp.dtype(config.model.dtype)
    capacity = rollout.max_prompt_tokens + rollout.max_new_tokens
    at, cast = {"config": model, "mesh": mesh}, {"config": model, "dtype": dtype, "mesh": mesh}
    weights = _result(qwen3.sampling_weights, state.params, **cast)

    def slots_of(length: int) -> Any:
        return _result(engine.init_state, model, rollout.slots, length, rollout.max_new_tokens, dtype, mesh)

    slots, integers = slots_of(capacity), partial(_whole, mesh, jnp.int32)
    rows = batcher.prefill_rows(rollout.max_prompt_tokens)
    nothing = jax.tree.map(
        lambda leaf: _whole(mesh, leaf.dtype, *leaf.shape), jax.eval_shape(lambda: engine.no_prefix(model, dtype))
    )
    prefill = (weights, integers(rows, rollout.max_prompt_tokens), integers(rows), nothing)
    prefix = _result(engine.prefill, *prefill, **at)
    prompts = len(config.modes) * rollout.questions_per_step
    count = batcher.insertion_size(config.rollouts // len(config.modes), rollout.slots)
    # The slots are full until no rollout waits; then the last ones run to the end.
    steps = work.rollouts * work.mean_response / rollout.slots + rollout.max_new_tokens - work.mean_response
    steps_a_call = rollout.decode_steps
    insert = (prefix, slots, integers(count), integers(count), _slot_request(mesh, count))
    return [
        Program("cast weights", "rollout", qwen3.sampling_weights, (state.params,), cast, 1.0, 1, (state.opt_state,)),
        Program(f"prefill {rows} x {rollout.max_prompt_tokens}", "rollout", engine.prefill, prefill, at,
                prompts / rows, 1, (state, slots)),
        Program("insert", "rollout", engine.insert, insert, {"mesh": mesh}, float(prompts), 1, (state, weights)),
        Program("grow a layer's cache", "rollout", engine.resize, (slots_of(capacity // 2).cache[0], capacity),
                {"mesh": mesh}, float(model.num_layers), 1, (state, weights, slots.cache[1:])),
        Program(f"generate {steps_a_call} steps", "rollout", engine.generate, (weights, slots, integers(4)),
                {"steps": steps_a_call, **at}, steps / steps_a_call, steps_a_call, (state,)),
    ]  # fmt: skip


def _slot_request(mesh: Mesh, count: int) -> engine.SlotRequest:
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    floats, integers = (_whole(mesh, dtype, count) for dtype in (jnp.float32, jnp.int32))
    return engine.SlotRequest(
        _whole(mesh, keys.dtype, *keys.shape), SamplingSettings(floats, integers, floats), integers
    )


def _score(config: RunConfig, model: qwen3.Qwen3Config, mesh: Mesh, params: Any) -> Program:
    """Evaluations score as few rollouts at once as all devices can share."""
    scorer = make_scorer(model, dtype=config.model.dtype, chunk=config.train.score_chunk, mesh=mesh)
    questions, rollouts = scored_at_once(2 * config.eval.k, 2 * _longest(config), batch_shards(mesh))
    return Program("score", "score", scorer.run, (params, _batch(config, mesh, questions, rollouts)))


def update_program(
    config: RunConfig, settings: UpdateConfig, model: qwen3.Qwen3Config, mesh: Mesh, state: Any, work: Workload
) -> Program:
    """The update of a run's batch, packed where the run packs."""
    rollout, train = config.rollout, config.train
    group = config.rollouts
    batch = _batch(config, mesh, rollout.questions_per_step, group)
    if not config.sharing.exact:
        shared = SharedView(batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
        batch = batch._replace(shared=shared)
    update = make_update(model, settings, make_optimizer(config.optimizer), mesh)
    if not train.microbatch_rows:
        return Program("update", "update", update, (state, batch), calls=1.0)
    updates = train.updates_per_step
    questions = rollout.questions_per_step // updates
    integers = partial(_whole, mesh, jnp.int32)
    places = integers(updates, questions, group)
    packing = Packing(
        Microbatches(integers(updates, questions, min(questions, train.microbatch_rows)), integers(updates)),
        Places(places, places, train.microbatch_rows, _longest(config)),
    )
    tokens = work.rollouts / updates * (work.mean_prompt + work.mean_response)
    trips = math.ceil(tokens / (PACKED * train.microbatch_rows * _longest(config)))
    return Program("update", "update", update, (state, batch, packing), calls=1.0, trips=trips)


def _longest(config: RunConfig) -> int:
    """Tokens of the longest sequence."""
    return config.rollout.max_prompt_tokens + config.rollout.max_new_tokens


def _batch(config: RunConfig, mesh: Mesh, questions: int, group: int) -> Batch:
    prompt, new = config.rollout.max_prompt_tokens, config.rollout.max_new_tokens
    integers, floats, flags = (partial(_whole, mesh, dtype) for dtype in (jnp.int32, jnp.float32, jnp.bool_))
    shape = (questions, group)
    return Batch(
        prompts=integers(questions, 2, prompt),
        prompt_lengths=integers(questions, 2),
        responses=integers(*shape, new),
        response_lengths=integers(*shape),
        modes=integers(*shape),
        truncated=flags(*shape),
        rewards=floats(*shape),
        graded=flags(*shape),
        sampler_logprobs=floats(*shape, new),
    )


def _whole(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))


def _result(run: Any, *arguments: Any, **keywords: Any) -> Any:
    """What a jitted function returns, abstract, lying where the compiler puts it."""
    lowered = run.lower(*arguments, **keywords)
    return placed(lowered.out_info, lowered.compile().output_shardings)
