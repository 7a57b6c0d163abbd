"""Dumps of rollouts are read back as what was sampled, and their figures are those of transformers and NumPy."""

import json
from dataclasses import asdict, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy_split_jax.config import SharingConfig
from policy_split_jax.dump import dump_rows
from policy_split_jax.errors import UserError
from policy_split_jax.model import huggingface
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL, ModePrompts, encode_plain
from policy_split_jax.parity.dumps import read_dump
from policy_split_jax.parity.inputs import random_model, sampled_groups
from policy_split_jax.parity.rollouts import ScoreOptions, compare_rollouts, show
from policy_split_jax.policy import Policy
from policy_split_jax.rewards import Grade
from policy_split_jax.rollouts import shared_groups
from policy_split_jax.sampler.batcher import Rollout

PROMPT = "Be odd:\nuser\nor not."
EXACT = SharingConfig()
RELEASED = SharingConfig("user_turn", "text")
SYSTEM = SharingConfig("system", "text")
START = "<|im_start|>"
LIMIT = 1000


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def policy(model):
    return model[0]


@pytest.fixture(scope="module")
def author(policy):
    """The model as those have it who write a dump: what reads it does not know their high-entropy prompt."""
    return replace(policy, prompts=ModePrompts(PROMPT, question_template="Now: {question}"))


@pytest.fixture(scope="module")
def groups(model, author):
    """Sampled texts, in the tokens in which the tokenizer itself spells them; one of them was not graded."""
    sampled = sampled_groups(author, model[1], (NORMAL, HIGH_ENTROPY), questions=4, rollouts=4, seed=1)
    for group in sampled:
        texts = [author.tokenizer.decode(rollout.tokens, skip_special_tokens=True) for rollout in group.rollouts]
        spelled = [[*ids, author.stop_ids[0]] for ids in encode_plain(author.tokenizer, texts)]
        group.rollouts = [Rollout(np.array(ids, np.int32), np.zeros(0, np.float32), "stop") for ids in spelled]
    sampled[0].grades = [Grade(1.0), Grade(0.0), Grade(0.5), Grade(0.0)]
    sampled[1].grades[2] = Grade(None)
    return sampled


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def dumped(path, author, groups, sharing, step=3):
    return write(path, dump_rows(author, groups, shared_groups(author, groups, sharing, LIMIT), step))


# ---------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(("sharing", "view"), [(EXACT, SYSTEM), (RELEASED, RELEASED)], ids=["paper", "released"])
def test_a_dump_of_ours_is_read_back(tmp_path, policy, author, groups, sharing, view):
    [dump] = read_dump(dumped(tmp_path / "3.jsonl", author, groups, sharing), policy)
    assert (dump.step, dump.shared_prompt) == (3, view.high_entropy_prompt)
    # The user turn is all that a dump knows of the question's template.
    assert dump.policy.prompts == ModePrompts(PROMPT)
    assert [group.row.question for group in dump.groups] == [f"Now: {group.row.question}" for group in groups]
    for found, group in zip(dump.groups, groups, strict=True):
        assert found.row.ground_truth == group.row.ground_truth
        assert found.prompts == group.prompts
        assert found.modes == group.modes == [NORMAL, NORMAL, HIGH_ENTROPY, HIGH_ENTROPY]
        assert [list(r.tokens) for r in found.rollouts] == [list(r.tokens) for r in group.rollouts]
        assert [grade.score for grade in found.grades] == [grade.score for grade in group.grades]
    assert dump.shared_scores == [[grade.score for grade in group.grades] for group in groups]
    expected = shared_groups(author, groups, view, LIMIT)
    assert dump.shared == expected
    assert [list(ids) for ids in dump.shared[0].responses] == [list(r.tokens[:-1]) for r in groups[0].rollouts]


def test_steps_of_one_file_are_apart(tmp_path, policy, author, groups):
    paths = [dumped(tmp_path / f"{at}.jsonl", author, groups[at : at + 2], RELEASED, step=at) for at in (2, 0)]
    both = tmp_path / "both.jsonl"
    both.write_text("".join(path.read_text(encoding="utf-8") for path in paths), encoding="utf-8")
    dumps = read_dump(both, policy)
    assert [dump.step for dump in dumps] == [2, 0]
    assert [[group.prompts for group in dump.groups] for dump in dumps] == [
        [group.prompts for group in groups[at : at + 2]] for at in (2, 0)
    ]


# ------------------------------------------------------------------------------------- figures, in NumPy and PyTorch


@pytest.fixture(scope="module")
def oracle(model, tmp_path_factory):
    """The exact log-probabilities [t, V] behind each token of a response."""
    folder = tmp_path_factory.mktemp("oracle") / "model"
    huggingface.save_model(folder, model[1], model[0].config, dtype="float32")
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()

    @cache
    def logp(prompt, response):
        with torch.no_grad():
            logits = twin(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.double(), -1).numpy()

    return lambda prompt, response: logp(tuple(prompt), tuple(response))


def sequences(policy, groups, oracle, kind, behind):
    """Of every graded (trained, question, rollout): the tokens' log-probabilities and entropies as the released
    trainer has them, and the distributions [t, V] of what was sampled; `behind` follows a shared response."""
    seen, right = {}, {}
    for p, group in enumerate(groups):
        user = f"Now: {group.row.question}"
        end = f"<|im_end|>\n{START}assistant\n"
        system = {
            "system": f"system\n{PROMPT}<|im_end|>\n{START}user\n",
            "user_turn": f"user\nsystem\n{PROMPT}\nuser\n",
        }
        shared = [f"{START}user\n{user}{end}", f"{START}{system[kind]}{user}{end}"]
        for i, rollout in enumerate(group.rollouts):
            if group.grades[i].score is None:
                continue
            for mode in (NORMAL, HIGH_ENTROPY):
                tokens = [int(token) for token in rollout.tokens]
                right[mode, p, i] = oracle(group.prompts[mode], tokens)
                prompt, used = group.prompts[mode], tokens
                if mode != group.modes[i]:
                    prompt = policy.tokenizer(shared[mode])["input_ids"]
                    used = [*tokens[:-1], policy.tokenizer.convert_tokens_to_ids(behind)]
                logp = oracle(prompt, used)
                entropy = -(np.exp(logp) * logp).sum(-1)
                seen[mode, p, i] = SimpleNamespace(
                    logp=logp[range(len(used)), used],
                    entropy=entropy if mode == group.modes[i] else entropy[:-1],
                    count=len(used) - (mode != group.modes[i]),
                )
    return seen, right


def advantages(groups, seen, preset):
    """Equations 1 to 4 with the paper's hyper-parameters, and what the released trainer makes of the fourth."""
    result = {}
    for p, group in enumerate(groups):
        scores = {i: grade.score for i, grade in enumerate(group.grades) if grade.score is not None}
        mean, deviation = np.mean(list(scores.values())), np.std(list(scores.values()), ddof=1)
        bonus = {}
        for i in scores:
            own, other = seen[HIGH_ENTROPY, p, i], seen[NORMAL, p, i]
            bonus[i] = -0.5 * own.logp[: own.count]
            both = min(own.count, other.count)
            bonus[i][:both] -= 0.5 * other.logp[:both]
        every = np.concatenate(list(bonus.values()))
        for i, score in scores.items():
            a = (score - mean) / (deviation + 1e-6)
            b = (bonus[i] - every.mean()) / (every.std(ddof=1) + 1e-6)
            limit = abs(a) / 2
            released = 2 * np.clip(0.03 * b, -limit, limit)
            result[HIGH_ENTROPY, p, i] = a + (released if preset == "released" else 0.03 * np.clip(b, -limit, limit))
            result[NORMAL, p, i] = np.full(seen[NORMAL, p, i].count, a)
    return result


def mean_of_means(rows):
    """0 of a row without tokens."""
    return np.mean([np.sum(row) / max(len(row), 1) for row in rows])


def k1(seen, at, mode):
    """log p of a response, stop token included, less that of the other mode at the same places."""
    own, other = seen[at].logp, seen[(1 - mode, *at[1:])].logp
    assert len(own) == len(other)
    return own - other


def expected_figures(policy, groups, oracle, kind, behind, preset):
    seen, right = sequences(policy, groups, oracle, kind, behind)
    adv = advantages(groups, seen, preset)
    score = {at: groups[at[1]].grades[at[2]].score for at in seen}
    sampled = {at: groups[at[1]].modes[at[2]] for at in seen}
    quarters = {
        (trained, by): [at for at in seen if at[0] == trained and sampled[at] == by]
        for trained, by in ((0, 0), (1, 1), (0, 1), (1, 0))
    }

    def pooled(values, places):
        return np.mean(np.concatenate([values(at) for at in places]))

    figures = [
        [
            pooled(lambda at: adv[at], places),
            pooled(lambda at: np.abs(adv[at]), places),
            pooled(lambda at: seen[at].entropy, places),
            pooled(lambda at: -seen[at].logp[: seen[at].count], places),
            np.mean([seen[at].count for at in places]),
            np.mean([score[at] for at in places]),
        ]
        for places in quarters.values()
    ]
    normal, high_entropy = quarters[0, 0], quarters[1, 1]
    rest = [at for at in seen if at not in normal]
    metrics = {
        "actor/org_he_kl": mean_of_means(k1(seen, at, 0) for at in normal),
        "actor/he_org_kl": mean_of_means(k1(seen, at, 1) for at in high_entropy),
        "actor/org_logprob": mean_of_means(seen[at].logp[:-1] for at in normal),
        "actor/he_logprob": mean_of_means(seen[at].logp for at in high_entropy),
        "actor/entropy_loss": pooled(lambda at: seen[at].entropy, seen),
        "critic/advantages/mean": pooled(lambda at: adv[at], rest),
        "critic/advantages/max": max(np.max(adv[at], initial=-np.inf) for at in rest),
        "critic/advantages/min": min(np.min(adv[at], initial=np.inf) for at in rest),
    }
    for prefix, places in (("", list(seen)), ("sub_batch_org/", normal), ("sub_batch_he/", rest)):
        metrics[f"{prefix}critic/score/mean"] = np.mean([score[at] for at in places])
        metrics[f"{prefix}critic/rewards/mean"] = np.mean([score[at] for at in places])
        metrics[f"{prefix}response_length/mean"] = np.mean([seen[at].count for at in places])
    return figures, metrics, expected_as_sampled(groups, right, preset)


def expected_as_sampled(groups, right, preset):
    """By our names, of the distributions [t, V] of every response under both modes."""
    tokens = {at: groups[at[1]].rollouts[at[2]].tokens for at in right}
    logp = {at: rows[range(len(rows)), tokens[at]] for at, rows in right.items()}
    adv = advantages(groups, {at: SimpleNamespace(logp=row, count=len(row)) for at, row in logp.items()}, preset)
    result = {}
    for mode, name, direction in (
        (NORMAL, "normal", "normal_to_high_entropy"),
        (HIGH_ENTROPY, "high_entropy", "high_entropy_to_normal"),
    ):
        own = [at for at in right if at[0] == mode and groups[at[1]].modes[at[2]] == mode]
        dist = np.concatenate([right[at] for at in own])
        other = np.concatenate([right[(1 - mode, *at[1:])] for at in own])
        chosen = np.concatenate([logp[at] for at in own])
        ratio = chosen - np.concatenate([logp[(1 - mode, *at[1:])] for at in own])
        result[f"kl/{direction}"] = (np.exp(dist) * (dist - other)).sum(-1).mean()
        result[f"kl_k1/{direction}"] = ratio.mean()
        result[f"kl_k3/{direction}"] = (np.exp(-ratio) - 1 + ratio).mean()
        result[f"entropy/{name}"] = -(np.exp(dist) * dist).sum(-1).mean()
        result[f"neg_logprob/{name}"] = -chosen.mean()
        result[f"advantage_abs/{name}"] = np.abs(np.concatenate([adv[at] for at in adv if at[0] == mode])).mean()
    return result


@pytest.mark.parametrize(
    ("sharing", "behind", "options"),
    [
        (RELEASED, START, ScoreOptions(microbatch_questions=3)),
        (EXACT, "<|endoftext|>", ScoreOptions("paper", max_new_tokens=LIMIT, remove_padding=False)),
    ],
    ids=["released", "paper"],
)
def test_figures_are_those_of_numpy(tmp_path, model, author, groups, oracle, sharing, behind, options):
    rows = list(dump_rows(author, groups, shared_groups(author, groups, sharing, LIMIT), 3))
    failed = [at for at, row in enumerate(rows) if row["score"] is None]
    assert len(failed) == 2
    # A response that was not graded as sampled counts nowhere, whatever it got where it is shared.
    rows[failed[1]]["score"] = 0.25
    found = compare_rollouts(write(tmp_path / "3.jsonl", rows), *model, options)
    [step] = found.steps
    kind = sharing.high_entropy_prompt
    assert (step.step, step.questions, step.rollouts, step.shared_prompt, step.rescored) == (3, 4, 4, kind, 1)
    figures, metrics, as_sampled = expected_figures(author, groups, oracle, kind, behind, options.preset)
    # Two float32 forward passes, of log-probabilities of some 6 nats; advantages divide by deviations of about 1.
    close = {"rel": 1e-5, "abs": 3e-5}
    for quarter, values in zip(step.quarters, figures, strict=True):
        assert list(asdict(quarter).values())[2:] == pytest.approx(values, **close)
    assert [(quarter.trained, quarter.sampled) for quarter in step.quarters] == [
        ("normal", "normal"),
        ("high_entropy", "high_entropy"),
        ("normal", "high_entropy"),
        ("high_entropy", "normal"),
    ]
    assert step.metrics == pytest.approx(metrics, **close)
    assert step.right == pytest.approx(as_sampled, **close)
    # What follows no response is far from what any mode says of a stop token.
    assert abs(step.metrics["actor/org_he_kl"] - step.right["kl_k1/normal_to_high_entropy"]) > 1e-3
    json.dumps(asdict(found), allow_nan=False)

    console = Console(record=True, width=100)
    show(found, console)
    text = console.export_text()
    assert f"{step.metrics['actor/he_org_kl']:.4f}" in text
    assert f"{step.quarters[3].neg_logprob:.4f}" in text


# ------------------------------------------------------------------------------------------- a file written by hand


def rows_by_hand(step=7):
    """One question, a response of each mode, with what the released trainer writes besides; the shared response `1é`
    was graded otherwise than as it was sampled."""
    system = "system\nBe odd.\nuser\n2+2?\nassistant\n"
    turn = "user\nsystem\nBe odd.\nuser\n2+2?\nassistant\n"
    quarters = (("user\n2+2?\nassistant\n", "4", 1), (system, "1é", 0.0), ("user\n2+2?\nassistant\n", "1é", 0.5))
    return [
        {
            "input": prompt,
            "output": output,
            "score": score,
            "step": step,
            "is_he_prompt": at in (1, 3),
            "is_he_response": at in (1, 2),
            "in_batch_ids": 0,
            "uuids": "b" if at in (1, 3) else "a",
            "ground_truth": "4",
            "acc": 0,
        }
        for at, (prompt, output, score) in enumerate([*quarters, (turn, "4", 1.0)])
    ]


def test_a_file_written_by_hand(tmp_path, model):
    policy, params = model
    path = write(tmp_path / "7.jsonl", rows_by_hand() + rows_by_hand(step=8))
    first, second = compare_rollouts(path, policy, params).steps
    assert first == replace(second, step=7)
    assert (first.questions, first.rollouts, first.shared_prompt, first.rescored) == (1, 2, "user_turn", 1)
    # `é` is two tokens; the stop token counts where a mode trains on its own.
    assert [quarter.response_length for quarter in first.quarters] == [2, 4, 3, 1]
    assert [quarter.score for quarter in first.quarters] == [1.0, 0.0, 0.5, 1.0]
    assert first.metrics["sub_batch_he/critic/score/mean"] == pytest.approx(0.5)
    assert first.metrics["critic/score/mean"] == pytest.approx(0.625)
    # Rewards 1 and 0 are ±1/√2 deviations from their mean; the normal mode has no bonus.
    half = np.sqrt(0.5)
    assert [first.quarters[0].advantage, first.quarters[2].advantage] == pytest.approx([half, -half], rel=1e-5)


def test_the_limit_says_which_responses_have_no_stop_token(tmp_path, policy):
    path = write(tmp_path / "7.jsonl", rows_by_hand())
    [dump] = read_dump(path, policy, 3)
    four, two = (policy.tokenizer(text)["input_ids"] for text in ("4", "1é"))
    assert [list(rollout.tokens) for rollout in dump.groups[0].rollouts] == [[*four, policy.stop_ids[0]], two]
    assert [rollout.finish_reason for rollout in dump.groups[0].rollouts] == ["stop", "length"]
    assert [list(tokens) for tokens in dump.shared[0].responses] == [four, two]


def test_a_shared_response_may_have_been_cut(tmp_path, policy):
    """Halves of characters were sampled, a token each; as text each is a sign of three."""
    rows = rows_by_hand()
    rows[1]["output"], rows[2]["output"] = "\ufffd\ufffd\ufffd5", "\ufffd\ufffd"
    path = write(tmp_path / "7.jsonl", rows)
    [dump] = read_dump(path, policy, 4)
    assert list(dump.shared[0].responses[1]) == (policy.tokenizer("\ufffd")["input_ids"] * 2)[:4]
    with pytest.raises(UserError, match=r"7\.jsonl:3: output is not that of .*7\.jsonl:2, which it shares; .* limit"):
        read_dump(path, policy)


def test_the_order_of_lines_between_quarters_is_free(tmp_path, policy):
    rows = rows_by_hand()
    [dump] = read_dump(write(tmp_path / "7.jsonl", rows[::-1]), policy)
    assert [policy.text(rollout.tokens) for rollout in dump.groups[0].rollouts] == ["4", "1é"]


def edited(line, **changes):
    def edit(rows):
        rows[line - 1] |= changes
        return rows

    return edit


def without(line, key):
    def edit(rows):
        del rows[line - 1][key]
        return rows

    return edit


def second_question(rows):
    """With one response more of each mode under the normal prompt."""
    more = [row | {"in_batch_ids": 5} for row in rows]
    return rows + more + [more[0], more[2]]


def two_questions(line, **changes):
    """Lines 5 to 8 are those of another question."""
    return lambda rows: edited(line, **changes)([*rows, *(row | {"in_batch_ids": 5} for row in rows)])


ODD = "user\nsystem\nBe odd.\nuser\n2+2?\nassistant\n"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda rows: [], r"d\.jsonl: holds no rollouts; give a file of the trainer's rollout_data_dir"),
        (
            without(2, "uuids"),
            r"d\.jsonl:2: no key 'uuids'; a line of a rollout dump has input, output, .*ground_truth",
        ),
        (without(4, "ground_truth"), r"d\.jsonl:4: no key 'ground_truth'"),
        (edited(1, input=None), r"d\.jsonl:1: input is null; it must be text"),
        (edited(1, output="\ud800"), r"d\.jsonl:1: output holds half a surrogate pair; repair the text"),
        (edited(1, score="1"), r'd\.jsonl:1: score is "1"; it must be a finite number, or null'),
        (edited(1, score=True), r"d\.jsonl:1: score is true; it must be a finite number"),
        (edited(1, score=float("nan")), r"d\.jsonl:1: malformed JSON \(NaN is no number\)"),
        (edited(3, step=7.0), r"d\.jsonl:3: step is 7\.0; it must be an integer"),
        (edited(3, in_batch_ids=False), r"d\.jsonl:3: in_batch_ids is false; it must be an integer"),
        (edited(3, is_he_prompt=0), r"d\.jsonl:3: is_he_prompt is 0; it must be true or false"),
        (edited(3, is_he_response="no"), r'd\.jsonl:3: is_he_response is "no"; it must be true or false'),
        (edited(3, uuids=4), r"d\.jsonl:3: uuids is 4; it must be text"),
        (
            lambda rows: rows[:3],
            r"step 7: question 0 \(in_batch_ids\) has 0 normal responses under the high-entropy pro",
        ),
        (
            second_question,
            r"d\.jsonl: step 7: question 5 \(in_batch_ids\) has 2 normal responses under the normal prompt",
        ),
        (edited(1, score=None), r"step 7: normal responses have no score but null; grade them first"),
        (edited(3, score=None), r"step 7: high_entropy responses have no score but null; grade them first"),
        (edited(4, ground_truth="5"), r"d\.jsonl:4: ground_truth is not that of .*d\.jsonl:1, .* in_batch_ids"),
        (edited(3, uuids="b"), r"d\.jsonl:3: uuids is not that of .*d\.jsonl:1"),
        (edited(4, uuids="a"), r"d\.jsonl:4: uuids is not that of .*d\.jsonl:2"),
        (edited(3, input="user\n2+3?\nassistant\n"), r"d\.jsonl:3: input is not that of .*d\.jsonl:1"),
        (edited(4, output="5"), r"d\.jsonl:4: output is not that of .*d\.jsonl:1, which it shares"),
        (
            edited(2, input=ODD),
            r"d\.jsonl:2: input does not begin with 'system\\n' and end with '\\nuser\\n2\+2\?\\nassis",
        ),
        (
            lambda rows: edited(3, input="2+2?")(edited(1, input="2+2?")(rows)),
            r"d\.jsonl:1: input does not begin with 'user\\n' and end with '\\nassistant\\n', as the model's chat",
        ),
        (
            two_questions(6, input="system\nBe even.\nuser\n2+2?\nassistant\n"),
            r"d\.jsonl:6: the high-entropy prompt is not that of the step's first question",
        ),
        (
            edited(4, input="user\n2+2?\nassistant\n"),
            r"d\.jsonl:4: input is not the question's high-entropy prompt, nei",
        ),
        (
            two_questions(8, input="system\nBe odd.\nuser\n2+2?\nassistant\n"),
            r"d\.jsonl:8: input is not the question's high-entropy prompt, neither .* in the step's other lines",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, policy, edit, words):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in edit(rows_by_hand())), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_dump(path, policy)


@pytest.mark.parametrize("name", ["max_new_tokens", "microbatch_questions"])
def test_options_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        ScoreOptions(**{name: 0})


# ---------------------------------------------------------------------------------------------- the real tokenizer


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("kind", ["user_turn", "system"])
def test_prompts_of_qwen3_are_taken_apart(tmp_path, shared, policy, thinking, kind):
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "qwen3_tokenizer")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    real = Policy(tmp_path, policy.config, tokenizer, (stop,), ModePrompts("unknown", thinking))
    end = "\nassistant\n" if thinking else "\nassistant\n<think>\n\n</think>\n\n"
    question = "user\nIs $\\frac{1}{2}$ é?\nassistant"
    system = f"system\nBe odd.\nuser\n{question}{end}"
    turn = {"system": system, "user_turn": f"user\nsystem\nBe odd.\nuser\n{question}{end}"}[kind]
    # Encoded anew, the accent becomes one with its letter.
    outputs = ("<think>\nhm\n</think>\n\n\\boxed{e\u0301}", "1 ", "1 ", "<think>\nhm\n</think>\n\n\\boxed{é}")
    inputs = (f"user\n{question}{end}", system, f"user\n{question}{end}", turn)
    rows = [
        row | {"input": text, "output": output}
        for row, text, output in zip(rows_by_hand(), inputs, outputs, strict=True)
    ]
    [dump] = read_dump(write(tmp_path / "1.jsonl", rows), real)
    [group] = dump.groups
    assert (group.row.question, dump.policy.prompts, dump.shared_prompt) == (
        question,
        ModePrompts("Be odd.", thinking),
        kind,
    )
    messages = [{"role": "system", "content": "Be odd."}, {"role": "user", "content": question}]
    for mode, turns in ((NORMAL, messages[1:]), (HIGH_ENTROPY, messages)):
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert group.prompts[mode] == tokenizer(text)["input_ids"]
    assert [list(r.tokens) for r in group.rollouts] == [[*tokenizer(text)["input_ids"], stop] for text in outputs[:2]]
    assert [list(ids) for ids in dump.shared[0].responses] == [tokenizer(outputs[i])["input_ids"] for i in (3, 2)]
