"""Model folders as they should not be: a clear error, nothing executed, no memory that only a header asks for."""

import json
import math
import pickle
import random
import resource
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from policy_split_jax.cli import main
from policy_split_jax.errors import UserError
from policy_split_jax.model import huggingface
from policy_split_jax.policy import load_model, load_policy, model_folder

EMBEDDED = model_folder("embedded")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXT_FILES = ("config.json", "generation_config.json", "policy_split.json", "tokenizer.json", "tokenizer_config.json")
unhurried = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Loads what a first model loads, so that it counts as nobody's memory."""
    load_model("embedded")


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(EMBEDDED, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(folder) -> Path:
    """The same model in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    files = {name: f"{at % 2}.safetensors" for at, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    (folder / WEIGHTS).unlink()
    return folder


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def header_of(content: bytes) -> int:
    """Where a safetensors file's header ends."""
    return 8 + int.from_bytes(content[:8], "little")


def claim(size: int):
    def change(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + content[8:])

    return change


def claim_tensor(shape: list[int], end: int):
    """A header of one tensor that would lie far beyond the file's end."""

    def change(folder: Path) -> None:
        described = {"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        header = json.dumps(described).encode()
        (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))

    return change


def cut(share: float):
    def change(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])

    return change


def configured(**changes: object):
    return lambda folder: change_json(folder / "config.json", **changes)


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "ran")))


def pickle_in_its_place(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(folder / "ran")))


def remote_code(file: str):
    """Code that would leave a mark, and a file that asks for it."""

    def change(folder: Path) -> None:
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Model: pass\n")
        kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        change_json(folder / file, auto_map=dict.fromkeys(kinds, "evil.Model"))

    return change


def template(text: str):
    return lambda folder: change_json(folder / "tokenizer_config.json", chat_template=text)


DEEP = "[" * 10**5
BAD_FOLDERS = {
    "pickle": (only_pickle, "only safetensors weights are read"),
    "pickle under the name": (pickle_in_its_place, "not a complete safetensors file"),
    "missing": (lambda folder: change_tensors(folder, **{"model.norm.weight": None}), "missing tensors model.norm"),
    "extra": (lambda folder: change_tensors(folder, x=np.ones(3, np.float32)), "unexpected tensors x"),
    "shape": (lambda folder: change_tensors(folder, **{"model.norm.weight": np.ones(7, np.float32)}), "wrong shapes"),
    "integers": (
        lambda folder: change_tensors(folder, **{"model.norm.weight": np.ones(96, np.int32)}),
        "only F32, BF16, F16 weights are read",
    ),
    "empty": (cut(0), "not a complete safetensors file"),
    "cut in the header": (cut(0.001), "not a complete safetensors file"),
    "cut in the middle": (cut(0.5), "not a complete safetensors file"),
    "cut at the end": (cut(0.9999), "not a complete safetensors file"),
    "a header of 8 EiB": (claim(1 << 63), "not a complete safetensors file"),
    "a header of 1 TiB": (claim(1 << 40), "not a complete safetensors file"),
    "a header of 99 MB": (claim(99_000_000), "not a complete safetensors file"),
    "a tensor of 1 TiB": (claim_tensor([1 << 38], 1 << 40), "not a complete safetensors file"),
    "sizes that overflow": (claim_tensor([1 << 40, 1 << 40], 64), "not a complete safetensors file"),
    "unknown architecture": (configured(architectures=["LlamaForCausalLM"]), "only Qwen3ForCausalLM is supported"),
    "unknown type": (configured(model_type="qwen3_moe"), "only 'qwen3' (dense) is supported"),
    "code for the model": (remote_code("config.json"), "auto_map is set; remote code is never run"),
    "code for the tokenizer": (remote_code("tokenizer_config.json"), "auto_map is set; remote code is never run"),
    "many layers": (configured(num_hidden_layers=10**9, layer_types=None), "num_hidden_layers is 1000000000, and no"),
    "a wide model": (configured(hidden_size=10**15), "hidden_size is 1000000000000000, and no model"),
    "a size of 400 digits": (configured(vocab_size=10**400), "vocab_size is 1000"),
    "a base of 400 digits": (configured(rope_theta=10**400, rope_parameters=None), "rope_theta must be a positive"),
    "a small vocabulary": (configured(vocab_size=200), "token 359 of the tokenizer or the stop tokens is beyond"),
    "an end beyond it": (
        lambda folder: change_json(folder / "generation_config.json", eos_token_id=10**30),
        "is beyond config.json's vocab_size 360",
    ),
    "a template that fails": (template("{{ 1 / 0 }}"), "its chat template fails (division by zero)"),
    "a template that is none": (template("{% for %}"), "its chat template fails (Expected an expression"),
    "a template that escapes": (template("{{ ''.__class__.__mro__ }}"), "is unsafe"),
    "a template without system": (template("{{ messages[-1].content }}"), "leaves out the question or the system turn"),
    "a template without question": (template("{{ messages[0].role }}"), "leaves out the question or the system turn"),
    "a prompt that is no text": (
        lambda folder: change_json(folder / "policy_split.json", high_entropy=5),
        "policy_split.json: high_entropy is 5: input should be a valid string",
    ),
    "a prompt without question": (
        lambda folder: change_json(folder / "policy_split.json", question_template="?"),
        "policy_split.json: question_template must contain {question}",
    ),
    "an unknown prompt": (
        lambda folder: change_json(folder / "policy_split.json", high_entropie="x"),
        "policy_split.json: unknown key high_entropie",
    ),
    **{
        f"{name} nested deeply": (lambda folder, name=name: (folder / name).write_text(DEEP), "recursion")
        for name in TEXT_FILES
    },
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_is_one_line_and_nothing_runs(kind, folder, tmp_path, capsys):
    change, message = BAD_FOLDERS[kind]
    change(folder)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Make 35 from 3, 5, 4."}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["sample", "--model", str(folder), "--prompts", str(questions)]) == 2
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    out, error = capsys.readouterr()
    ours = [line for line in error.splitlines() if not line.startswith("[transformers]")]
    assert out == ""
    assert len(ours) == 1
    assert ours[0].startswith(f"policy-split: error: {folder}")
    assert message in ours[0]
    assert not (folder / "ran").exists()
    assert grown < 64_000, f"{grown} KiB more"


ELSEWHERE = ["../0.safetensors", "/0.safetensors", "a/../0.safetensors", "..", "\ud800.safetensors", "0\n.safetensors"]


@pytest.mark.parametrize("file", [*ELSEWHERE, "0.bin", None])
def test_an_index_that_points_elsewhere(file, sharded, tmp_path, capsys):
    shutil.copy(sharded / "0.safetensors", tmp_path)
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    change_json(sharded / INDEX, weight_map={**weight_map, "model.norm.weight": file})
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "q"}\n')
    assert main(["sample", "--model", str(sharded), "--prompts", str(questions)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"policy-split: error: {sharded / INDEX}: model.norm.weight points to ")
    assert error.count("\n") == 1


# Damage by chance ---------------------------------------------------------------------------------------------------

_SYNTAX = b'0123456789{}[]",:-.eE\\'


def damaged(content: bytes, draw: random.Random, end: int) -> bytes:
    """A few bits or characters changed before `end`, characters put in, or all cut off behind a place there."""
    spoiled = bytearray(content)
    kind = draw.randrange(4)
    if kind == 0:
        return content[: draw.randrange(end)]
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(end)
        if kind == 1:
            spoiled[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            spoiled[place] = draw.choice(_SYNTAX)
        else:
            spoiled[place:place] = bytes(draw.choices(_SYNTAX, k=draw.choice((1, 3, 400))))
    return bytes(spoiled)


def outcome(load, folder: Path) -> str:
    """What became of a folder; any other exception than UserError is the test's failure."""
    try:
        load(folder)
    except UserError:
        return "refused"
    return "loaded"


def load_weights(folder: Path) -> None:
    """What loads must be the model: damage to names, shapes and places that goes unseen would be another one."""
    jax.tree.map(np.testing.assert_array_equal, huggingface.load_params(folder), huggingface.load_params(EMBEDDED))


def spoil(folder: Path, name: str, draw: random.Random) -> str:
    content = (folder / name).read_bytes()
    end = header_of(content) if name.endswith(".safetensors") else len(content)
    (folder / name).write_bytes(damaged(content, draw, end))
    try:
        return outcome(load_weights if "safetensors" in name else load_policy, folder)
    finally:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", [*TEXT_FILES, WEIGHTS])
@unhurried
@given(seed=st.integers(0, 2**32))
def test_damage_is_refused_or_harmless(name, seed, folder_that_stays):
    spoil(folder_that_stays, name, random.Random(seed))


@unhurried
@given(seed=st.integers(0, 2**32))
def test_damage_of_an_index_is_refused_or_harmless(seed, sharded_that_stays):
    spoil(sharded_that_stays, INDEX, random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TEXT_FILES, WEIGHTS])
def test_a_thousand_damaged_files(name, folder_that_stays, figure):
    draw = random.Random(0)
    found = Counter(spoil(folder_that_stays, name, draw) for _ in range(1000))
    figure(f"{name}: {found['refused']} of 1,000 refused, {found['loaded']} loaded")
    assert found["refused"] > 500


@pytest.mark.slow
def test_a_thousand_damaged_indices(sharded_that_stays, figure):
    draw = random.Random(0)
    found = Counter(spoil(sharded_that_stays, INDEX, draw) for _ in range(1000))
    figure(f"{INDEX}: {found['refused']} of 1,000 refused, {found['loaded']} loaded")
    assert found["refused"] > 500


@pytest.mark.slow
def test_a_file_cut_off_anywhere(folder_that_stays):
    """At two hundred places of the whole file, its data included."""
    content = (folder_that_stays / WEIGHTS).read_bytes()
    try:
        for at in range(200):
            (folder_that_stays / WEIGHTS).write_bytes(content[: math.floor(at / 200 * len(content))])
            with pytest.raises(UserError, match="not a complete safetensors file"):
                huggingface.load_params(folder_that_stays)
    finally:
        (folder_that_stays / WEIGHTS).write_bytes(content)


@pytest.fixture
def folder_that_stays(folder) -> Path:
    assert load_model(str(folder))
    return folder


@pytest.fixture
def sharded_that_stays(sharded) -> Path:
    load_weights(sharded)
    return sharded
