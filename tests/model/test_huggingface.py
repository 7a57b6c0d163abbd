"""Model folders in and out; the oracle for layout and behaviour is transformers itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from policy_split_jax.errors import UserError
from policy_split_jax.model import huggingface, qwen3

VOCAB = 53
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLAT_CONFIG = {  # as transformers 4 wrote it
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 10,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 4096,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}


def make_oracle(tied: bool, dtype: str = "float32") -> Qwen3ForCausalLM:
    """A small random model of torch, its norms not one and its matrices not small."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=[2, 3],
        attn_implementation="eager",
    )
    oracle = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            spread = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(float("norm" in name) + spread * torch.randn(weight.shape))
    return oracle.to(DTYPES[dtype])


@pytest.fixture
def tied_folder(tmp_path) -> Path:
    folder = tmp_path / "tied"
    make_oracle(tied=True).save_pretrained(folder)
    return folder


@pytest.fixture
def untied_folder(tmp_path) -> Path:
    folder = tmp_path / "untied"
    make_oracle(tied=False).save_pretrained(folder)
    return folder


@pytest.fixture
def sharded_folder(tmp_path) -> Path:
    folder = tmp_path / "sharded"
    make_oracle(tied=False).save_pretrained(folder, max_shard_size="10KB")
    return folder


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def change_json(path: Path, **changes) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def rewrite_tensors(folder: Path, change) -> None:
    """Passes the tensors of `model.safetensors` through `change(tensors)`, which edits them in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def stored_bytes(folder: Path) -> dict[str, tuple]:
    """Type, shape and bytes of every tensor of a model folder, over all its files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                tensor = handle.get_tensor(name)
                found[name] = (handle.get_slice(name).get_dtype(), tensor.shape, tensor.tobytes())
    return found


# Configuration


def test_config_of_transformers_5(untied_folder):
    assert "rope_theta" not in json.loads((untied_folder / "config.json").read_text())
    assert huggingface.load_config(untied_folder) == qwen3.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_embeddings=False,
    )


def test_config_of_transformers_4(tmp_path):
    write_json(tmp_path / "config.json", {**FLAT_CONFIG, "rope_theta": 5e5})
    config = huggingface.load_config(tmp_path)
    assert (config.rope_theta, config.tie_embeddings, config.num_layers) == (5e5, True, 2)


@pytest.mark.parametrize("absent", [True, False])
def test_head_dim_defaults_to_an_equal_share(tmp_path, absent):
    content = {**FLAT_CONFIG, "head_dim": None}
    if absent:
        del content["head_dim"]
    write_json(tmp_path / "config.json", content)
    assert huggingface.load_config(tmp_path).head_dim == 6


def test_a_window_that_is_off_is_no_window(tmp_path):
    write_json(tmp_path / "config.json", {**FLAT_CONFIG, "sliding_window": 4096})
    assert huggingface.load_config(tmp_path).num_layers == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "qwen3_moe"),
        ("architectures", ["Qwen3ForSequenceClassification"]),
        ("architectures", None),
        ("hidden_act", "gelu"),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", 3),
        ("quantization_config", {"bits": 4}),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_scaling", "yarn"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}),
        ("rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"rope_theta": 1e4}),
        ("rope_theta", "big"),
        ("rope_theta", float("inf")),
        ("vocab_size", None),
        ("hidden_size", 24.0),
        ("num_hidden_layers", 0),
        ("num_attention_heads", True),
        ("num_key_value_heads", 3),
        ("head_dim", 9),
        ("rms_norm_eps", 0),
        ("tie_word_embeddings", "false"),
    ],
)
def test_config_refusals_name_file_and_key(tmp_path, key, value):
    path = write_json(tmp_path / "config.json", {**FLAT_CONFIG, key: value})
    # The model's own check of sizes that do not go together uses our name.
    spoken = "num_kv_heads" if key == "num_key_value_heads" else key
    with pytest.raises(UserError, match=spoken) as caught:
        huggingface.load_config(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_without_a_rotary_base_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {k: v for k, v in FLAT_CONFIG.items() if k != "rope_theta"})
    with pytest.raises(UserError, match=r"config\.json: rope_theta is missing"):
        huggingface.load_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[1]", "one JSON object"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_unreadable_config(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "config.json").write_bytes(content)
    elif content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        huggingface.load_config(tmp_path)


# Weights in


def test_every_weight_lands_where_the_equations_want_it(untied_folder):
    """Each kind of array against the torch weight itself, one hand-written rule for each."""
    tensors = {name: tensor.numpy() for name, tensor in load_file(untied_folder / "model.safetensors").items()}
    params = huggingface.load_params(untied_folder)
    layers, at = params["layers"], "model.layers.1."
    q = tensors[at + "self_attn.q_proj.weight"]
    k = tensors[at + "self_attn.k_proj.weight"]
    v = tensors[at + "self_attn.v_proj.weight"]
    o = tensors[at + "self_attn.o_proj.weight"]
    for head in range(4):
        np.testing.assert_array_equal(layers["attn"]["q"][1, :, head], q[10 * head : 10 * head + 10].T)
        np.testing.assert_array_equal(layers["attn"]["o"][1, head], o[:, 10 * head : 10 * head + 10].T)
    for head in range(2):
        np.testing.assert_array_equal(layers["attn"]["k"][1, :, head], k[10 * head : 10 * head + 10].T)
        np.testing.assert_array_equal(layers["attn"]["v"][1, :, head], v[10 * head : 10 * head + 10].T)
    for ours, theirs in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        np.testing.assert_array_equal(layers["mlp"][ours][1], tensors[f"{at}mlp.{theirs}.weight"].T)
    for ours, theirs in (("q_norm", "q_norm"), ("k_norm", "k_norm")):
        np.testing.assert_array_equal(layers["attn"][ours][1], tensors[f"{at}self_attn.{theirs}.weight"])
    for ours, theirs in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        np.testing.assert_array_equal(layers[ours]["scale"][1], tensors[f"{at}{theirs}.weight"])
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["final_norm"]["scale"], tensors["model.norm.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], tensors["lm_head.weight"].T)
    assert jax.tree.structure(params) == jax.tree.structure(
        qwen3.abstract_params(huggingface.load_config(untied_folder))
    )


def test_shards_hold_the_same_model(sharded_folder, untied_folder):
    assert len(list(sharded_folder.glob("*.safetensors"))) > 3
    sharded, whole = huggingface.load_params(sharded_folder), huggingface.load_params(untied_folder)
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_are_cast(untied_folder, dtype):
    params = huggingface.load_params(untied_folder, dtype=dtype)
    exact = load_file(untied_folder / "model.safetensors")["model.embed_tokens.weight"].numpy()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(params["embed"]["embedding"], exact.astype(dtype))


SHARDED_LOAD = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from policy_split_jax.model import huggingface, qwen3

folder = Path(sys.argv[1])
whole = huggingface.load_params(folder)
mesh = jax.make_mesh((2, 2), ("data", "tp"), axis_types=(AxisType.Auto,) * 2)
count = 0
# Every array cut along every axis that two devices can share: whole heads, halves of heads, rows, layers.
for axis in range(4):
    def place(leaf):
        if axis >= leaf.ndim or leaf.shape[axis] % 2:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*(None,) * axis, "tp"))
    shardings = jax.tree.map(place, qwen3.abstract_params(huggingface.load_config(folder)))
    placed = huggingface.load_params(folder, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, whole)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == shardings
    count += sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
print("cut", count)
"""


def test_each_device_gets_its_part(untied_folder):
    """On four emulated devices; in a process of its own, because a process has one set of devices."""
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED_LOAD, str(untied_folder)],
        env={**os.environ, **devices, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Axis 0: lm_head and final norm (3 layers and 53 tokens are odd). Axis 1: embedding, 11 stacked arrays.
    # Axis 2: the 7 matrices. Axis 3: q, k, v, o.
    assert done.stdout.split() == ["cut", str(2 + 12 + 7 + 4)]


def test_rotary_buffers_of_old_files_are_ignored(tied_folder):
    before = huggingface.load_params(tied_folder)
    rewrite_tensors(
        tied_folder, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    )
    jax.tree.map(np.testing.assert_array_equal, huggingface.load_params(tied_folder), before)


@pytest.mark.parametrize("rows_at_once", [10, 4096])
def test_a_tied_head_in_the_file_may_repeat_the_embedding(tied_folder, rows_at_once, monkeypatch):
    monkeypatch.setattr(huggingface, "_ROWS_COMPARED_AT_ONCE", rows_at_once)
    before = huggingface.load_params(tied_folder)
    rewrite_tensors(
        tied_folder, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()})
    )
    assert "lm_head.weight" in stored_bytes(tied_folder)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load_params(tied_folder), before)


@pytest.mark.parametrize("kind", ["one value", "type", "shape"])
@pytest.mark.parametrize("rows_at_once", [10, 4096])
def test_a_tied_head_that_differs_is_refused(tied_folder, kind, rows_at_once, monkeypatch):
    monkeypatch.setattr(huggingface, "_ROWS_COMPARED_AT_ONCE", rows_at_once)

    def add_head(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        if kind == "one value":
            head[-1, -1] += 1
        tensors["lm_head.weight"] = {"type": head.bfloat16(), "shape": head[:-1].clone()}.get(kind, head)

    rewrite_tensors(tied_folder, add_head)
    with pytest.raises(UserError, match=r"model\.safetensors: lm_head\.weight differs from the embedding"):
        huggingface.load_params(tied_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda held: held.pop("model.layers.2.mlp.up_proj.weight"),
            r"missing tensors model\.layers\.2\.mlp\.up_proj\.weight;",
        ),
        (lambda held: held.clear(), r"missing tensors lm_head\.weight, .* … \(36 in all\)"),
        (
            lambda held: held.update({"model.layers.3.mlp.up_proj.weight": torch.ones(40, 24)}),
            r"unexpected tensors model\.layers\.3\.mlp\.up_proj\.weight;",
        ),
        (
            lambda held: held.update({"model.norm.weight": torch.ones(25)}),
            r"model\.norm\.weight in model\.safetensors is \(25,\), not \(24,\)",
        ),
        # The same number of values the other way round must not slip through a reshape.
        (
            lambda held: held.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(24, 40)}),
            r"q_proj\.weight in model\.safetensors is \(24, 40\), not \(40, 24\)",
        ),
        (
            lambda held: held.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}),
            r"model\.norm\.weight is I8; only F32, BF16, F16",
        ),
    ],
    ids=["missing", "empty", "left over", "shape", "transposed", "quantised"],
)
def test_weights_that_are_not_the_model(untied_folder, change, message):
    rewrite_tensors(untied_folder, change)
    with pytest.raises(UserError, match=message) as caught:
        huggingface.load_params(untied_folder)
    assert str(caught.value).startswith(str(untied_folder / "model.safetensors"))


def test_an_untied_head_under_a_tied_config_is_refused(untied_folder):
    """Silently dropping the head is how converted models come to talk gibberish."""
    change_json(untied_folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        huggingface.load_params(untied_folder)


def test_a_missing_head_of_an_untied_model_is_refused(tied_folder):
    change_json(tied_folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"missing tensors lm_head\.weight"):
        huggingface.load_params(tied_folder)


@pytest.mark.parametrize(
    "spoil",
    [lambda held: held[:-7], lambda held: b"garbage" * 9, lambda held: b""],
    ids=["cut", "garbage", "empty"],
)
def test_damaged_weight_files(untied_folder, spoil):
    path = untied_folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=r"model\.safetensors: not a complete safetensors file"):
        huggingface.load_params(untied_folder)


def test_pickled_weights_are_not_read(untied_folder):
    (untied_folder / "model.safetensors").rename(untied_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors weights are read"):
        huggingface.load_params(untied_folder)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/secret.safetensors", "a\\b.safetensors", "model.bin", "..", 3]
)
def test_an_index_may_only_name_files_beside_it(sharded_folder, file):
    index = sharded_folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={**weight_map, "lm_head.weight": file})
    # So that following the path would work.
    (sharded_folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"index\.json: lm_head\.weight points to .* beside the index"):
        huggingface.load_params(sharded_folder)


def test_an_index_that_names_a_file_that_is_not_there(sharded_folder):
    gone = sorted(sharded_folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        huggingface.load_params(sharded_folder)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"]])
def test_an_index_without_a_map(sharded_folder, weight_map):
    change_json(sharded_folder / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(UserError, match=r"index\.json: weight_map"):
        huggingface.load_params(sharded_folder)


def test_an_index_that_disagrees_with_its_files(sharded_folder):
    index = sharded_folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    change_json(index, weight_map=weight_map)
    with pytest.raises(UserError, match=r"index\.json: disagrees with .* about model\.norm\.weight"):
        huggingface.load_params(sharded_folder)


# Weights out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["10KB", "1GB"])
def test_round_trip_keeps_every_byte(tmp_path, tied, dtype, shard_size):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    make_oracle(tied, dtype).save_pretrained(theirs, max_shard_size=shard_size)
    config = huggingface.load_config(theirs)
    params = huggingface.load_params(theirs, dtype=jnp.dtype(dtype))
    limit = {"10KB": 10_000, "1GB": 1e9}[shard_size]
    huggingface.save_model(ours, params, config, dtype=dtype, max_shard_bytes=limit)
    assert stored_bytes(ours) == stored_bytes(theirs)
    assert huggingface.load_config(ours) == config
    again = huggingface.load_params(ours, dtype=jnp.dtype(dtype))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_shards_keep_to_the_limit_and_the_index_to_the_shards(tmp_path):
    make_oracle(tied=False).save_pretrained(tmp_path / "theirs")
    config, params = (
        huggingface.load_config(tmp_path / "theirs"),
        huggingface.load_params(tmp_path / "theirs"),
    )
    huggingface.save_model(tmp_path / "ours", params, config, dtype="float32", max_shard_bytes=8000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    # Whoever may read the configuration may read the weights.
    assert len({file.stat().st_mode for file in (tmp_path / "ours").iterdir()}) == 1
    sizes = {name: len(data) for name, (_, _, data) in stored_bytes(tmp_path / "ours").items()}
    assert (
        index["metadata"]["total_size"] == sum(sizes.values()) == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    )
    for file in files:
        held = [sizes[name] for name, place in index["weight_map"].items() if place == file]
        assert sum(held) <= 8000 or len(held) == 1
    assert len(files) < len(sizes)


def greedy(scores_of, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by a function from token ids to the logits of the last position."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(scores_of(tokens).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10_000, 5e9])
def test_transformers_loads_our_export(tmp_path, tied, shard_bytes):
    oracle = make_oracle(tied)
    oracle.save_pretrained(tmp_path / "theirs")
    config, params = (
        huggingface.load_config(tmp_path / "theirs"),
        huggingface.load_params(tmp_path / "theirs"),
    )
    huggingface.save_model(tmp_path / "ours", params, config, dtype="float32", max_shard_bytes=shard_bytes)
    export, report = Qwen3ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert export.dtype == torch.float32
    assert export.config.rope_parameters["rope_theta"] == 1e6
    assert export.config.tie_word_embeddings is tied

    prompt = [5, 17, 8, 30, 11]
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt])).logits
        found = export(torch.tensor([prompt])).logits
        # The same code on the same weights.
        assert torch.equal(found, expected)
        theirs = greedy(lambda tokens: oracle(torch.tensor([tokens])).logits[0, -1], prompt, 8)
        exported = greedy(lambda tokens: export(torch.tensor([tokens])).logits[0, -1], prompt, 8)
    assert exported == theirs
    assert len(set(theirs)) > 1

    @jax.jit
    def forward(tokens, valid):
        return qwen3.logits(params, qwen3.forward(params, tokens, config=config, valid=valid), config)

    def our_scores(tokens):
        row = jnp.asarray([tokens + [0] * (16 - len(tokens))])
        return forward(row, jnp.arange(16)[None] < len(tokens))[0, len(tokens) - 1]

    assert greedy(our_scores, prompt, 8) == theirs


def test_transformers_reads_a_bfloat16_export_as_bfloat16(tmp_path, untied_folder):
    config, params = huggingface.load_config(untied_folder), huggingface.load_params(untied_folder)
    huggingface.save_model(tmp_path / "ours", params, config)
    export = Qwen3ForCausalLM.from_pretrained(tmp_path / "ours")
    assert export.dtype == torch.bfloat16
    rounded = load_file(untied_folder / "model.safetensors")["model.norm.weight"].bfloat16()
    assert torch.equal(export.model.norm.weight.data, rounded)


def test_export_keeps_what_the_base_config_says_beyond_sizes(tmp_path, tied_folder):
    config, params = huggingface.load_config(tied_folder), huggingface.load_params(tied_folder)
    base = {
        **FLAT_CONFIG,
        "max_position_embeddings": 777,
        "num_hidden_layers": 99,
        "sliding_window": 4096,
        "note": "kept",
        "auto_map": {"AutoConfig": "x.Y"},
    }
    before = json.dumps(base)
    huggingface.save_model(tmp_path / "ours", params, config, base_config=base)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    kept = ("max_position_embeddings", "note", "bos_token_id", "eos_token_id")
    assert [written[key] for key in kept] == [777, "kept", 1, 2]
    assert written["num_hidden_layers"] == 3
    assert written["sliding_window"] is None
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert not {"auto_map", "transformers_version", "rope_scaling"} & set(written)
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert json.dumps(base) == before


def test_export_writes_the_generation_config_with_all_stop_ids(tmp_path, tied_folder):
    config, params = huggingface.load_config(tied_folder), huggingface.load_params(tied_folder)
    settings = {"eos_token_id": [7, 9], "pad_token_id": 9, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    huggingface.save_model(tmp_path / "ours", params, config, generation_config=settings)
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text()) == settings
    expected = huggingface.GenerationConfig((7, 9), 9, temperature=0.6, top_k=20, top_p=0.95)
    assert huggingface.load_generation_config(tmp_path / "ours") == expected
    export = Qwen3ForCausalLM.from_pretrained(tmp_path / "ours")
    assert export.generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize("occupant", ["file inside", "file in its place"])
def test_export_never_overwrites(tmp_path, tied_folder, occupant):
    config, params = huggingface.load_config(tied_folder), huggingface.load_params(tied_folder)
    target = tmp_path / "ours"
    precious = target / "precious" if occupant == "file inside" else target
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    with pytest.raises(UserError, match="ours: exists already"):
        huggingface.save_model(target, params, config)
    assert precious.read_text() == "mine"


def test_export_into_an_empty_or_deep_folder(tmp_path, tied_folder):
    config, params = huggingface.load_config(tied_folder), huggingface.load_params(tied_folder)
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b"):
        huggingface.save_model(target, params, config)
        assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
        assert [file.name for file in target.parent.iterdir() if file.name.startswith(".")] == []
    with safe_open(tmp_path / "empty" / "model.safetensors", framework="numpy") as handle:
        assert handle.metadata() == {"format": "pt"}
    # Readable by whom the user's umask says, like any other folder, not by the owner alone.
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_crash_while_writing_leaves_nothing(tmp_path, tied_folder, monkeypatch):
    config, params = huggingface.load_config(tied_folder), huggingface.load_params(tied_folder)
    written = []

    def full_disk(arrays, file, metadata):
        written.append(file)
        file.write_bytes(b"half")
        if len(written) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(huggingface, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        huggingface.save_model(tmp_path / "out" / "ours", params, config, max_shard_bytes=4000)
    assert len(written) == 2
    assert list((tmp_path / "out").iterdir()) == []


def test_parameters_of_another_size_are_refused(tmp_path, tied_folder):
    config, params = huggingface.load_config(tied_folder), huggingface.load_params(tied_folder)
    params["final_norm"]["scale"] = jnp.ones(25)
    params["lm_head"] = {"kernel": jnp.ones((24, VOCAB))}
    with pytest.raises(UserError, match=r"final_norm/scale is \(25,\), not \(24,\), lm_head/kernel is \(24, 53\)"):
        huggingface.save_model(tmp_path / "ours", params, config)
    assert not (tmp_path / "ours").exists()


# Generation settings


@pytest.mark.parametrize(
    ("generation", "config", "stop_ids", "pad_id"),
    [
        ({"eos_token_id": [5, 4, 5], "pad_token_id": 4}, {"eos_token_id": 9}, (5, 4), 4),
        ({"eos_token_id": 5}, {"eos_token_id": 9, "pad_token_id": 8}, (5,), 8),
        ({"temperature": 0.6}, {"eos_token_id": [9, 0]}, (9, 0), 9),
        (None, {"eos_token_id": 0, "pad_token_id": 1}, (0,), 1),
        (None, {"eos_token_id": None}, (11,), 12),
        (None, None, (11,), 12),
    ],
)
def test_stop_and_padding_ids_come_from_the_first_that_states_them(tmp_path, generation, config, stop_ids, pad_id):
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    if config is not None:
        write_json(tmp_path / "config.json", config)
    if stop_ids == (11,):
        added = {"11": {"content": "<end>"}, "12": {"content": "<pad>"}}
        names = {"eos_token": {"content": "<end>"}, "pad_token": "<pad>"}
        write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": added, **names})
    found = huggingface.load_generation_config(tmp_path)
    assert (found.stop_ids, found.pad_id) == (stop_ids, pad_id)


def test_special_tokens_listed_in_tokenizer_json_only(tmp_path):
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<end>", "pad_token": None})
    write_json(tmp_path / "tokenizer.json", {"added_tokens": [{"id": 6, "content": "<end>"}]})
    found = huggingface.load_generation_config(tmp_path)
    assert found == huggingface.GenerationConfig(stop_ids=(6,), pad_id=6, temperature=1.0, top_k=0, top_p=1.0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", {}, "no eos_token_id"),
        (
            "generation_config.json",
            {"eos_token_id": "<end>"},
            r"generation_config\.json: eos_token_id must be",
        ),
        ("config.json", {"eos_token_id": [1, -1]}, r"config\.json: eos_token_id must be"),
        ("generation_config.json", {"eos_token_id": True}, r"generation_config\.json: eos_token_id must be"),
        ("generation_config.json", {"eos_token_id": 1, "top_p": 1.5}, "top_p must be at most 1"),
        ("generation_config.json", {"eos_token_id": 1, "top_k": 2.5}, "top_k must be a positive whole"),
        (
            "generation_config.json",
            {"eos_token_id": 1, "temperature": "hot"},
            "temperature must be a positive",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "malformed special tokens"),
    ],
)
def test_generation_settings_that_make_no_sense(tmp_path, file, content, message):
    write_json(tmp_path / file, content)
    with pytest.raises(UserError, match=message):
        huggingface.load_generation_config(tmp_path)


# Tokenizer


def test_the_real_tokenizer(shared, tmp_path, tied_folder):
    source = shared / "data" / "qwen3_tokenizer"
    config, params = huggingface.load_config(tied_folder), huggingface.load_params(tied_folder)
    huggingface.save_model(tmp_path / "ours", params, config, tokenizer_files=source)
    copied = {file.name for file in source.iterdir()}
    assert copied <= {file.name for file in (tmp_path / "ours").iterdir()}
    for name in copied:
        assert (tmp_path / "ours" / name).read_bytes() == (source / name).read_bytes()

    tokenizer = huggingface.load_tokenizer(tmp_path / "ours")
    assert len(tokenizer) == 151669
    assert tokenizer.eos_token_id == 151645
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    found = huggingface.load_generation_config(source)
    assert (found.stop_ids, found.pad_id) == ((151645,), 151643)


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    """A tokenizer of three words."""
    from tokenizers import Tokenizer, models

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")).save(str(folder / "tokenizer.json"))
    template = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0].content }}"}
    write_json(folder / "tokenizer_config.json", template)
    return folder


def test_a_small_tokenizer(tokenizer_folder):
    tokenizer = huggingface.load_tokenizer(tokenizer_folder)
    assert tokenizer.encode("b") == [1]


def test_a_chat_template_in_a_file_of_its_own_is_copied_and_found(tokenizer_folder, tied_folder, tmp_path):
    write_json(tokenizer_folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    (tokenizer_folder / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    config, params = huggingface.load_config(tied_folder), huggingface.load_params(tied_folder)
    huggingface.save_model(tmp_path / "ours", params, config, tokenizer_files=tokenizer_folder)
    tokenizer = huggingface.load_tokenizer(tmp_path / "ours")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "[a]"


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer_folder):
    write_json(tokenizer_folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: no chat template"):
        huggingface.load_tokenizer(tokenizer_folder)


def test_a_tokenizer_with_remote_code_is_refused(tokenizer_folder):
    change_json(tokenizer_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: auto_map"):
        huggingface.load_tokenizer(tokenizer_folder)


def test_a_damaged_tokenizer(tokenizer_folder):
    (tokenizer_folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="tokenizer: the tokenizer cannot be loaded") as caught:
        huggingface.load_tokenizer(tokenizer_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_stops_loading_and_export(tokenizer_folder, tied_folder, tmp_path, name):
    (tokenizer_folder / name).unlink()
    with pytest.raises(UserError, match="tokenizer: no tokenizer here"):
        huggingface.load_tokenizer(tokenizer_folder)
    config, params = huggingface.load_config(tied_folder), huggingface.load_params(tied_folder)
    with pytest.raises(UserError, match="tokenizer: no tokenizer here"):
        huggingface.save_model(tmp_path / "ours", params, config, tokenizer_files=tokenizer_folder)
    assert not (tmp_path / "ours").exists()
