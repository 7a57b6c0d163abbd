"""Qwen3 models in Hugging Face's layout: a folder of safetensors, config.json and a tokenizer, in and out.

The only part of `model/` that touches files. Nothing here runs code from a model folder: weights are
safetensors only, and `auto_map` (remote code) is refused.
"""

import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from policy_split_jax.errors import UserError
from policy_split_jax.model.qwen3 import Params, Qwen3Config, abstract_params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
# (Hugging Face's name, path in the parameter tree, how many leading axes of our array are the input's).
# A matrix of theirs is [outputs, inputs]; 0 stands for an array stored as it is.
_OUTER_TENSORS = (
    ("model.embed_tokens.weight", "embed/embedding", 0),
    ("model.norm.weight", "final_norm/scale", 0),
    ("lm_head.weight", "lm_head/kernel", 1),
)
_LAYER_TENSORS = (
    ("input_layernorm.weight", "layers/attn_norm/scale", 0),
    ("self_attn.q_proj.weight", "layers/attn/q", 1),
    ("self_attn.k_proj.weight", "layers/attn/k", 1),
    ("self_attn.v_proj.weight", "layers/attn/v", 1),
    ("self_attn.o_proj.weight", "layers/attn/o", 2),
    ("self_attn.q_norm.weight", "layers/attn/q_norm", 0),
    ("self_attn.k_norm.weight", "layers/attn/k_norm", 0),
    ("post_attention_layernorm.weight", "layers/mlp_norm/scale", 0),
    ("mlp.gate_proj.weight", "layers/mlp/gate", 1),
    ("mlp.up_proj.weight", "layers/mlp/up", 1),
    ("mlp.down_proj.weight", "layers/mlp/down", 1),
)
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}
# A damaged size must not become memory, nor a damaged number of layers a list of their names.
_LARGEST_SIZE = 1 << 24
_LARGEST = {"num_hidden_layers": 1 << 12}
# What no name of a file beside the index holds: parts of a path, and what cannot be printed or written.
_PATH = re.compile(r"[/\\:\0-\x1f\ud800-\udfff]")
_FLOAT_TYPES = ("F32", "BF16", "F16")
# A whole embedding is over a gigabyte.
_ROWS_COMPARED_AT_ONCE = 4096


@dataclass(frozen=True)
class GenerationConfig:
    """How a model's authors sample from it. Any of `stop_ids` ends a response; `top_k` 0 means no limit."""

    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class _Tensor(NamedTuple):
    """One tensor of a Hugging Face file and its place in the parameter tree."""

    name: str
    path: str
    layer: int | None
    inputs: int  # leading axes of `shape` that make up the input; 0: stored as it is
    shape: tuple[int, ...]  # ours, without the layer axis

    @property
    def file_shape(self) -> tuple[int, ...]:
        if not self.inputs:
            return self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])


class _Stored(NamedTuple):
    """A tensor in an open file, not read yet."""

    file: Path
    data: Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError when it is missing or is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is this a Hugging Face model folder?") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object")
    return content


# config.json


def load_config(folder: Path) -> Qwen3Config:
    """The sizes in `config.json`. Raises UserError for anything but a plain dense Qwen3 causal model."""
    path = folder / "config.json"
    config = read_json(path)
    _refuse_other_models(path, config)
    sizes = {ours: _positive_int(path, config, theirs) for theirs, ours in _SIZES.items()}
    if config.get("head_dim") is None:
        head_dim = sizes["hidden_size"] // sizes["num_heads"]
    else:
        head_dim = _positive_int(path, config, "head_dim")
    try:
        return Qwen3Config(
            **sizes,
            head_dim=head_dim,
            rope_theta=_rope_theta(path, config),
            rms_norm_eps=_positive_float(path, config, "rms_norm_eps"),
            tie_embeddings=_truth(path, config, "tie_word_embeddings"),
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _refuse_other_models(path: Path, config: dict[str, Any]) -> None:
    if config.get("model_type") != "qwen3":
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}; only 'qwen3' (dense) is supported")
    if config.get("architectures") != ["Qwen3ForCausalLM"]:
        raise UserError(f"{path}: architectures is {config.get('architectures')!r}; only Qwen3ForCausalLM is supported")
    if config.get("hidden_act") != "silu":
        raise UserError(f"{path}: hidden_act is {config.get('hidden_act')!r}; only 'silu' is supported")
    for key, remedy in (
        ("auto_map", "remote code is never run; use a model of the plain Qwen3 architecture"),
        ("attention_bias", "Qwen3 has no attention bias"),
        ("use_sliding_window", "sliding windows are not supported"),
        ("quantization_config", "use the unquantised weights"),
    ):
        if config.get(key):
            raise UserError(f"{path}: {key} is set; {remedy}")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{path}: layer_types asks for more than full_attention; sliding windows are not supported")


def _rope_theta(path: Path, config: dict[str, Any]) -> float:
    """The rotary base: `rope_theta` of old files, `rope_parameters.rope_theta` of transformers 5."""
    stated = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{path}: {key} must be an object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{path}: {key} asks for {kind!r}; only the default rotary embedding is supported")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{path}: {key}.partial_rotary_factor is not supported")
        if "rope_theta" in rope:
            stated[f"{key}.rope_theta"] = _positive_float(path, rope, "rope_theta")
    if "rope_theta" in config:
        stated["rope_theta"] = _positive_float(path, config, "rope_theta")
    if not stated:
        raise UserError(f"{path}: rope_theta is missing")
    if len(set(stated.values())) > 1:
        raise UserError(f"{path}: contradictory rotary bases {stated}; keep one")
    return next(iter(stated.values()))


def _positive_int(path: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} must be a positive whole number, not {value!r}")
    largest = _LARGEST.get(key, _LARGEST_SIZE)
    if value > largest:
        raise UserError(f"{path}: {key} is {value}, and no model has more than {largest}; download the file again")
    return value


def _positive_float(path: Path, config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{path}: {key} must be a positive number, not {value!r}")
    return float(value)


def _truth(path: Path, config: dict[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} must be true or false, not {value!r}")
    return value


# Weights in


def load_params(
    folder: Path,
    config: Qwen3Config | None = None,
    *,
    shardings: Any = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """The parameters of a model folder, cast to `dtype`.

    Weights are read slice by slice from the memory-mapped files, one array of the tree at a time, and only
    the slices that this process's devices need. `shardings` is a tree of `jax.sharding.Sharding` like the
    parameters, or None for the default device. Every parameter must be there with the right shape and
    nothing may be left over, else UserError; a damaged or foreign file is a UserError too.
    """
    config = config or load_config(folder)
    leaves = _by_path(abstract_params(config))
    placed = _by_path(shardings) if shardings is not None else dict.fromkeys(leaves)
    tensors = _group_by_path(_tensors(config))
    with _open_weights(folder) as (listing, stored):
        stored = _check_tensors(listing, stored, _tensors(config), tied=config.tie_embeddings)
        arrays = [_load_array(tensors[path], stored, leaf.shape, dtype, placed[path]) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_params(config)), arrays)


def _tensors(config: Qwen3Config) -> list[_Tensor]:
    """Every tensor of the model in the order of its files, shapes taken from the parameter tree."""
    shapes = {path: leaf.shape for path, leaf in _by_path(abstract_params(config)).items()}
    layers = [
        _Tensor(f"model.layers.{layer}.{name}", path, layer, inputs, shapes[path][1:])
        for layer in range(config.num_layers)
        for name, path, inputs in _LAYER_TENSORS
    ]
    embed, *after = [
        _Tensor(name, path, None, inputs, shapes[path]) for name, path, inputs in _OUTER_TENSORS if path in shapes
    ]
    return [embed, *layers, *after]


def _by_path(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _group_by_path(tensors: list[_Tensor]) -> dict[str, list[_Tensor]]:
    groups: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.path, []).append(tensor)
    return groups


@contextmanager
def _open_weights(folder: Path) -> Iterator[tuple[Path, dict[str, _Stored]]]:
    """The file that lists the tensors (for messages), and every tensor of the folder, unread."""
    listing, names_of_file = _weight_files(folder)
    stored: dict[str, _Stored] = {}
    with ExitStack() as stack:
        for file, names in names_of_file.items():
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a complete safetensors file ({error}); download it again") from error
            held = set(handle.keys())
            if names is not None and held != names:
                raise UserError(
                    f"{listing}: disagrees with {file.name} about {_some(held ^ names)}; download both again"
                )
            stored.update({name: _Stored(file, handle.get_slice(name)) for name in held})
        yield listing, stored


def _weight_files(folder: Path) -> tuple[Path, dict[Path, set[str] | None]]:
    """The listing, and each weight file with the tensors that the index puts there (None: no index)."""
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS, {folder / WEIGHTS: None}
    listing = folder / INDEX
    if not listing.exists():
        raise UserError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there; only safetensors weights are read")
    names_of_file: dict[Path, set[str]] = {}
    weight_map = read_json(listing).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{listing}: weight_map must map tensor names to files")
    for name, file in weight_map.items():
        # A path in the index could name any file of the machine.
        if not isinstance(file, str) or not file.endswith(".safetensors") or _PATH.search(file):
            raise UserError(f"{listing}: {name} points to {file!r}; it must be a safetensors file beside the index")
        names_of_file.setdefault(folder / file, set()).add(name)
    return listing, {**names_of_file}


def _check_tensors(
    listing: Path, stored: dict[str, _Stored], expected: list[_Tensor], *, tied: bool
) -> dict[str, _Stored]:
    """What is stored, less what a Qwen3 file may carry needlessly; UserError unless it is the model's."""
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(".rotary_emb.inv_freq")}
    if tied and {"lm_head.weight", "model.embed_tokens.weight"} <= set(stored):
        _check_tied_head(stored.pop("lm_head.weight"), stored["model.embed_tokens.weight"])
    names = {tensor.name for tensor in expected}
    for problem, found in (("missing", names - set(stored)), ("unexpected", set(stored) - names)):
        if found:
            raise UserError(f"{listing}: {problem} tensors {_some(found)}; does config.json belong to these weights?")
    wrong = [
        f"{tensor.name} in {stored[tensor.name].file.name} is {shape}, not {tensor.file_shape}"
        for tensor in expected
        if (shape := tuple(stored[tensor.name].data.get_shape())) != tensor.file_shape
    ]
    if wrong:
        raise UserError(f"{listing}: wrong shapes: {_some(wrong)}; does config.json belong to these weights?")
    other = {
        f"{name} is {tensor.data.get_dtype()}"
        for name, tensor in stored.items()
        if tensor.data.get_dtype() not in _FLOAT_TYPES
    }
    if other:
        raise UserError(f"{listing}: {_some(other)}; only {', '.join(_FLOAT_TYPES)} weights are read")
    return stored


def _check_tied_head(head: _Stored, embedding: _Stored) -> None:
    """Some exporters write the head of a tied model as well; it may only repeat the embedding."""

    def same_rows(start: int) -> bool:
        rows = slice(start, min(start + _ROWS_COMPARED_AT_ONCE, shape[0]))
        return head.data[rows].tobytes() == embedding.data[rows].tobytes()

    shape, kind = head.data.get_shape(), head.data.get_dtype()
    alike = (shape, kind) == (embedding.data.get_shape(), embedding.data.get_dtype())
    if not alike or not all(same_rows(start) for start in range(0, shape[0], _ROWS_COMPARED_AT_ONCE)):
        raise UserError(
            f"{head.file}: lm_head.weight differs from the embedding although config.json has "
            "tie_word_embeddings true; set it to false to keep both"
        )


def _some(items: set[str] | list[str]) -> str:
    """The first few of a set of names, and how many there are."""
    shown = ", ".join(sorted(items)[:3])
    return shown if len(items) <= 3 else f"{shown}, … ({len(items)} in all)"


def _load_array(
    tensors: list[_Tensor],
    stored: dict[str, _Stored],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: Any,
) -> jax.Array:
    """One array of the parameter tree, from the tensors of all its layers."""
    if sharding is None:
        return jnp.asarray(_read(tensors, stored, shape, dtype, tuple(slice(None) for _ in shape)))
    parts: dict[tuple[Any, ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        # Devices that hold the same part (data parallelism) share one reading of it.
        key = tuple((at.start, at.stop) for at in index)
        if key not in parts:
            parts[key] = _read(tensors, stored, shape, dtype, index)
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part)


def _read(
    tensors: list[_Tensor],
    stored: dict[str, _Stored],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part `index` of an array, read and cast layer by layer."""
    ranges = [range(size)[at] for size, at in zip(shape, index, strict=True)]
    index = tuple(slice(at.start, at.stop) for at in ranges)
    array = np.empty([len(at) for at in ranges], jnp.dtype(dtype))
    if tensors[0].layer is None:
        array[...] = _read_tensor(tensors[0], stored, index)
    else:
        for row, tensor in zip(array, tensors[index[0]], strict=True):
            row[...] = _read_tensor(tensor, stored, index[1:])
    return array


def _read_tensor(tensor: _Tensor, stored: dict[str, _Stored], index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` (of our shape) of one stored tensor, in our axis order and the file's type."""
    data = stored[tensor.name].data
    if not tensor.inputs:
        return data[index]
    inputs, outputs = tensor.shape[: tensor.inputs], tensor.shape[tensor.inputs :]
    rows, columns = _span(outputs, index[tensor.inputs]), _span(inputs, index[0])
    block = data[rows, columns].T.reshape(_length(index[0]), *inputs[1:], _length(index[tensor.inputs]), *outputs[1:])
    # The file was cut along the first axis of the inputs and of the outputs; what is left is cut here.
    whole = slice(None)
    return block[whole, *index[1 : tensor.inputs], whole, *index[tensor.inputs + 1 :]]


def _length(index: slice) -> int:
    return index.stop - index.start


def _span(axes: tuple[int, ...], first: slice) -> slice:
    """Where a range of the first of some axes lies once they are flattened into one."""
    step = math.prod(axes[1:])
    return slice(first.start * step, first.stop * step)


# Weights out


def save_model(
    folder: Path,
    params: Params,
    config: Qwen3Config,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    base_config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    tokenizer_files: Path | None = None,
    max_shard_bytes: int | float = 5e9,
) -> None:
    """Writes a folder that transformers' `Qwen3ForCausalLM` (and this module) loads.

    `base_config` and `generation_config` are the JSON objects of the model that training started from: what
    they say beyond the sizes is kept. `tokenizer_files` is the folder whose tokenizer is copied. The host
    holds one file's tensors at a time. Everything is written to a temporary folder beside `folder`, which is
    renamed at the end: a crash never leaves half a model. One process must address all of `params`.

    Raises UserError when `folder` is not new or empty, when there is no tokenizer to copy, or when the
    parameters do not fit `config`.
    """
    _check_target(folder)
    check_params(params, config)
    if tokenizer_files is not None:
        _check_tokenizer_files(tokenizer_files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        # A folder inside: the temporary one is readable by its owner only.
        draft = Path(scratch) / "model"
        draft.mkdir()
        _write_json(draft / "config.json", _config_json(config, base_config or {}, dtype))
        stops = generation_config if generation_config is not None else _token_ids(base_config or {})
        if stops:
            _write_json(draft / "generation_config.json", stops)
        if tokenizer_files is not None:
            _copy_tokenizer(tokenizer_files, draft)
        _write_weights(draft, params, _tensors(config), jnp.dtype(dtype), float(max_shard_bytes))
        draft.rename(folder)


def _check_target(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; choose a new folder or empty this one")


def check_params(params: Params, config: Qwen3Config) -> None:
    """Raises UserError unless the tree and its shapes are those of `config`."""
    expected = {path: leaf.shape for path, leaf in _by_path(abstract_params(config)).items()}
    found = {path: np.shape(leaf) for path, leaf in _by_path(params).items()}
    wrong = [
        f"{path} is {found.get(path, 'absent')}, not {expected.get(path, 'part of the model')}"
        for path in {*expected, *found}
        if found.get(path) != expected.get(path)
    ]
    if wrong:
        raise UserError(f"the parameters do not fit the model's config: {_some(wrong)}")


def _config_json(config: Qwen3Config, base: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json: the base's keys where they are harmless, ours where they matter."""
    dropped = ("_name_or_path", "auto_map", "quantization_config", "rope_scaling", "transformers_version")
    kept = {key: value for key, value in base.items() if key not in dropped}
    sizes = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    return {
        "max_position_embeddings": 32768,
        **kept,
        **sizes,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "layer_types": ["full_attention"] * config.num_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        # transformers 4 (and most other readers) want the first of each pair, transformers 5 the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _token_ids(base: dict[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: base[key] for key in keys if base.get(key) is not None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(
    folder: Path, params: Params, tensors: list[_Tensor], dtype: np.dtype, max_shard_bytes: float
) -> None:
    leaves = _by_path(params)
    shards = _plan_shards(tensors, dtype.itemsize, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {tensor.name: _file_array(tensor, leaves[tensor.path], dtype) for tensor in shard}
        # transformers 4 refuses a file without this key.
        save_file(arrays, folder / file, metadata={"format": "pt"})
        # safetensors makes its files readable by their owner only.
        shutil.copymode(folder / "config.json", folder / file)
        weight_map.update(dict.fromkeys(arrays, file))
    if len(shards) > 1:
        total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(tensors: list[_Tensor], itemsize: int, max_shard_bytes: float) -> list[list[_Tensor]]:
    """Tensors in order, a new file whenever the next one would not fit; a larger one gets its own."""
    shards: list[list[_Tensor]] = []
    room = 0.0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _file_array(tensor: _Tensor, leaf: Any, dtype: np.dtype) -> np.ndarray:
    """One tensor as Hugging Face stores it: the inverse of `_read_tensor`."""
    array = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
    if tensor.inputs:
        array = array.reshape(tensor.file_shape[::-1]).T
    return np.ascontiguousarray(array, dtype)


def _check_tokenizer_files(folder: Path) -> None:
    vocabulary = (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists()
    if not vocabulary or not (folder / "tokenizer_config.json").exists():
        raise UserError(f"{folder}: no tokenizer here; tokenizer.json and tokenizer_config.json are needed")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


# Tokenizer and generation settings


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer (transformers'). Raises UserError when it or its chat template is missing."""
    _check_tokenizer_files(folder)
    path = folder / "tokenizer_config.json"
    if read_json(path).get("auto_map"):
        raise UserError(f"{path}: auto_map is set; remote code is never run, use a tokenizer without it")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({reason})") from error
    if not tokenizer.chat_template:
        raise UserError(f"{path}: no chat template here or in chat_template.jinja; use the instruct model's tokenizer")
    return tokenizer


def load_generation_config(folder: Path) -> GenerationConfig:
    """Stop ids and sampling settings of a model folder.

    Ids come from generation_config.json, else config.json, else the tokenizer's end token. What
    generation_config.json leaves open is plain sampling (temperature 1, no top-k, no top-p). Raises UserError
    when no stop id is stated or a value makes no sense.
    """
    sources = [
        (path, read_json(path))
        for name in ("generation_config.json", "config.json")
        if (path := folder / name).exists()
    ]
    sources.append((folder / "tokenizer_config.json", _tokenizer_ids(folder)))
    stop_ids = _first_ids(sources, "eos_token_id")
    if not stop_ids:
        raise UserError(f"{folder}: no eos_token_id in generation_config.json, config.json or the tokenizer's config")
    pad_ids = _first_ids(sources, "pad_token_id") or stop_ids
    path, settings = sources[0] if sources[0][0].name == "generation_config.json" else (folder, {})
    return GenerationConfig(stop_ids, pad_ids[0], **_sampling_settings(path, settings))


def _first_ids(sources: list[tuple[Path, dict[str, Any]]], key: str) -> tuple[int, ...]:
    """The ids that the first source with `key` states: one or a list, without repeats."""
    for path, content in sources:
        value = content.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(at, bool) or not isinstance(at, int) or at < 0 for at in ids):
            raise UserError(f"{path}: {key} must be a token id or a list of them, not {value!r}")
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def _tokenizer_ids(folder: Path) -> dict[str, Any]:
    """Ids of the end and padding tokens that the tokenizer's config names."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    config = read_json(path)
    try:
        id_of = _added_tokens(folder, config)
        names = {key: config.get(key) for key in ("eos_token", "pad_token")}
        # Old files spell a token as an object.
        texts = {key: name["content"] if isinstance(name, dict) else name for key, name in names.items()}
        return {f"{key}_id": id_of.get(text) for key, text in texts.items() if text is not None}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: malformed special tokens; download the tokenizer again") from error


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Id of each added token; transformers 5 lists them in tokenizer.json only."""
    if "added_tokens_decoder" in config:
        return {token["content"]: int(at) for at, token in config["added_tokens_decoder"].items()}
    if not (folder / "tokenizer.json").exists():
        return {}
    return {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json")["added_tokens"]}


def _sampling_settings(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if settings.get("temperature") is not None:
        found["temperature"] = _positive_float(path, settings, "temperature")
    if settings.get("top_k"):
        found["top_k"] = _positive_int(path, settings, "top_k")
    if settings.get("top_p") is not None:
        found["top_p"] = _positive_float(path, settings, "top_p")
        if found["top_p"] > 1:
            raise UserError(f"{path}: top_p must be at most 1, not {found['top_p']}")
    return found
