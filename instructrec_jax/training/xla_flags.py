"""Flags of the compiler that matter for speed, in one place: ``hosts.start`` applies them where the user has set nothing else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import MutableMapping

MIB = 2**20

# After NVIDIA's guide for language models (JAX-Toolbox, docs/GPU_performance.md). Not measured by this project.
GPU = {
    # Collectives start early and compute runs meanwhile: without it a gather of weights stands between two layers.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # Inside the loop over layers: the next layer's weights are gathered, and the last one's gradients sent, during this layer.
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    # One collective for a layer instead of one for each matrix. At least a layer's weights in bytes, and more costs memory:
    # a layer of Qwen3-0.6B has 31 MB in bfloat16.
    "xla_gpu_all_gather_combine_threshold_bytes": str(128 * MIB),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(128 * MIB),
    "xla_gpu_all_reduce_combine_threshold_bytes": str(128 * MIB),
}
# Asynchronous collectives fused with compute are libtpu's default: with the flags that other projects set for them
# (xla_tpu_enable_async_collective_fusion*, xla_enable_async_all_gather, xla_tpu_overlap_compute_collective_tc) a loop over
# layers whose weights are gathered compiles for v5e to the same program.
TPU: dict[str, str] = {}

# A process that reads a flag unknown to its version ends at once, so other versions than the tested ones get none.
TESTED = {"jaxlib": ((0, 10), (0, 12)), "libtpu": ((0, 0, 42), (0, 0, 52))}
_WHERE = {"gpu": ("XLA_FLAGS", "jaxlib", GPU), "tpu": ("LIBTPU_INIT_ARGS", "libtpu", TPU)}


def apply(platform: str | None = None, environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Add the flags of the platform to ``environ``; to be called before JAX starts a backend. A second call adds nothing.

    Args:
        platform: "gpu", "tpu" or "cpu"; what JAX will find, by default.
        environ: a flag that stands there already keeps the user's value.

    Returns:
        The flags that were added, like ``--xla_gpu_enable_latency_hiding_scheduler=true``.
    """
    platform = platform or accelerator(environ)
    if platform not in _WHERE:
        return []
    variable, package, flags = _WHERE[platform]
    if not tested(package):
        return []
    given = environ.get(variable, "").split()
    names = {word.removeprefix("--").split("=")[0] for word in given}
    added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
    if added:
        environ[variable] = " ".join(given + added)
    return added


def accelerator(environ: MutableMapping[str, str] = os.environ) -> str:
    """The platform that JAX will choose, by ``JAX_PLATFORMS`` and the plugins installed: "tpu", "gpu" or "cpu"."""
    asked = environ.get("JAX_PLATFORMS", "").replace("cuda", "gpu").split(",")
    for platform, plugins in (("tpu", ["libtpu"]), ("gpu", ["jax_cuda12_plugin", "jax_cuda13_plugin"])):
        if asked not in ([""], ["cpu"]) and platform not in asked:
            continue
        if asked != ["cpu"] and any(importlib.util.find_spec(name) for name in plugins):
            return platform
    return "cpu"


def tested(package: str) -> bool:
    """Whether the installed version is one that is known to have the flags."""
    least, most = TESTED[package]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    numbers = tuple(int(part) for part in version.split(".")[: len(least)] if part.isdigit())
    return least <= numbers <= most
