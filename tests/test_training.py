"""The step and the loop: sums and weights, layouts, resume, stops."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructrec_jax import config as configs
from instructrec_jax import learnt_from, prepare, run
from instructrec_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.models import architecture
from instructrec_jax.models.language_model import item_logits, word_logits
from instructrec_jax.training import loop
from instructrec_jax.training import loss as losses
from instructrec_jax.training.checkpoint import Checkpoints, check_writable
from instructrec_jax.training.mesh import make_mesh
from instructrec_jax.training.step import init_model, init_state, make_train_step, put_batch
from tests.tiny import NUM_ITEMS, SIZES, content, model_of, on_mesh, random_batch, tiny_config, write_slice

MODEL = ModelConfig(width=32, heads=4, kv_heads=2, head_size=8, mlp_width=64, dropout=0.2, item_dropout=0.1)
TRAIN = TrainConfig(batch_size=16, sequence_length=32, logits_chunk=8, steps=20, warmup_steps=2, label_smoothing=0.1)


def run_steps(mesh: jax.sharding.Mesh, config: Config, steps: int) -> tuple[list[float], dict]:
    with jax.set_mesh(mesh):
        features = content()
        arch = architecture.from_numbers(config.model, SIZES.vocab)
        trained, frozen = init_model(config, arch, SIZES, features, 0)
        state = init_state(trained, config.train)
        step = make_train_step(config, arch, SIZES, NUM_ITEMS)
        out = []
        for number in range(steps):
            batch = put_batch(random_batch(16, 32, seed=number), config.train.accumulate)
            state, metrics = step(state, frozen, batch, features)
            out.append(float(metrics["loss"]))
        return out, jax.device_get(state["params"])


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((8, 1, 1), marks=pytest.mark.slow), pytest.param((1, 4, 2), marks=pytest.mark.slow), (2, 2, 2)],
)
def test_losses_are_the_same_on_every_mesh(sizes: tuple[int, int, int]) -> None:
    config = Config(model=MODEL, train=TRAIN)
    alone, params = run_steps(one_device(), config, 5)
    spread, others = run_steps(make_mesh(MeshConfig(*sizes)), config, 5)
    np.testing.assert_allclose(alone, spread, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, others)


def test_accumulated_equals_full_batch() -> None:
    model = dataclasses.replace(MODEL, dropout=0.0, item_dropout=0.0)
    full, params = run_steps(one_device(), Config(model=model, train=TRAIN), 3)
    parts, others = run_steps(one_device(), Config(model=model, train=dataclasses.replace(TRAIN, accumulate=4)), 3)
    np.testing.assert_allclose(full, parts, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, others)


@pytest.mark.parametrize("chunk", [4, 8, 32])
def test_chunked_losses_equal_the_whole_softmax(chunk: int) -> None:
    model = dataclasses.replace(MODEL, dropout=0.0, item_dropout=0.0)
    batch = random_batch(4, 32)
    batch["item_target"][1] = 0  # a row without targets
    with jax.set_mesh(one_device()):
        features, device = content(), on_mesh(batch)
        decoder = model_of(model)
        params = jax.jit(decoder.init)(jax.random.key(0), device, features)
        out = jax.jit(decoder.apply)(params, device, features)
        sums = jax.jit(lambda o, b: losses.item_loss(o, b, NUM_ITEMS, 0.1, chunk))(out, device)
        words = jax.jit(lambda o, b: losses.word_loss(o, b, chunk, decoder.arch))(out, device)
        log_items = jax.nn.log_softmax(item_logits(out.hidden, out, NUM_ITEMS)[..., :NUM_ITEMS])
        log_words = jax.nn.log_softmax(word_logits(out.hidden, out, decoder.arch))
    rows, columns = np.nonzero(batch["item_target"])
    picked = np.asarray(log_items)[rows, columns]
    nll = -0.9 * picked[np.arange(len(rows)), batch["item_target"][rows, columns] - 1] - 0.1 * picked.mean(-1)
    assert float(sums.count) == len(rows)
    assert float(sums.loss) == pytest.approx(nll.sum(), rel=1e-5)
    by_task = np.bincount(batch["task"][rows, columns], nll, minlength=losses.NUM_TASKS)
    np.testing.assert_allclose(np.asarray(sums.task_loss), by_task, rtol=1e-4)
    rows, columns = np.nonzero(batch["text_target"])
    expected = -np.asarray(log_words)[rows, columns, batch["text_target"][rows, columns] - 1].sum()
    assert float(words.loss) == pytest.approx(expected, rel=1e-5)


def test_gradient_of_the_chunked_loss() -> None:
    batch = random_batch(4, 32)
    model = dataclasses.replace(MODEL, dropout=0.0, item_dropout=0.0)
    with jax.set_mesh(one_device()):
        features, device = content(), on_mesh(batch)
        decoder = model_of(model)
        params = jax.jit(decoder.init)(jax.random.key(0), device, features)

        def chunked(params: dict) -> jax.Array:
            return losses.item_loss(decoder.apply(params, device, features), device, NUM_ITEMS, 0.0, 8).loss

        def whole(params: dict) -> jax.Array:
            out = decoder.apply(params, device, features)
            logits = jax.nn.log_softmax(item_logits(out.hidden, out, NUM_ITEMS))
            wanted = device["item_target"][..., None] - 1 == jnp.arange(SIZES.items)
            return -jnp.sum(jnp.where(wanted, logits, 0.0))

        a, b = jax.jit(jax.grad(chunked))(params), jax.jit(jax.grad(whole))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=2e-4, rtol=1e-4), a, b)


# ------------------------------------------------------------------------------------------------------------ the loop


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("training")
    write_slice(tmp / "data")
    prepare.prepare(tiny_config(tmp), lambda _: None)
    return tmp


def trained_params(config: Config, folder: Path, step: int) -> dict:
    with run.session(config) as s:
        template = s.start()[0]
        checkpoints = Checkpoints(folder / "checkpoints")
        params = jax.device_get(checkpoints.restore_params(step, template))
        checkpoints.close()
    return params


def test_resumed_equals_uninterrupted_bit_for_bit(prepared: Path, tmp_path: Path) -> None:
    config = tiny_config(prepared, steps=40, eval_every=20, checkpoint_every=4)
    lines: list[str] = []
    run.train_run(config, tmp_path / "whole", lines.append)

    # The second run is killed by SIGKILL while it trains, and continued by the same call.
    script = (
        "import sys; from pathlib import Path; from instructrec_jax import config, run\n"
        "c = config.load(sys.argv[1]); run.train_run(c, Path(sys.argv[2]), lambda s: print(s, flush=True))"
    )
    (tmp_path / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
    command = [sys.executable, "-c", script, str(tmp_path / "config.yaml"), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step      6"):
            deadline = time.monotonic() + 60
            while not (tmp_path / "killed/checkpoints/4").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            process.kill()
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    resumed: list[str] = []
    finished = run.train_run(config, tmp_path / "killed", resumed.append)
    assert any("resumed from step" in line for line in resumed), resumed
    assert (tmp_path / "killed" / learnt_from.FILE).is_file()
    assert finished.step == config.train.steps

    whole, killed = (trained_params(config, tmp_path / name, config.train.steps) for name in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, whole, killed)
    # The log has every step once.
    text = (tmp_path / "killed/metrics.jsonl").read_text(encoding="utf-8")
    assert text.count('"loss"') == config.train.steps // config.train.log_every


def test_sigterm_saves_and_the_same_call_continues(prepared: Path, tmp_path: Path) -> None:
    config = tiny_config(prepared, checkpoint_every=100, eval_every=100)

    def say(line: str) -> None:
        if line.startswith("step      2"):
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = run.train_run(config, tmp_path, say)
    assert stopped.stopped and 2 <= stopped.step < config.train.steps
    lines: list[str] = []
    finished = run.train_run(config, tmp_path, lines.append)
    assert f"resumed from step {stopped.step}" in lines and finished.step == config.train.steps


def test_the_best_step_is_kept(prepared: Path, tmp_path: Path) -> None:
    config = tiny_config(prepared, steps=6, eval_every=1, keep=1, learning_rate=0.05)
    finished = run.train_run(config, tmp_path, lambda _: None)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert finished.best_step == checkpoints.best()
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    checkpoints.close()
    assert finished.best_step in kept and 6 in kept and len(kept) <= 2


def test_a_loss_that_is_not_finite_stops_with_the_window(prepared: Path, tmp_path: Path) -> None:
    config = tiny_config(prepared, learning_rate=1e30, warmup_steps=1)
    with pytest.raises(UserError, match=r"NaN or infinite at step \d+ \(window \d+\.\.\d+\)"):
        run.train_run(config, tmp_path, lambda _: None)


def test_a_state_that_is_not_finite_is_not_saved(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that would tell it comes at step 8, and a checkpoint would be due at steps 2, 4 and 6."""
    make, calls = loop.make_train_step, []

    def make_broken(*arguments: Any) -> Any:
        step = make(*arguments)

        def run(state: Any, *rest: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                state = {**state, "params": jax.tree.map(lambda x: x * jnp.nan, state["params"])}
            return step(state, *rest)

        return run

    monkeypatch.setattr(loop, "make_train_step", make_broken)
    config = tiny_config(prepared, log_every=8, eval_every=8)
    with pytest.raises(UserError, match=r"NaN or infinite at step 3 \(window 1\.\.4\)"):
        run.train_run(config, tmp_path, lambda _: None)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_chunk_and_accumulation_must_divide(prepared: Path, tmp_path: Path) -> None:
    for bad in ({"logits_chunk": 24}, {"accumulate": 5}):
        with pytest.raises(ConfigError, match=r"= \d+"):
            run.train_run(tiny_config(prepared, **bad), tmp_path, lambda _: None)


def test_too_little_disk_stops_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MB free; the checkpoints of this run need .* MB"):
        check_writable(tmp_path, 1 << 60)
