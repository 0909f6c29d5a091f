"""What a run writes while it trains: JSON lines always, TensorBoard events by default, one line a step on the terminal."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from instructrec_jax.files import GrowingCopy, in_bucket, write_atomic
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.training import hosts

# Dense bf16 peak of one chip in FLOP/s, as the vendors publish it; matched against jax.Device.device_kind.
PEAKS = {
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6": 918e12,
    "v4": 275e12,
    "h100": 989e12,
    "h200": 989e12,
    "a100": 312e12,
}


def format_seconds(seconds: float) -> str:
    """``4:05`` or ``1:02:03``."""
    whole = max(int(seconds), 0)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class MetricsFile:
    """``metrics.jsonl`` and TensorBoard events of one run. On resume, lines of steps that will be done again are dropped.

    The first process writes them. In a bucket no file can grow: there they are copies of local ones, at most a minute old.
    """

    def __init__(self, folder: Path, resume_step: int):
        self._writes = hosts.first()
        if not self._writes:
            return
        from tensorboardX import SummaryWriter

        self._copy = GrowingCopy(folder) if in_bucket(folder) else None
        folder = self._copy.local if self._copy else folder
        self._path = folder / "metrics.jsonl"
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line)
                except (ValueError, KeyError):
                    continue  # a line cut off by a kill
        write_atomic(self._path, "".join(line + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step or None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One JSON line, and one scalar per number for TensorBoard."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for key, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(key, value, step)
        if self._copy:
            self._copy.update()

    def close(self) -> None:
        """Flush and close both."""
        if not self._writes:
            return
        self._file.close()
        self._board.close()
        if self._copy:
            self._copy.close()


def peak_flops() -> float:
    """FLOP/s of all devices: the published bf16 peak where the chip is known, else a float32 matrix multiply measured now."""
    kind = jax.devices()[0].device_kind.lower()
    for name, peak in PEAKS.items():
        if name in kind:
            return peak * jax.device_count()
    a = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    multiply(a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds)


def step_flops(
    arch: Architecture,
    sizes: Sizes,
    tokens: int,
    length: int,
    item_targets: float,
    text_targets: float,
    passes: int = 3,
) -> float:
    """Analytic FLOPs of one training step: 2 per weight, token and pass, attention halved for causality, heads only where they
    predict.

    ``passes`` is 3 where all weights learn (forward, and two products backward), 2 where they are frozen. ``tokens`` counts the
    tokens that are not padding, so this divided by time and peak is the useful-token MFU. An encoder-decoder is counted as if all
    tokens passed through both stacks.
    """
    attention = arch.width * (2 * arch.heads + 2 * arch.kv_heads) * arch.head_size
    layer = attention + (3 if arch.gated else 2) * arch.width * arch.mlp_width
    layers = arch.layers + arch.encoder_layers
    body = 2 * passes * tokens * layers * (layer + arch.heads * arch.head_size * length)
    heads = 2 * passes * arch.width * (item_targets * sizes.items + text_targets * sizes.vocab)
    content = 2 * passes * sizes.items * sizes.content * arch.width
    return body + heads + content
