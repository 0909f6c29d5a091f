"""One training step as a pure function: state and batch in, state and metrics out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import P
from jaxtyping import Array, Float, Int

from instructrec_jax.config import Config, TrainConfig
from instructrec_jax.models.adapters import Tree, join, split, with_magnitudes
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import LanguageModel, Sizes, apply, init_variables
from instructrec_jax.models.sharding import BATCH
from instructrec_jax.training import loss as losses

State = dict[str, Any]  # {"params": what is trained, "opt": tree, "step": int32 scalar}
Batch = dict[str, Array]  # every value [A, B/A, S]: A micro-batches
BATCH_SPEC = P(None, BATCH, None)


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then cosine decay to ``final_lr_fraction``; defined for any number of steps."""
    warmup = min(config.warmup_steps, max(config.steps // 2, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        warmup,
        max(config.steps, warmup + 1),
        config.learning_rate * config.final_lr_fraction,
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW; norms, biases, single vectors and DoRA's magnitudes are not decayed."""

    def decayed(params: Any) -> Any:
        def leaf(path: tuple, x: Any) -> bool:
            name = jax.tree_util.keystr(path)
            return not any(part in name for part in ("norm", "bias", "unknown_item", "magnitude"))

        return jax.tree_util.tree_map_with_path(leaf, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule(config), config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decayed),
    )


def init_model(
    config: Config,
    arch: Architecture,
    sizes: Sizes,
    content: Float[Array, "I Fc"],
    seed: int,
    base: Tree | None = None,
) -> tuple[Tree, Tree]:
    """(trained, frozen) collections, every leaf born with its sharding. ``base`` are the parameters of a published model.

    What ``base`` holds is not initialised: only the adapter, and the item tokens and heads, get fresh values.
    """
    base = base or {}

    def fresh(key: Array, content: Array, base: Tree) -> Tree:
        variables = init_variables(arch, sizes, config.model, key, content)
        own = {name: value for name, value in variables["params"].items() if name not in base}
        variables = with_magnitudes({**variables, "params": {**own, **base}}, config.model.adapter)
        return {**variables, "params": own}

    variables = jax.jit(fresh)(jax.random.key(seed), content, base)
    variables["params"] = {**base, **variables["params"]}
    return split(variables, config.model.trainable)


def init_state(params: Tree, config: TrainConfig) -> State:
    """The state at step 0 of given trained parameters."""
    # Jitted, tx.init would put the moments on one device; eagerly they keep the parameters' sharding.
    opt = optimizer(config).init(params)
    opt = jax.tree.map(lambda x: jax.reshard(x, P()) if x.ndim == 0 else x, opt)
    return {"params": params, "opt": opt, "step": jax.reshard(jnp.int32(0), P())}


def make_train_step(
    config: Config, arch: Architecture, sizes: Sizes, num_items: int
) -> Callable[[State, Tree, Batch, Array], tuple[State, dict[str, Array]]]:
    """The jitted step ``(state, frozen, batch, content) -> (state, metrics)``; the state is donated.

    loss = w_item · Σ item_nll / Σ item targets + w_text · Σ text_nll / Σ text targets, where the denominators are counted over the
    whole batch before the first micro-batch: accumulation gives the full-batch gradient, however targets are spread.
    """
    train = config.train
    model = LanguageModel(arch, sizes, config.model, train=True)
    tx = optimizer(train)
    rate = schedule(train)
    head = "words" if arch.tied_head else "word_head"

    def micro_loss(
        params: Tree, frozen: Tree, batch: Batch, content: Array, key: Array, totals: tuple[Array, Array]
    ) -> tuple[Array, Any]:
        out = apply(model, join(params, frozen), batch, content, rngs={"dropout": key})
        item = losses.item_loss(out, batch, num_items, train.label_smoothing, train.logits_chunk)
        text = losses.word_loss(
            out, batch, train.logits_chunk, arch, tiles=train.vocab_tiles, learns=head in params.get("params", {})
        )
        loss = train.item_loss_weight * item.loss / totals[0] + train.text_loss_weight * text.loss / totals[1]
        return loss, {"item": item._asdict(), "text": text._asdict()}

    def step(state: State, frozen: Tree, batch: Batch, content: Array) -> tuple[State, dict[str, Array]]:
        totals = tuple(
            jnp.maximum(jnp.sum(batch[k] > 0).astype(jnp.float32), 1.0) for k in ("item_target", "text_target")
        )
        key = jax.random.fold_in(jax.random.key(train.seed), state["step"])
        grad = jax.value_and_grad(micro_loss, has_aux=True)

        def accumulate(carry: tuple, part: tuple[Batch, Int[Array, ""]]) -> tuple[tuple, None]:
            micro, number = part
            (loss, sums), grads = grad(state["params"], frozen, micro, content, jax.random.fold_in(key, number), totals)
            return jax.tree.map(jnp.add, carry, (loss, sums, grads)), None

        count = batch["tokens"].shape[0]
        if count == 1:
            only = {k: v[0] for k, v in batch.items()}
            (loss, sums), grads = grad(state["params"], frozen, only, content, jax.random.fold_in(key, 0), totals)
        else:
            zero = losses.zero_sums()._asdict()
            start = (jnp.float32(0), {"item": zero, "text": zero}, jax.tree.map(jnp.zeros_like, state["params"]))
            (loss, sums, grads), _ = jax.lax.scan(accumulate, start, (batch, jnp.arange(count)))

        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate(state["step"]),
            "useful_tokens": jnp.sum(batch["segment_ids"] > 0),
            **{f"{head}_{k}": v for head, part in sums.items() for k, v in part.items()},
        }
        return {"params": params, "opt": opt, "step": state["step"] + 1}, metrics

    return jax.jit(step, donate_argnums=0)


def put_batch(batch: dict[str, Any], accumulate: int) -> Batch:
    """Host arrays ``[B, S]`` of this process as global arrays ``[A, B/A, S]`` on the mesh."""
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), BATCH_SPEC)
    return {
        k: jax.make_array_from_process_local_data(sharding, v.reshape(accumulate, v.shape[0] // accumulate, v.shape[1]))
        for k, v in batch.items()
    }
