"""Flags of the compiler that matter, in one place: ``hosts.start`` applies them where the user has not set them otherwise."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

MIB = 2**20

# After NVIDIA's guide for language models (JAX-Toolbox, docs/GPU_performance.md). Their gain was not measured by this project.
GPU = {
    # Collectives start early and compute runs meanwhile; without it a gather of weights stands between two layers.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # In the loop over layers, the next layer's weights are gathered and the last one's gradients sent during this layer.
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    # One collective for a layer instead of one for each matrix: at least a layer's bytes (31 MB for Qwen3-0.6B in
    # bfloat16), and not many more, since they are all in memory at once.
    "xla_gpu_all_gather_combine_threshold_bytes": str(128 * MIB),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(128 * MIB),
    "xla_gpu_all_reduce_combine_threshold_bytes": str(128 * MIB),
}

# Nothing is here for speed: with the flags that others set for asynchronous collectives (xla_tpu_enable_async_collective_fusion*,
# xla_tpu_overlap_compute_collective_tc, xla_enable_async_all_gather, xla_tpu_enable_data_parallel_all_reduce_opt) libtpu 0.0.52
# compiles a sharded loop over layers to the same program, on one v5e slice and on two.
TPU = {
    # libtpu 0.0.42 (with jax 0.10.2) moves the sum over devices out of the loop that accumulates an embedding's gradient, and the
    # result is wrong on a sharded table (github.com/openxla/xla/issues/49143). From 0.0.52 on it stays inside by itself.
    "xla_disable_hlo_passes": "while-loop-all-reduce-code-motion",
}

# For processors with AMX (docs/benchmarks.md). Their gain on others was not measured.
CPU = {
    # Products by Eigen, whose inner loops are oneDNN's, in place of YNNPACK's: a tenth to a quarter faster in float32.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # Products in bfloat16 by oneDNN: 1,100 GFLOP/s of a core, where YNNPACK reaches 370, and 100 in a weight's gradient.
    "xla_cpu_experimental_onednn_custom_call": "true",
}

FLAGS = {"gpu": GPU, "tpu": TPU, "cpu": CPU}
PLUGINS = {
    "tpu": ("libtpu",),
    "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
}  # in the order in which JAX prefers them
# A process that reads a flag its jaxlib does not know ends at once. So versions that were not tried get none.
TRIED = ((0, 10), (0, 12))


def apply(platform: str | None = None, environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Add the platform's flags to ``XLA_FLAGS``; to be called before JAX starts a backend. A second call adds nothing.

    Args:
        platform: "gpu", "tpu" or "cpu"; by default what JAX will choose.
        environ: a flag that already stands in it keeps its value.

    Returns:
        The flags added, like ``--xla_gpu_enable_latency_hiding_scheduler=true``.
    """
    added = [f"--{name}={value}" for name, value in missing(platform or accelerator(environ), environ).items()]
    if added:
        environ["XLA_FLAGS"] = " ".join([*environ.get("XLA_FLAGS", "").split(), *added])
    return added


def missing(platform: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The platform's flags that ``XLA_FLAGS`` does not set. As ``compiler_options`` they hold for one compilation, in any process."""
    if not TRIED[0] <= _jaxlib() <= TRIED[1]:
        return {}
    names = {flag.removeprefix("--").split("=")[0] for flag in environ.get("XLA_FLAGS", "").split()}
    if platform == "cpu" and not _amx():
        return {}
    return {name: value for name, value in FLAGS.get(platform, {}).items() if name not in names}


def accelerator(environ: MutableMapping[str, str] = os.environ) -> str:
    """The platform that JAX will choose, "tpu", "gpu" or "cpu": by ``JAX_PLATFORMS`` and by the plugins that are installed."""
    asked = environ.get("JAX_PLATFORMS", "").replace("cuda", "gpu")
    for platform, plugins in PLUGINS.items():
        if (not asked or platform in asked.split(",")) and any(importlib.util.find_spec(name) for name in plugins):
            return platform
    return "cpu"


def _amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies matrices of bfloat16 by itself."""
    try:
        return "amx_bf16" in cpuinfo.read_text().split()
    except OSError:  # not Linux
        return False


def _jaxlib() -> tuple[int, int]:
    major, minor = importlib.metadata.version("jaxlib").split(".")[:2]
    return int(major), int(minor)
