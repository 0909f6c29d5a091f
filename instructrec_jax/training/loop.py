"""Training, in the order in which it happens. There is no Trainer: this function is the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructrec_jax.config import Config, dump, to_dict
from instructrec_jax.data.tokenise import TASKS
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.files import write_atomic, write_json
from instructrec_jax.models.adapters import Tree
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.models.sharding import check_divides
from instructrec_jax.training import hosts
from instructrec_jax.training.checkpoint import Checkpoints, check_writable
from instructrec_jax.training.log import MetricsFile, format_seconds, peak_flops, step_flops
from instructrec_jax.training.mesh import mesh_sizes
from instructrec_jax.training.step import State, init_state, make_train_step, put_batch

# (params, what to call now and then) -> {"ndcg@10": ..., "hr@10": ...}
Validate = Callable[[Any, Callable[[], None]], dict[str, float]]


@dataclass(frozen=True)
class Finished:
    """How a call of ``train`` ended."""

    step: int
    best_step: int | None
    best: dict[str, float]
    stopped: bool  # True: SIGTERM, SIGINT or a preemption notice; the same command resumes


def train(
    config: Config,
    run_dir: Path,
    *,
    batches: Iterator[dict[str, np.ndarray]],
    content: jax.Array,
    arch: Architecture,
    sizes: Sizes,
    trained: Tree,
    frozen: Tree,
    num_items: int,
    validate: Validate,
    say: Callable[[str], None],
) -> Finished:
    """Train until ``config.train.steps``, resuming from the run's last complete checkpoint.

    Args:
        config: the resolved config; written to ``run_dir/config.yaml`` and into every checkpoint.
        run_dir: where checkpoints, ``metrics.jsonl`` and TensorBoard events go.
        batches: this process's loader; its position is saved with the state.
        content: item features ``[I, Fc]`` on the mesh. Call inside ``jax.set_mesh``.
        arch: the model's.
        sizes: table sizes; ``num_items`` is the number of real items in the padded item table.
        trained: parameters at step 0 that learn; the run's own, since their buffers are reused.
        frozen: the others, which no checkpoint holds.
        num_items: real items.
        validate: metrics of given parameters on the validation split. It calls its second argument between batches, which raises
            ``hosts.Stopped`` when the run is to stop.
        say: prints one line; of several processes the first one speaks.

    Raises:
        UserError: a loss that is not finite (with the step window), a plan that does not divide, a folder that cannot be written.
    """
    settings = config.train
    started = time.perf_counter()
    say = hosts.voice(say)

    # --------------------------------------------------------------------------------------------------- check the plan
    mesh = mesh_sizes(config.mesh, jax.device_count())
    if settings.batch_size % settings.accumulate:
        raise ConfigError(
            f"train.batch_size = {settings.batch_size} does not divide into train.accumulate = {settings.accumulate} parts"
        )
    if settings.sequence_length % settings.logits_chunk:
        raise ConfigError(
            f"train.sequence_length = {settings.sequence_length} is not a multiple of train.logits_chunk = {settings.logits_chunk}"
        )
    check_divides(arch, mesh, settings.batch_size // settings.accumulate)

    # -------------------------------------------------------------------------------------- state: fresh, or the last saved
    state: State = init_state(trained, settings)
    del trained  # donated to the first step
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    check_writable(run_dir, state_bytes * (settings.keep + 2))
    if hosts.first():
        write_atomic(run_dir / "config.yaml", dump(config))
    checkpoints = Checkpoints(run_dir / "checkpoints", settings.keep, settings.keep_every, clean=True)
    parameters, fixed = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state["params"], frozen))
    say(
        f"{parameters:,} parameters learn{f', {fixed:,} are frozen' if fixed else ''}; {state_bytes / 1e6:.1f} MB of state; mesh {mesh}"
    )
    say(
        f"{settings.batch_size} rows x {settings.sequence_length} tokens a step in {settings.accumulate} micro-batch(es)"
    )
    first = checkpoints.latest() or 0
    if first:
        state = checkpoints.restore(first, state, batches)
        say(f"resumed from step {first}")
    if first >= settings.steps:
        say(f"nothing to do: the run is at step {first} of {settings.steps}")

    # ------------------------------------------------------------------------------------------------------ the train loop
    train_step = make_train_step(config, arch, sizes, num_items)
    metrics_file = MetricsFile(run_dir, first)
    peak = peak_flops()
    stop = hosts.StopRequest()
    best: dict[str, float] = {}
    passes = 2 if fixed else 3
    window = Window()
    step = saved = first

    def due(step: int) -> bool:
        return step > 0 and (step % settings.eval_every == 0 or step == settings.steps)

    def validate_and_save() -> None:
        nonlocal best, saved
        begun = time.perf_counter()
        try:
            best = validate(state["params"], stop.leave)
        except hosts.Stopped:
            return  # the step is saved without metrics, and the run that resumes validates first
        metrics_file.write(
            step, {f"valid_{k}": v for k, v in best.items()} | {"valid_seconds": time.perf_counter() - begun}
        )
        say(f"step {step}: validation " + ", ".join(f"{k} {v:.4f}" for k, v in best.items()))
        checkpoints.save(step, state, batches, to_dict(config), best)
        saved = step
        window.restart_clock()

    try:
        if due(first) and not checkpoints.metrics(first):
            validate_and_save()
        while step < settings.steps and not stop.poll():
            waited = time.perf_counter()
            batch = put_batch(next(batches), settings.accumulate)
            window.waited += time.perf_counter() - waited
            state, metrics = train_step(state, frozen, batch, content)
            window.add(metrics)
            step += 1

            if step % settings.log_every == 0 or step == settings.steps:
                values = window.summary(step, config, arch, sizes, passes, peak)
                metrics_file.write(step, values)
                done = step - first
                eta = (settings.steps - step) * (time.perf_counter() - started) / max(done, 1)
                say(log_line(step, settings.steps, values, eta))
                window = Window()

            if due(step):
                validate_and_save()
            elif step % settings.checkpoint_every == 0:
                checkpoints.save(step, state, batches, to_dict(config), None)
                saved = step
        if stop.name and saved != step:
            checkpoints.save(step, state, batches, to_dict(config), None)
    finally:
        stop.release()
        metrics_file.close()
        checkpoints.wait()

    # ------------------------------------------------------------------------------------------------------------- the end
    if stop.name:
        say(f"{stop.name}: saved step {step}; the same command continues from there")
    best_step = checkpoints.best()
    best = checkpoints.metrics(best_step) if best_step is not None else {}
    seconds = time.perf_counter() - started
    if hosts.first():
        end = {"step": step, "best_step": best_step, "best": best, "seconds_this_call": seconds}
        write_json(run_dir / "finished.json", end)
    checkpoints.close()
    return Finished(step, best_step, best, bool(stop.name))


class Window:
    """Metrics of the steps since the last log line, kept on the device until they are printed."""

    def __init__(self) -> None:
        self._metrics: list[dict[str, jax.Array]] = []
        self._began = time.perf_counter()
        self.waited = 0.0

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Take one step's metrics without waiting for them."""
        self._metrics.append(metrics)

    def restart_clock(self) -> None:
        """Leave validation out of the step time of a window that has no steps yet."""
        if not self._metrics:
            self._began = time.perf_counter()

    def summary(
        self, step: int, config: Config, arch: Architecture, sizes: Sizes, passes: int, peak: float
    ) -> dict[str, float]:
        """Means over the window, after checking that every step was finite."""
        host = jax.device_get(self._metrics)
        seconds = time.perf_counter() - self._began
        loss = np.asarray([m["loss"] for m in host])
        norm = np.asarray([m["grad_norm"] for m in host])
        if not (np.isfinite(loss).all() and np.isfinite(norm).all()):
            bad = step - len(host) + 1 + int(np.argmax(~(np.isfinite(loss) & np.isfinite(norm))))
            raise UserError(
                f"loss or gradient became NaN or infinite at step {bad} (window {step - len(host) + 1}..{step})",
                remedy="resume from the last checkpoint with a lower train.learning_rate, or more train.warmup_steps",
            )

        def total(name: str) -> Any:
            return sum(np.asarray(m[name], np.float64) for m in host)

        tokens = float(total("useful_tokens"))
        capacity = len(host) * config.train.batch_size * config.train.sequence_length
        # The mean distance that attention covers within a row is not known here; half the row bounds it.
        flops = step_flops(
            arch,
            sizes,
            int(tokens),
            config.train.sequence_length // 2,
            float(total("item_count")),
            float(total("text_count")),
            passes,
        )
        values = {
            "loss": float(loss.mean()),
            "item_loss": float(total("item_loss") / max(total("item_count"), 1)),
            "text_loss": float(total("text_loss") / max(total("text_count"), 1)),
            "grad_norm": float(norm.mean()),
            "learning_rate": float(host[-1]["learning_rate"]),
            "step_seconds": seconds / len(host),
            "tokens_per_second": tokens / seconds,
            "useful_share": tokens / capacity,
            "useful_mfu": flops / seconds / peak,
            "input_stall": self.waited / seconds,
        }
        for head in ("item", "text"):
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
        f"{values['tokens_per_second']:,.0f} tok/s | MFU {100 * values['useful_mfu']:.0f}% | "
        f"input stall {100 * values['input_stall']:.1f}% | ETA {format_seconds(eta)}"
    )
