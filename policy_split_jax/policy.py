"""A model folder as a policy: configuration, tokenizer, stop tokens and the prompts of both modes."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from policy_split_jax.config import EMBEDDED, EMBEDDED_WALK, from_dict
from policy_split_jax.errors import UserError
from policy_split_jax.model import huggingface
from policy_split_jax.model.qwen3 import Params, Qwen3Config
from policy_split_jax.modes import ModePrompts, decode_response, keeps_texts, render_both
from policy_split_jax.padding import TokenRow
from policy_split_jax.text_stream import TextStream

PROMPTS_FILE = "policy_split.json"
"""Beside a model's own files: the prompts that its modes were trained with."""

_EMBEDDED_FOLDERS = {EMBEDDED: "tiny_qwen3", EMBEDDED_WALK: "tiny_qwen3_walk"}


@dataclass(frozen=True)
class Policy:
    """Everything of a model but its weights."""

    folder: Path
    """The Hugging Face folder that it came from."""
    config: Qwen3Config
    tokenizer: Any
    stop_ids: tuple[int, ...]
    prompts: ModePrompts

    @property
    def digest(self) -> str:
        """Of the files that say what the weights and token ids mean; the same in every copy."""
        found = hashlib.sha256()
        for name in (*huggingface.TOKENIZER_FILES, "config.json"):
            if (self.folder / name).is_file():
                content = (self.folder / name).read_bytes()
                found.update(f"{name} {len(content)} ".encode() + content)
        return found.hexdigest()

    def text(self, tokens: TokenRow) -> str:
        """A rollout's text, without its stop token."""
        return decode_response(self.tokenizer, [int(token) for token in tokens], self.stop_ids)

    def with_prompts(self, **changes: Any) -> "Policy":
        """The same policy with some of its `ModePrompts` replaced."""
        return replace(self, prompts=replace(self.prompts, **changes))

    def pieces(self, tokens: TokenRow) -> list[str]:
        """What each token adds to a text, stop tokens spelt out; empty until the last token of a character."""
        stream = TextStream(self.tokenizer, stop_ids=(), stops=())
        return [stream.add([int(token)], last=False).text for token in tokens]


def model_folder(path: str) -> Path:
    """The folder of a `model.path` setting: an embedded model's, or the one named."""
    if path in _EMBEDDED_FOLDERS:
        return Path(str(resources.files("policy_split_jax") / "assets" / _EMBEDDED_FOLDERS[path]))
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{path}: no config.json there; give a Hugging Face model folder, {' or '.join(_EMBEDDED_FOLDERS)}"
        )
    return folder


def load_policy(folder: Path) -> Policy:
    """Reads all of a model folder but its weights; the prompts are those of its `policy_split.json`."""
    policy = Policy(
        folder=folder,
        config=huggingface.load_config(folder),
        tokenizer=huggingface.load_tokenizer(folder),
        stop_ids=huggingface.load_generation_config(folder).stop_ids,
        prompts=_read_prompts(folder),
    )
    _check_tokenizer(policy)
    return policy


def _check_tokenizer(policy: Policy) -> None:
    """Raises UserError for a tokenizer that fails, that loses what it is given, or that belongs to another model."""
    try:
        whole = keeps_texts(policy.tokenizer, policy.prompts)
        render_both(policy.tokenizer, ["1"], policy.prompts)
    except Exception as error:  # the template is a program of the folder's, and tokenizers raises bare Exception
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{policy.folder}: the tokenizer or its chat template fails ({reason}); download the tokenizer again"
        ) from error
    if not whole:
        raise UserError(
            f"{policy.folder}: the chat template leaves out the question or the system turn; "
            "use the instruct model's tokenizer"
        )
    largest = max(*policy.tokenizer.get_vocab().values(), *policy.stop_ids)
    if largest >= policy.config.vocab_size:
        raise UserError(
            f"{policy.folder}: token {largest} of the tokenizer or the stop tokens is beyond config.json's vocab_size "
            f"{policy.config.vocab_size}; take all files from one model"
        )


def load_model(path: str) -> tuple[Policy, Params]:
    """The model of a `model.path` setting and its weights, on the default device."""
    policy = load_policy(model_folder(path))
    return policy, huggingface.load_params(policy.folder, policy.config)


def copy_policy_files(policy: Policy, folder: Path) -> None:
    """Writes all of a policy but its weights, so that a run's folder needs no other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*huggingface.TOKENIZER_FILES, "config.json", "generation_config.json"):
        if (policy.folder / name).is_file():
            shutil.copyfile(policy.folder / name, folder / name)
    write_prompts(folder, policy.prompts)


def write_prompts(folder: Path, prompts: ModePrompts) -> None:
    """Records the prompts of both modes beside a model."""
    text = json.dumps(asdict(prompts), indent=2, ensure_ascii=False)
    (folder / PROMPTS_FILE).write_text(text + "\n", encoding="utf-8")


def _read_prompts(folder: Path) -> ModePrompts:
    path = folder / PROMPTS_FILE
    if not path.is_file():
        return ModePrompts()
    prompts = from_dict(ModePrompts, huggingface.read_json(path), str(path))
    if "{question}" not in prompts.question_template:
        raise UserError(f"{path}: question_template must contain {{question}}")
    return prompts
