"""Policy Split: one Qwen3 model, a normal and a high-entropy policy, trained together in JAX."""

__version__ = "0.1.0"
