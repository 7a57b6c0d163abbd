"""What TPUs can do, as their makers say: the one table of it."""

from dataclasses import dataclass

GIB = 1 << 30
_RESERVED = GIB // 4
"""What the TPU compiler keeps of HBM: it offers 15.75 of 16 GiB."""


@dataclass(frozen=True)
class Chip:
    """One accelerator, as JAX counts devices."""

    name: str
    flops: float
    """bfloat16 operations a second, without sparsity."""
    memory: int
    """Bytes of HBM that programs may use."""
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second to all neighbours together, one way."""
    source: str


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB - _RESERVED, 1228e9, 300e9, "https://cloud.google.com/tpu/docs/v4"),
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB - _RESERVED, 819e9, 200e9, "https://cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB - _RESERVED, 2765e9, 600e9, "https://cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB - _RESERVED, 1640e9, 400e9, "https://cloud.google.com/tpu/docs/v6e"),
}
"""By the word before the colon of a topology's name."""
