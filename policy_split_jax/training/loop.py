"""The training loop: questions, rollouts of both modes, rewards, one jitted update, logs and checkpoints."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

import policy_split_jax
from policy_split_jax import config as settings
from policy_split_jax import processes
from policy_split_jax.config import RunConfig
from policy_split_jax.data.dataset import load_rows, make_iterator, restore_state, state_to_json
from policy_split_jax.data.formats import Row
from policy_split_jax.dump import dump_rows
from policy_split_jax.errors import UserError
from policy_split_jax.evaluation.evaluate import (
    Scorer,
    answer,
    make_scorer,
    outcome_metrics,
    sample_rows,
    scored_metrics,
    scored_sample_rows,
)
from policy_split_jax.files import whole_file, write_json
from policy_split_jax.model import qwen3
from policy_split_jax.model.huggingface import load_params
from policy_split_jax.model.sharding import batch_shards, make_mesh
from policy_split_jax.objective.eta import lowered
from policy_split_jax.policy import Policy, load_policy, model_folder
from policy_split_jax.report.groups import Named
from policy_split_jax.report.page import write_report
from policy_split_jax.rewards import GraderPool
from policy_split_jax.rollouts import (
    Group,
    Progress,
    check_prompts,
    grade_groups,
    group_batch,
    sample_groups,
    shared_groups,
    step_key,
    without_long_prompts,
)
from policy_split_jax.sampler.batcher import EngineConfig, Sampling
from policy_split_jax.sampler.rollout import Sampler
from policy_split_jax.training.checkpoint import (
    DAMAGED,
    Checkpoints,
    Json,
    latest_step,
    load_checkpoint_params,
    load_run_policy,
)
from policy_split_jax.training.collate import SharedGroup
from policy_split_jax.training.console import RunDisplay
from policy_split_jax.training.guard import Guard, watch
from policy_split_jax.training.metrics_log import MetricsLog
from policy_split_jax.training.optimizer import make_optimizer, next_rate
from policy_split_jax.training.packing import pack_batch
from policy_split_jax.training.run_folder import check_folder, identity, locked, make_folder, renew_folder
from policy_split_jax.training.state import TrainState, init_state, state_shardings
from policy_split_jax.training.stop import Stopped, StopRequests
from policy_split_jax.training.update import Update, UpdateConfig, make_update


@dataclass(frozen=True)
class Position:
    """How far a run has come; with the train state, all that it goes on from."""

    step: int = 0
    data: Json | None = None
    """The iterator's position; None at the beginning."""
    evaluated: bool = False
    """Whether the evaluation that is due at this step is done."""
    guard: Guard = field(default_factory=Guard)

    def to_json(self) -> Json:
        return {"data": self.data, "evaluated": self.evaluated, "guard": self.guard.to_json()}

    @staticmethod
    def from_json(step: int, extra: Json) -> "Position":
        return Position(step, extra["data"], extra["evaluated"], Guard(**extra["guard"]))


@dataclass
class Trainer:
    """The parts of a run; `state`, `iterator` and `position` are what changes."""

    config: RunConfig
    policy: Policy
    sampler: Sampler
    scorer: Scorer
    update: Update
    pool: GraderPool
    test_rows: list[Row]
    iterator: Any
    state: TrainState
    position: Position
    checkpoints: Checkpoints
    log: MetricsLog | None
    """None in all processes but the first."""
    display: RunDisplay
    stop: StopRequests

    def run(self) -> None:
        """All remaining steps; evaluates, saves and logs as configured. Raises Stopped, with all that was done saved,
        where it was asked to stop."""
        try:
            self._run()
        except Stopped as stopped:
            stopped.step = self.position.step
            if stopped.step:
                self._save()
            raise

    def _run(self) -> None:
        if not self.position.evaluated:
            self.evaluate(self.position.step)
        for step in range(self.position.step + 1, self.config.train.steps + 1):
            self.step(step)
            if not self.position.evaluated:
                self.evaluate(step)
            if self._last(step) or _due(step, self.config.train.save_every):
                self._save()

    def _last(self, step: int) -> bool:
        return step == self.config.train.steps

    def _save(self) -> None:
        if self.log is not None:
            # Where the machine is lost, no checkpoint is there without the rows before it.
            self.log.sync()
        self.checkpoints.save(self.position.step, self.state, self.position.to_json())

    def step(self, step: int) -> None:
        """One training step: sample, grade, update, log. Stopped is raised before the update alone."""
        clock = _Clock()
        rows = [question.row for question in next(self.iterator)]
        groups = self._rollouts(rows)
        clock.lap("rollout")
        grade_groups(self.pool, groups)
        self.stop.check()
        clock.lap("reward")
        shared = shared_groups(self.policy, groups, self.config.sharing, self.config.rollout.max_new_tokens)
        rate = next_rate(self.config.optimizer, self.state.opt_state)
        self.state, metrics = self._update(groups, shared)
        clock.lap("update")
        row = outcome_metrics(groups) | metrics | clock.times()
        row["tokens/rollout"] = sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
        row["learning_rate"] = rate
        self._log("train", step, row, sample_rows(groups[: self.config.train.sample_questions]))
        for wanted, folder in ((self.config.train.dump_rollouts, "rollouts"), (row["skipped"], "skipped")):
            if wanted and self.log is not None:
                self._dump(folder, step, groups, shared)
        self.display.step(step, row)
        self.display.grader_errors(groups)
        guard = self._watch(step, row)
        due = self._last(step) or _due(step, self.config.train.eval_every)
        self.position = Position(step, state_to_json(self.iterator), not due, guard)

    def _watch(self, step: int, row: Mapping[str, Any]) -> Guard:
        """What the guard says of a step is said and done; UserError where that is to end the run."""
        guard, findings = watch(self.position.guard, row, self.config.guard)
        for finding in findings:
            self.display.say(f"warning: {finding.text}")
        if any(finding.action == "lower_eta" for finding in findings):
            self.state = self.state._replace(eta=lowered(self.state.eta))
        if ending := [finding.text for finding in findings if finding.action == "stop"]:
            raise UserError(f"{self.config.folder}: stopped at step {step}: {ending[0]}")
        return guard

    def evaluate(self, step: int) -> None:
        """Both modes on the test questions."""
        chosen = self.config.eval
        with self.display.phase("evaluate", len(self.test_rows) * 2 * chosen.k) as progress:
            started = time.perf_counter()
            groups, scores = answer(
                self.state.params,
                self.policy,
                self.sampler,
                self.scorer,
                self.pool,
                self.test_rows,
                k=chosen.k,
                key=jax.random.key(chosen.seed),
                sampling=Sampling(
                    chosen.max_new_tokens or self.config.rollout.max_new_tokens,
                    chosen.temperature,
                    chosen.top_k,
                    chosen.top_p,
                ),
                progress=self._stoppable(progress),
            )
            row = scored_metrics(groups, scores, chosen.k) | {"time/eval": time.perf_counter() - started}
        self._log("eval", step, row, scored_sample_rows(groups[:8], scores[:8], self.policy.pieces))
        self.display.evaluation(step, row)
        self.position = replace(self.position, evaluated=True)

    def _stoppable(self, progress: Progress) -> Progress:
        """`progress`, which raises Stopped where the run was asked to stop."""

        def report(finished: int) -> None:
            self.stop.check()
            progress(finished)

        return report

    def _log(self, kind: str, step: int, row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        if self.log is not None:
            self.log.row(kind, step, row)
            self.log.samples(kind, step, samples)

    def _dump(self, name: str, step: int, groups: Sequence[Group], shared: Sequence[SharedGroup] | None) -> None:
        """The step's rollouts, in a file of their own."""
        folder = self.config.folder / name
        folder.mkdir(exist_ok=True)
        with whole_file(folder / f"{step}.jsonl") as file:
            for row in dump_rows(self.policy, groups, shared, step):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _rollouts(self, rows: Sequence[Row]) -> list[Group]:
        rollout = self.config.rollout
        modes, each = self.config.modes, self.config.rollouts
        with self.display.phase("rollouts", len(rows) * each) as progress:
            return sample_groups(
                self.state.params,
                self.policy,
                self.sampler,
                rows,
                per_mode=each // len(modes),
                key=step_key(_own_key(self.state.key), int(self.state.step)),
                sampling=Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p),
                modes=modes,
                progress=self._stoppable(progress),
            )

    def _update(
        self, groups: Sequence[Group], shared: Sequence[SharedGroup] | None
    ) -> tuple[TrainState, dict[str, Any]]:
        rollout, chosen = self.config.rollout, self.config.train
        batch = group_batch(
            groups,
            max_prompt_tokens=rollout.max_prompt_tokens,
            max_new_tokens=rollout.max_new_tokens,
            shared=shared,
        )
        if not chosen.microbatch_rows:
            state, metrics = self.update(self.state, batch)
            return state, jax.device_get(metrics)
        limit = rollout.max_prompt_tokens + rollout.max_new_tokens
        packing, share = pack_batch(batch, rows=chosen.microbatch_rows, limit=limit, updates=chosen.updates_per_step)
        state, metrics = self.update(self.state, batch, packing)
        return state, jax.device_get(metrics) | {"utilisation": share}


def _own_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The run's key as an array of this process alone, which every process has."""
    return jax.random.wrap_key_data(jax.device_get(jax.random.key_data(key)))


class _Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[f"time/{name}"] = now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        return self._laps | {"time/step": time.perf_counter() - self._start}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train(config: RunConfig, *, must_resume: bool = False) -> Path:
    """Runs or resumes the training that `config` describes; returns the run's folder.

    Everything that can be wrong with the settings, the data or the model is found before anything is written.
    Raises UserError for those, when the folder holds a run of other settings or is another run's at this moment, and
    when `must_resume` and there is nothing to resume; Stopped, when SIGTERM or Ctrl-C ended it, with all that was done
    saved.
    """
    folder = config.folder
    started_at = latest_step(folder / "checkpoints") or 0
    check_folder(config, started_at, must_resume)
    processes.check_same(
        started_at, f"{folder}: the processes see different checkpoints; output must lie where all of them reach it"
    )
    run = _prepare(config, started_at)
    reward = config.reward
    with (
        GraderPool(reward.grader, reward.workers, reward.time_limit, reward.memory_limit_mb) as pool,
        _own_folder(config, run.policy, started_at),
    ):
        whose = identity(config, run.policy, run.train_rows, run.test_rows)
        # Heard until the last checkpoint is written, which is when Checkpoints closes.
        with (
            StopRequests() as stop,
            Checkpoints(folder / "checkpoints", config.train.keep_checkpoints, whose) as checkpoints,
        ):
            state, position, damaged = _begin(run, checkpoints, started_at)
            if processes.is_first() and started_at:
                renew_folder(config, position.step)
            with (
                _log(config, position) as log,
                RunDisplay(config.train.steps, position.step, quiet=not processes.is_first()) as display,
            ):
                _announce(display, run, position.step, damaged)
                _trainer(
                    run, pool=pool, state=state, position=position, checkpoints=checkpoints, log=log, display=display,
                    stop=stop,
                ).run()  # fmt: skip
        if processes.is_first():
            _finish(folder, display)
    return folder


@dataclass(frozen=True)
class _Prepared:
    """What a run is made of, checked before anything is written."""

    config: RunConfig
    policy: Policy
    mesh: Mesh
    params: qwen3.Params
    """Of a run that goes on only the shapes."""
    train_rows: list[Row]
    test_rows: list[Row]
    skipped: int
    """Questions left out."""
    iterator: Any
    optimizer: optax.GradientTransformation


def _prepare(config: RunConfig, started_at: int) -> _Prepared:
    policy, mesh, params = _source(config, started_at)
    (train_rows, test_rows), skipped = _fitting(config, policy, _rows(config))
    iterator = make_iterator(train_rows, batch_size=config.rollout.questions_per_step, seed=config.train.seed)
    optimizer = make_optimizer(config.optimizer)
    return _Prepared(config, policy, mesh, params, train_rows, test_rows, skipped, iterator, optimizer)


def _begin(run: _Prepared, checkpoints: Checkpoints, started_at: int) -> tuple[TrainState, Position, Mapping[int, str]]:
    """Where the run goes on, or begins, and the checkpoints that were damaged; the iterator is put there."""
    config = run.config
    start = partial(init_state, optimizer=run.optimizer, seed=config.train.seed, eta=float(config.advantage.eta))
    shardings = state_shardings(run.policy.config, run.optimizer, run.mesh)
    if not started_at:
        return jax.jit(start, out_shardings=shardings)(run.params), Position(), {}
    found = checkpoints.restore(jax.eval_shape(start, run.params), shardings)
    restore_state(run.iterator, found.extra["data"])
    return found.state, Position.from_json(found.step, found.extra), found.damaged


def _trainer(run: _Prepared, **parts: Any) -> Trainer:
    """The trainer of a run; `parts` are those that its world gives it."""
    config, policy, mesh = run.config, run.policy, run.mesh
    return Trainer(
        config=config,
        policy=policy,
        sampler=_sampler(config, policy, mesh),
        scorer=make_scorer(policy.config, dtype=config.model.dtype, chunk=config.train.score_chunk, mesh=mesh),
        update=make_update(policy.config, update_config(config), run.optimizer, mesh),
        test_rows=run.test_rows,
        iterator=run.iterator,
        **parts,
    )


@contextmanager
def _own_folder(config: RunConfig, policy: Policy, started_at: int) -> Iterator[None]:
    """The run's folder, locked by the first process; a new one with what it begins with."""
    # Nobody writes before everybody has looked.
    processes.wait_for_all("checked")
    with locked(config, started_at) if processes.is_first() else nullcontext():
        if processes.is_first() and not started_at:
            make_folder(config, policy)
        processes.wait_for_all("folder")
        yield


def _log(config: RunConfig, position: Position) -> AbstractContextManager[MetricsLog | None]:
    if not processes.is_first():
        return nullcontext()
    return MetricsLog(
        config.folder,
        config.name,
        last_step=position.step or -1,
        evaluated=position.evaluated,
        tensorboard=config.train.tensorboard,
        wandb=config.train.wandb,
    )


def _source(config: RunConfig, started_at: int) -> tuple[Policy, Mesh, qwen3.Params]:
    """What the run starts from; of a run that goes on only the shapes, since its weights are in its checkpoint."""
    if started_at:
        policy = load_policy(config.folder / "model")
        return policy, run_mesh(config, policy.config, jax.devices()), qwen3.abstract_params(policy.config)
    policy = _first_policy(config)
    mesh = run_mesh(config, policy.config, jax.devices())
    shardings = qwen3.param_shardings(policy.config, mesh)
    if config.model.checkpoint:
        params = load_checkpoint_params(Path(config.model.checkpoint), policy, shardings)
    else:
        params = load_params(policy.folder, policy.config, shardings=shardings)
    return replace(policy, prompts=settings.mode_prompts(config.prompt)), mesh, params


def _first_policy(config: RunConfig) -> Policy:
    if config.model.checkpoint:
        return load_run_policy(Path(config.model.checkpoint))
    return load_policy(model_folder(config.model.path))


def run_mesh(config: RunConfig, model: qwen3.Qwen3Config, devices: Sequence[Any]) -> Mesh:
    """These devices, as the settings divide them; UserError where model or settings cannot be divided so."""
    rollout = config.rollout
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tp, devices)
        qwen3.param_shardings(model, mesh)
    except ValueError as error:
        raise UserError(str(error)) from None
    shards = batch_shards(mesh)
    questions = config.train.microbatch_questions or rollout.questions_per_step // config.train.updates_per_step
    rollouts = ("rollouts of a microbatch (train.microbatch_questions x 2 x rollout.rollouts_per_mode)",
                questions * config.rollouts)  # fmt: skip
    rows = ("train.microbatch_rows", config.train.microbatch_rows)
    for name, number in (("rollout.slots", rollout.slots), rows if config.train.microbatch_rows else rollouts):
        if number % shards:
            raise UserError(f"{name}: {number} is not a multiple of {shards}, the mesh's data x fsdp")
    return mesh


def update_config(config: RunConfig) -> UpdateConfig:
    """What of a run's settings the update needs."""
    return UpdateConfig(
        objective=config.objective,
        baseline=config.baseline,
        advantage=config.advantage,
        eta=config.eta,
        share=config.sharing.rollouts == "all",
        importance_cap=config.sharing.importance_cap,
        clip_low=config.loss.clip_low,
        clip_high=config.loss.clip_high,
        dual_clip=config.loss.dual_clip,
        aggregate=config.loss.aggregate,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        updates_per_step=config.train.updates_per_step,
        update_order=config.train.update_order,
        microbatch_questions=config.train.microbatch_questions,
        score_chunk=config.train.score_chunk,
        dtype=config.model.dtype,
        remat=config.model.remat,
    )


def _sampler(config: RunConfig, policy: Policy, mesh: Mesh) -> Sampler:
    rollout = config.rollout
    engine = EngineConfig(policy.config, policy.stop_ids, rollout.slots, rollout.decode_steps, config.model.dtype, mesh)
    return Sampler(engine, rollout.max_prompt_tokens)


def _rows(config: RunConfig) -> tuple[list[Row], list[Row]]:
    data = config.data

    def read(source: str, split: str, count: int) -> list[Row]:
        return load_rows(
            source,
            data,
            question_column=data.question_column,
            answer_column=data.answer_column,
            split=split,
            count=count,
        )

    train_rows = read(data.train, "train", data.train_size)
    test_rows = read(data.test, "test", data.test_size)
    return train_rows, test_rows[: config.eval.questions or None]


def _fitting(
    config: RunConfig, policy: Policy, splits: tuple[list[Row], list[Row]]
) -> tuple[tuple[list[Row], list[Row]], int]:
    """The rows whose prompts are short enough, and how many are not; UserError for those unless they are skipped."""
    limit, sharing = config.rollout.max_prompt_tokens, config.sharing
    if config.rollout.long_prompts == "error":
        for rows in splits:
            check_prompts(policy, rows, limit, sharing)
        return splits, 0
    train_rows, test_rows = (without_long_prompts(policy, rows, limit, sharing) for rows in splits)
    if not train_rows or not test_rows:
        raise UserError(f"no question has a prompt of at most {limit} tokens; raise rollout.max_prompt_tokens")
    return (train_rows, test_rows), sum(map(len, splits)) - len(train_rows) - len(test_rows)


def _announce(display: RunDisplay, run: _Prepared, started_at: int, damaged: Mapping[int, str]) -> None:
    """What begins, or goes on, and what the user should know of it."""
    config, mesh = run.config, run.mesh
    for step, reason in damaged.items():
        where = config.folder / "checkpoints" / DAMAGED
        display.say(f"warning: checkpoint {step} is damaged, now in {where}: {reason}")
    size = sum(leaf.size for leaf in jax.tree.leaves(qwen3.abstract_params(run.policy.config)))
    display.say(
        f"policy-split {policy_split_jax.__version__}: {config.folder}, Qwen3 of {size / 1e6:.2f} M parameters on "
        f"{_devices(mesh)}, {len(run.train_rows)} training and {len(run.test_rows)} test questions"
    )
    display.say(_rollouts_line(config, started_at))
    display.say("pairs of figures are normal, high-entropy")
    if run.skipped:
        display.say(f"{run.skipped} questions left out: more than {config.rollout.max_prompt_tokens} prompt tokens")
    repeated = sum(len(rows) - len({row.question for row in rows}) for rows in (run.train_rows, run.test_rows))
    if repeated:
        display.say(f"{repeated} questions repeat an earlier one of their file; they are kept")


def _rollouts_line(config: RunConfig, started_at: int) -> str:
    questions, each = config.rollout.questions_per_step, config.rollouts // len(config.modes)
    return (
        f"{questions} questions a step, {each} rollouts of each "
        + ("in each mode" if len(config.modes) > 1 else f"in the normal mode ({config.objective})")
        + (f"; preset {config.preset}" if config.preset != "paper" else "")
        + (f"; resuming after step {started_at}" if started_at else "")
    )


def _devices(mesh: Mesh) -> str:
    text = f"{mesh.size} {jax.default_backend()} device{'s' if mesh.size > 1 else ''}"
    if processes.several():
        text += f" of {jax.process_count()} processes"
    if mesh.size > 1:
        text += f" ({', '.join(f'{name} {size}' for name, size in mesh.shape.items())})"
    return text


def _finish(folder: Path, display: RunDisplay) -> None:
    """The table, summary.json and the report."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    steps = [row for row in rows if row["kind"] == "train"]
    start, end = evaluations[0], evaluations[-1]
    seconds = sum(row["time/step"] for row in steps) + sum(row["time/eval"] for row in evaluations)
    summary = {
        "steps": end["step"],
        "seconds": seconds,
        "versions": {"policy_split_jax": policy_split_jax.__version__, "jax": jax.__version__},
        "start": start,
        "end": end,
    }
    write_json(folder / "summary.json", summary)
    display.summary(start, end)
    report = write_report([Named(None, (str(folder),))], folder / "report.html")
    display.say(f"{end['step']} steps in {seconds / 60:.1f} minutes; report: {report}")
