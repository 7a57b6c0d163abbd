"""What accelerators can do, as their makers say: the one table of it."""

from dataclasses import dataclass

GIB = 1 << 30
_RESERVED = GIB // 4
"""What the TPU compiler keeps of HBM: it offers 15.75 of 16 GiB."""


_H100_BYTES = 84_929_347_584
_GPU_SHARE = 0.92
"""What launch/gpu.sh lets JAX take of a GPU's memory."""


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
    "h100": Chip(
        "H100 SXM",
        989e12,
        int(_GPU_SHARE * _H100_BYTES),
        3350e9,
        450e9,
        "https://www.nvidia.com/en-us/data-center/h100",
    ),
}
"""By the word before the colon of a topology's name."""

GPU_TARGETS = {
    "h100": f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA H100 80GB HBM3"
        dnn_version_info {{ major: 9 minor: 8 }}
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: 9 }}
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
          l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: {_H100_BYTES}
        }}
    """
}
"""What XLA asks of a GPU before it compiles for it, as XLA's `GpuTargetConfigProto`."""
