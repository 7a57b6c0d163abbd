"""The update in PyTorch, as one would write it there: transformers' Qwen3, one loss, autograd, AdamW."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policy_split_jax.training.batch import Batch

ALPHA, ETA, KAPPA, EPS, CLIP = 0.5, 0.03, 2.0, 1e-6, 0.2


def sequences(batch: Batch) -> dict[str, Tensor]:
    """Every rollout behind both of its prompts, [P, 2·G, S + T]: the normal mode's first."""
    prompts, responses = torch.tensor(batch.prompts.tolist()), torch.tensor(batch.responses.tolist())
    (questions, _, width), (_, group, length) = prompts.shape, responses.shape
    before = torch.arange(width) >= width - torch.tensor(batch.prompt_lengths.tolist())[..., None]
    after = torch.arange(length) < torch.tensor(batch.response_lengths.tolist())[..., None]

    def join(left: Tensor, right: Tensor) -> Tensor:
        left = left[:, :, None].expand(questions, 2, group, width)
        right = right[:, None].expand(questions, 2, group, length)
        return torch.cat([left, right], dim=-1).flatten(1, 2)

    return {"ids": join(prompts, responses), "seen": join(before, after), "mask": after,
            "rewards": torch.tensor(batch.rewards.tolist())}  # fmt: skip


def make_loss(model: Any, width: int) -> Callable[..., Tensor]:
    """The weighted loss of some questions: both modes' scores, advantages, ratio 1, clipped surrogate."""

    def loss(ids: Tensor, seen: Tensor, mask: Tensor, rewards: Tensor, weight: Tensor) -> Tensor:
        questions, group, length = mask.shape
        positions = (seen.long().cumsum(-1) - 1).clamp(min=0)
        hidden = model.model(
            input_ids=ids.flatten(0, 1), attention_mask=seen.long().flatten(0, 1), position_ids=positions.flatten(0, 1)
        ).last_hidden_state
        logits = model.lm_head(hidden[:, width - 1 : -1])
        logp = torch.log_softmax(logits, dim=-1)
        chosen = logp.gather(-1, ids.flatten(0, 1)[:, width:, None])[..., 0]
        chosen = chosen.view(questions, 2, group, length)
        with torch.no_grad():
            measure(logp.view(questions, 2, group, length, -1))
            advantages = dual_mode_advantages(chosen, rewards, mask)
        ratio = torch.exp(chosen - chosen.detach())
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        return -(surrogate * mask[:, None] * weight).sum()

    return loss


def measure(logp: Tensor) -> tuple[Tensor, Tensor]:
    """Entropies of both modes, and the divergences between them."""
    p = logp.exp()
    return -(p * logp).sum(-1), (p * (logp - logp.flip(1))).sum(-1)


def dual_mode_advantages(logp: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Equations 1 to 4 with every rollout graded, [P, 2, G, T]."""
    centred = rewards - rewards.mean(1, keepdim=True)
    outcome = (centred / (rewards.std(1, keepdim=True) + EPS))[..., None]
    bonus = -ALPHA * logp[:, 1] - (1 - ALPHA) * logp[:, 0]
    count = mask.sum((1, 2), keepdim=True)
    mean = (bonus * mask).sum((1, 2), keepdim=True) / count
    deviation = (bonus - mean) * mask
    scaled = deviation / ((deviation**2).sum((1, 2), keepdim=True) / (count - 1)).sqrt().add(EPS)
    limit = outcome.abs() / KAPPA
    return torch.stack([outcome.expand_as(bonus), outcome + ETA * scaled.clamp(-limit, limit)], dim=1)


def make_update(model: Any, batch: Batch, questions: int, compiled: bool) -> Callable[[], float]:
    """A step on `batch`, `questions` at a time."""
    whole = sequences(batch)
    loss = make_loss(model, batch.prompts.shape[-1])
    loss = torch.compile(loss) if compiled else loss
    weight = 1 / whole["mask"].sum()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01)

    def update() -> float:
        total = 0.0
        for at in range(0, len(whole["ids"]), questions):
            value = loss(**{name: values[at : at + questions] for name, values in whole.items()}, weight=weight)
            value.backward()
            total += value.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return update
