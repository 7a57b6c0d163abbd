"""AdamW with gradient clipping, and its learning-rate schedule."""

import numpy as np
import optax

from policy_split_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of each update: linear warm-up, then constant, cosine or linear decay."""
    rate, final = config.learning_rate, config.learning_rate * config.final_fraction
    main = {
        "constant": lambda: optax.constant_schedule(rate),
        "cosine": lambda: optax.cosine_decay_schedule(rate, config.decay_steps, config.final_fraction),
        "linear": lambda: optax.linear_schedule(rate, final, config.decay_steps),
    }[config.decay]()
    if not config.warmup_steps:
        return main
    # The first update already moves: step i of n has i+1 n-ths of the rate.
    warmup = optax.linear_schedule(rate / config.warmup_steps, rate, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def next_rate(config: OptimizerConfig, opt_state: optax.OptState) -> float:
    """Learning rate of the update that comes next: updates that were skipped do not count."""
    made = optax.tree.get(opt_state, "ScaleByScheduleState").count
    # On the host: with several processes, the count lies on all of their devices.
    return float(np.asarray(make_schedule(config)(np.asarray(made))))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(
            make_schedule(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mu_dtype=config.first_moment,
        ),
    )
