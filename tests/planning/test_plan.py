"""Plans with this machine's own device in place of a TPU, and with the compilers of TPUs and GPUs where installed."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from policy_split_jax import cli
from policy_split_jax.errors import UserError
from policy_split_jax.model.huggingface import load_config
from policy_split_jax.planning import plan as planning
from policy_split_jax.planning.chips import CHIPS, GIB, Chip
from policy_split_jax.policy import model_folder

TINY = "configs/tiny.yaml"
SMALL = ["rollout.questions_per_step=4", "rollout.slots=8", "eval.k=2"]


@pytest.fixture
def here(monkeypatch):
    """The devices of this machine, as a chip of round figures."""
    monkeypatch.setattr(planning, "devices_of", lambda topology: jax.devices()[:1])
    monkeypatch.setitem(CHIPS, "toy", Chip("toy", 1e12, GIB, 1e11, 1e10, "nowhere"))


def run(capsys, *options):
    code = cli.main(["plan", TINY, "--topology", "toy:1", *SMALL, *options])
    return code, capsys.readouterr()


def test_a_plan_that_fits(here, capsys):
    code, shown = run(capsys, "--json", "--mean-response", "6")
    found = json.loads(shown.out)
    assert code == 0
    assert found["fits"]
    assert found["remedies"] == []
    programs = {program["name"].split()[0]: program for program in found["programs"]}
    assert list(programs) == ["cast", "prefill", "insert", "grow", "generate", "score", "update"]
    sizes = load_config(model_folder("embedded"))
    parameters = found["model_parameters"]
    # float32, and twice as much for the moments, whose count is one number; in four layers, 8 slots of 42 tokens.
    assert found["state"]["parameters"] == 4 * parameters
    assert found["state"]["optimizer"] == pytest.approx(8 * parameters, abs=64)
    cache = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * 8 * 42 * 4
    assert found["state"]["cache"] == cache
    # A product for every weight, the embedding being the head; 4 steps of 8 slots, each over 42 positions and 4 recent.
    steps, slots = 4, 8
    attention = 4 * (42 + steps) * sizes.num_heads * sizes.head_dim * sizes.num_layers
    norms = sizes.hidden_size * (2 * sizes.num_layers + 1) + 2 * sizes.head_dim * sizes.num_layers
    assert programs["generate"]["flops"] == steps * slots * (2 * (parameters - norms) + attention)
    # 32 rollouts of 6 tokens in 8 slots, and 4 steps until the last has made its 10.
    assert programs["generate"]["calls"] == (32 * 6 / 8 + 4) / 4
    for program in found["programs"]:
        assert program["total"] >= program["arguments"] + program["temporaries"] + program["besides"]
        assert program["seconds"] == pytest.approx(
            max(program["flops"] / 1e12, program["memory_traffic"] / 1e11, sum(program["collectives"].values()) / 1e10)
        )
    assert found["step_seconds"]["update"] == programs["update"]["seconds"]


@pytest.mark.slow
def test_packed_rows_cost_what_the_mean_response_costs(here, capsys):
    flops = []
    for mean in (2, 10):
        _, shown = run(capsys, "--json", "--mean-response", str(mean), "train.microbatch_questions=0",
                       "train.microbatch_rows=8")  # fmt: skip
        flops.append(json.loads(shown.out)["programs"][-1]["flops"])
    # 32 sequences of 34 or 42 tokens: four or five microbatches of eight rows of 42.
    assert flops[1] / flops[0] == pytest.approx(5 / 4, rel=0.01)


def test_the_tables_say_what_the_json_says(here, capsys):
    code, shown = run(capsys, "--mean-response", "6")
    assert code == 0
    for words in ("generate 4 steps", "Memory of one device", "a step at best", "It fits:", "bfloat16"):
        assert words in shown.out, words


@pytest.mark.parametrize(
    ("memory", "setting"),
    [(1 << 20, "Parameters and optimizer alone are too large"), (14 << 20, "Set train.microbatch_questions=1")],
)
def test_a_plan_that_does_not_fit_says_what_to_change(here, monkeypatch, capsys, memory, setting):
    monkeypatch.setitem(CHIPS, "toy", Chip("toy", 1e12, memory, 1e11, 1e10, "nowhere"))
    code, shown = run(capsys)
    assert code == 1
    assert "does not fit" in " ".join(shown.out.split())
    assert setting in " ".join(shown.out.split())


@pytest.mark.slow
def test_fewer_slots_are_as_many_as_fit(here, monkeypatch, capsys):
    """The remedy, followed, helps."""
    monkeypatch.setitem(CHIPS, "toy", Chip("toy", 1e12, 40 << 20, 1e11, 1e10, "nowhere"))
    big = ["rollout.slots=512", "train.microbatch_questions=1"]
    code, shown = run(capsys, "--json", *big)
    [remedy] = json.loads(shown.out)["remedies"]
    assert code == 1
    slots = int(remedy.split("rollout.slots=")[1].split(",")[0])
    assert 0 < slots < 512
    code, shown = run(capsys, "--json", *big, f"rollout.slots={slots}")
    assert (code, json.loads(shown.out)["remedies"]) == (0, [])


def test_a_program_that_the_compiler_refuses_does_not_fit(here, monkeypatch, capsys):
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.99G) "
                "exceeds available HBM (15.75G)."
            )

    monkeypatch.setattr(planning, "count_flops", lambda *unused: 8)
    traced = type("Traced", (), {"jaxpr": type("Closed", (), {"jaxpr": None}), "lower": lambda self: Refused()})
    run = type("Run", (), {"trace": lambda self: traced()})
    mesh = Mesh(np.asarray(jax.devices()[:1] * 4), ("data",))
    found = planning.plan_program(planning.Program("update", "update", run(), ()), CHIPS["toy"], mesh)
    assert found.temporaries == int(18.99 * GIB)
    assert found.total > CHIPS["toy"].memory
    assert found.flops == 2


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v9:2x2", "no figures of 'v9'"),
        ("v5e:nonsense", "cannot be compiled for"),
        ("h100:many", "needs policy-split-jax[cuda] and a number of GPUs"),
    ],
)
def test_a_topology_that_is_none_is_refused(topology, words, capsys):
    assert cli.main(["plan", TINY, "--topology", topology]) == 2
    assert words in capsys.readouterr().err


def test_settings_that_the_devices_cannot_share_are_refused(here):
    from policy_split_jax import config as settings
    from policy_split_jax.config import RunConfig

    config = settings.load(RunConfig, TINY, ["mesh.tp=2"])
    with pytest.raises(UserError, match="there are 1 devices"):
        planning.make_plan(config, "toy:1")


def test_published_sizes_are_known_by_name():
    assert planning.model_config("/models/Qwen3-1.7B").hidden_size == 2048
    assert planning.model_config("Qwen/Qwen3-8B/").tie_embeddings is False
    assert planning.model_config("embedded") == load_config(model_folder("embedded"))
    with pytest.raises(UserError, match=r"no config\.json there"):
        planning.model_config("/models/Qwen3-170B")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs policy-split-jax[tpu]")
def test_a_tpus_compiler_makes_a_plan(capsys):
    """Eight chips of two processes, splash attention, packed rows."""
    settings = ["model.dtype=bfloat16", "train.microbatch_questions=0", "train.microbatch_rows=8"]
    assert cli.main(["plan", TINY, "--topology", "v5e:2x4", "--json", *settings]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tp": 1}
    assert found["programs"][-1]["collectives"]["all-gather"] > 0


@pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="needs policy-split-jax[cuda]",
)
@pytest.mark.parametrize(("topology", "rows"), [("h100:2", 8), ("h100:2x2", 8)])
def test_a_gpus_compiler_makes_a_plan(topology, rows, capsys):
    """On one machine and on two; cuDNN's attention in packed rows."""
    settings = ["model.dtype=bfloat16", "train.microbatch_questions=0", f"train.microbatch_rows={rows}"]
    assert cli.main(["plan", TINY, "--topology", topology, "--json", *settings]) == 0
    found = json.loads(capsys.readouterr().out)
    devices = 2 if topology == "h100:2" else 4
    assert found["mesh"] == {"data": 1, "fsdp": devices, "tp": 1}
    update = found["programs"][-1]
    assert update["collectives"]["all-gather"] > 0
    # The weights' products alone: 6 operations a parameter and token, without what cuDNN does.
    trips = -(-512 * (5 + 32) // int(0.9 * rows * 42))
    assert update["flops"] * devices > 6 * found["model_parameters"] * 2 * rows * 42 * trips
