"""How the embedded model is made: its lessons, and the folder that comes out."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from policy_split_jax import config as settings
from policy_split_jax.config import LessonConfig, SftConfig
from policy_split_jax.data import countdown, walk
from policy_split_jax.data.tiny_tokenizer import build_tiny_tokenizer
from policy_split_jax.errors import UserError
from policy_split_jax.model import huggingface, qwen3
from policy_split_jax.policy import load_policy
from policy_split_jax.rewards.countdown import evaluate
from policy_split_jax.rewards.walk import score
from policy_split_jax.training.warmup import _batches, _lessons, warm_up

PUZZLE = countdown.Puzzle((26, 29, 10), 45)
OTHERS = [13, 30, 65]
SIGNS = str.maketrans("+-*/", "    ")


def walk_recipe(output, **train) -> SftConfig:
    return replace(recipe(output, **train), data=LessonConfig("walk", walls=(4,), train_size=40))


def recipe(output, **train) -> SftConfig:
    tree = {
        "output": str(output),
        "size": {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "head_dim": 4},
        "prompt": {"high_entropy": "High-entropy mode."},
        "data": {"max_number": 12, "train_size": 40},
        "optimizer": {"learning_rate": 3e-3},
        "train": {"steps": 2, "batch_size": 32, **train},
        "eval": {"questions": 2, "k": 2},
    }
    return settings.from_dict(SftConfig, tree, "test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tiny_tokenizer(folder)
    return huggingface.load_tokenizer(folder)


def shown(config, tokenizer, batches):
    """(question's target, value of the answer, system turn or not) of the examples of some batches."""
    lessons = _batches(_lessons(config, tokenizer, settings.mode_prompts(config.prompt)), config)
    for batch, _ in zip(lessons, range(batches), strict=False):
        for row in range(config.train.batch_size):
            prompt = tokenizer.decode(batch.prompts[row, 0, -int(batch.prompt_lengths[row, 0]) :])
            answer = tokenizer.decode(
                batch.responses[row, 0, : int(batch.response_lengths[row, 0])], skip_special_tokens=True
            )
            target = int(prompt.split("Make ")[1].split(" from")[0])
            yield target, evaluate(answer), "system" in prompt


def test_wrong_answers_use_the_numbers_and_miss_the_target():
    # 26, 29 and 10 reach three more targets between 10 and 99: 13, 30 and 65.
    answers = countdown.wrong_answers(PUZZLE, 8)
    assert sorted(evaluate(answer) for answer in answers) == OTHERS
    for answer in answers:
        used = sorted(int(number) for number in answer.replace("(", " ").replace(")", " ").translate(SIGNS).split())
        assert used == sorted(PUZZLE.numbers)
    assert answers == countdown.wrong_answers(PUZZLE, 8)
    assert len(countdown.wrong_answers(PUZZLE, 2)) == 2


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_the_share_of_wrong_answers_and_of_high_entropy_prompts(fraction, tokenizer, tmp_path):
    config = recipe(tmp_path / "out", wrong_fraction=fraction, high_entropy_fraction=0.5)
    examples = list(shown(config, tokenizer, 50))
    wrong = np.mean([value != target for target, value, _ in examples])
    high_entropy = np.mean([system for *_, system in examples])
    # 1,600 draws: five standard deviations are 0.055 and 0.063.
    assert wrong == pytest.approx(fraction, abs=0.055 if fraction else 0)
    assert high_entropy == pytest.approx(0.5, abs=0.063)


def test_lessons_of_the_other_task(tmp_path):
    config = walk_recipe(tmp_path / "out", wrong_fraction=0.1)
    build_tiny_tokenizer(tmp_path, walk.WORDS)
    tokenizer = huggingface.load_tokenizer(tmp_path)
    puzzles = walk.puzzles("train", walls=(4,), count=40, seed=0)
    for lesson, puzzle in zip(_lessons(config, tokenizer, settings.mode_prompts(config.prompt)), puzzles, strict=True):
        normal, high_entropy = lesson.prompts
        assert walk.render(puzzle) in tokenizer.decode(normal)
        assert (len(normal), len(high_entropy)) == (27, 37)
        assert {rewarded(tokenizer, puzzle, answer) for answer in lesson.answers} == {1.0}
        assert {rewarded(tokenizer, puzzle, answer) for answer in lesson.wrong} == {0.0}
        assert max(map(len, lesson.answers)) <= 10  # nine moves and the end


def rewarded(tokenizer, puzzle, answer):
    return score(tokenizer.decode(answer, skip_special_tokens=True), walk.ground_truth(puzzle))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_folder_of_the_other_task(tmp_path):
    folder = warm_up(walk_recipe(tmp_path / "model"))
    assert "Walk" in load_policy(folder).tokenizer.get_vocab()
    recorded = json.loads((folder / "provenance.json").read_text())
    assert recorded["config"]["data"]["task"] == "walk"
    assert recorded["evaluation"]["accuracy/normal"] is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_folder_that_comes_out(tmp_path):
    config = recipe(tmp_path / "model", wrong_fraction=0.1)
    folder = warm_up(config)
    policy = load_policy(folder)
    params = huggingface.load_params(folder, policy.config)
    assert params["layers"]["mlp"]["up"].shape == (1, 16, 16)
    assert policy.prompts.high_entropy == "High-entropy mode."
    provenance = json.loads((folder / "provenance.json").read_text())
    assert settings.from_dict(SftConfig, provenance["config"], "") == config
    assert np.isfinite(provenance["final_loss"])
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        warm_up(config)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_start_of_another_size_is_refused_before_anything_is_computed(tmp_path):
    other = qwen3.Qwen3Config(50, 8, 8, 1, 2, 1, 4)
    with pytest.raises(UserError, match="do not fit the model's config"):
        warm_up(recipe(tmp_path / "model"), qwen3.init_params(other, jax.random.key(0)))
    assert not (tmp_path / "model").exists()
