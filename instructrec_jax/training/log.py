"""What a run says while it trains: JSON lines always, other writers as asked for, a line on the terminal now and then.

Model FLOP utilisation (MFU) is analytic operations over time and peak. *Useful* counts tokens that are not padding, and the pairs of
tokens that attention may read; *raw* counts every place of every row, with causal attention over the whole row (half of all pairs).
Neither counts what is computed again for the backward pass.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructrec_jax.config import Config
from instructrec_jax.data.tokenise import TASKS
from instructrec_jax.errors import UserError
from instructrec_jax.files import GrowingCopy, in_bucket, write_atomic
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.training import hosts
from instructrec_jax.training.goodput import Ledger
from instructrec_jax.training.writers import open_writers

# Dense bf16 peak of one chip in FLOP/s, as the vendors publish it; matched against jax.Device.device_kind.
PEAKS = {
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "tpu v5": 459e12,  # as JAX names it
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


class Metrics:
    """``metrics.jsonl`` of one run, and the writers beside it. On resume, lines of steps that will be done again are dropped.

    The first process writes them. In a bucket no file can grow: there they are copies of local ones, at most a minute old.
    """

    def __init__(self, folder: Path, config: Config, resume_step: int):
        self._writes = hosts.first()
        if not self._writes:
            return
        self._copy = GrowingCopy(folder) if in_bucket(folder) else None
        name, folder = folder.name, self._copy.local if self._copy else folder
        self._writers = open_writers(folder, name, config, resume_step)
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

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One JSON line, and the finite numbers for every writer."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for writer in self._writers:
            writer.write(step, numbers)
        if self._copy:
            self._copy.update()

    def close(self) -> None:
        """Flush and close all."""
        if not self._writes:
            return
        self._file.close()
        for writer in self._writers:
            writer.close()
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
    tokens: float,
    pairs: float,
    item_targets: float,
    text_targets: float,
    passes: int = 3,
) -> float:
    """Analytic FLOPs of one training step: 2 per weight, token and pass; heads only where they predict.

    ``tokens`` is the number of tokens and ``pairs`` that of (token, token that it reads) in attention: a causal row of S has S (S + 1) / 2,
    half of the square. ``passes`` is 3 where all weights learn (forward, and two products backward), 2 where they are frozen; attention
    has no weights and always has 3. An encoder-decoder is counted as if all tokens passed through both stacks.
    """
    projections = arch.width * (2 * arch.heads + 2 * arch.kv_heads) * arch.head_size
    layer = projections + (3 if arch.gated else 2) * arch.width * arch.mlp_width
    layers = arch.layers + arch.encoder_layers
    body = 2 * passes * tokens * layers * layer
    attention = 2 * 3 * layers * pairs * 2 * arch.heads * arch.head_size
    heads = 2 * passes * arch.width * (item_targets * sizes.items + text_targets * sizes.vocab)
    content = 2 * passes * sizes.items * sizes.content * arch.width
    return body + attention + heads + content


class Window:
    """Metrics of the steps since the last log line, kept on the device until they are printed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._before = ledger, ledger.seconds()
        self._metrics: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Take one step's metrics without waiting for them."""
        self._metrics.append(metrics)

    def check(self, step: int) -> list[dict[str, Any]]:
        """The metrics of the steps up to ``step``, after checking that each was finite; waits for them.

        Raises:
            UserError: a loss or gradient that is not finite, with the step and the window.
        """
        host = jax.device_get(self._metrics)
        fine = np.asarray([np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]) for m in host], bool)
        if not fine.all():
            start = step - len(host) + 1
            raise UserError(
                f"loss or gradient became NaN or infinite at step {start + int(np.argmin(fine))} (window {start}..{step})",
                remedy="resume from the last checkpoint with a lower train.learning_rate, or more train.warmup_steps",
            )
        return host

    def summary(
        self, step: int, config: Config, arch: Architecture, sizes: Sizes, passes: int, peak: float
    ) -> dict[str, float]:
        """Means over the window, after ``check``; its time is that of steps and of waiting for batches."""
        host = self.check(step)
        spent = {kind: now - self._before[kind] for kind, now in self._ledger.seconds().items()}
        # A window of one step may have nothing but the one that compiles.
        seconds = spent["step"] + spent["data"] + (spent["compile"] if len(host) == 1 else 0.0)
        loss = np.asarray([m["loss"] for m in host])
        norm = np.asarray([m["grad_norm"] for m in host])

        def total(name: str) -> Any:
            return sum(np.asarray(m[name], np.float64) for m in host)

        train = config.train
        tokens, targets = float(total("useful_tokens")), (float(total("item_count")), float(total("text_count")))
        places = len(host) * train.batch_size * train.sequence_length
        useful = step_flops(arch, sizes, tokens, float(total("attended")), *targets, passes)
        raw = step_flops(arch, sizes, places, places * (train.sequence_length + 1) / 2, *targets, passes)
        heads = [head for head in ("item", "text", "rerank") if f"{head}_loss" in host[0]]
        values = {
            "loss": float(loss.mean()),
            **{f"{head}_loss": float(total(f"{head}_loss") / max(total(f"{head}_count"), 1)) for head in heads},
            "grad_norm": float(norm.mean()),
            "learning_rate": float(host[-1]["learning_rate"]),
            "step_seconds": seconds / len(host),
            "tokens_per_second": tokens / seconds,
            "useful_share": tokens / places,
            "useful_mfu": useful / seconds / peak,
            "raw_mfu": raw / seconds / peak,
            "input_stall": spent["data"] / seconds,
        }
        for head in heads:
            task_loss, task_count = total(f"{head}_task_loss"), total(f"{head}_task_count")
            for number, task in enumerate(TASKS, start=1):
                if task_count[number]:
                    values[f"{head}_loss/{task}"] = float(task_loss[number] / task_count[number])
        return {k: v for k, v in values.items() if math.isfinite(v)}


def log_line(step: int, steps: int, values: dict[str, float], eta: float) -> str:
    """The one line of a log step."""
    return (
        f"step {step:>6}/{steps} {100 * step / steps:3.0f}% | loss {values['loss']:.3f} (item {values['item_loss']:.3f}, "
        f"text {values['text_loss']:.3f}) | lr {values['learning_rate']:.1e} | {1e3 * values['step_seconds']:.0f} ms/step | "
        f"{values['tokens_per_second']:,.0f} tok/s | MFU {100 * values['useful_mfu']:.0f}% useful, {100 * values['raw_mfu']:.0f}% raw | "
        f"input stall {100 * values['input_stall']:.1f}% | ETA {format_seconds(eta)}"
    )
