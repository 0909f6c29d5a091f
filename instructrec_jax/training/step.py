"""One training step as a pure function: state and batch in, state and metrics out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P
from jaxtyping import Array, Float, Int

from instructrec_jax.config import Config, TrainConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models.adapters import Tree, join, split, with_magnitudes
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import LanguageModel, Output, Sizes, apply, init_variables
from instructrec_jax.models.sharding import BATCH
from instructrec_jax.training import loss as losses
from instructrec_jax.training.optimisers import optimizer, schedule
from instructrec_jax.training.sampled import Proposal, drawn, proposal, sampled_item_loss

State = dict[
    str, Any
]  # {"params": what is trained, "opt": tree, "step": int32 scalar}, and "ema" like params if asked for
Batch = dict[str, Array]  # every value [A, B/A, S]: A micro-batches
BATCH_SPEC = P(None, BATCH, None)


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
    state = {"params": params, "opt": opt, "step": jax.reshard(jnp.int32(0), P())}
    # A copy: the step donates both.
    return {**state, "ema": jax.tree.map(jnp.copy, params)} if config.ema else state


def evaluated(state: State) -> Tree:
    """What validation and export take: the running mean of the weights if there is one."""
    return state.get("ema", state["params"])


def averaged(ema: Tree, params: Tree, step: Int[Array, ""], decay: float) -> Tree:
    """The running mean after ``step`` (from 0). It starts short, min(decay, (1 + t) / (10 + t)): the first weights are soon forgotten."""
    now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1 - now) * (new - old), ema, params)


MicroLoss = Callable[
    [Tree, Batch, Array], tuple[Array, dict[str, Any]]
]  # (params, part of a batch, key) -> (loss, sums by head)


def batch_gradients(
    micro_loss: MicroLoss, params: Tree, batch: Batch, key: Array
) -> tuple[Array, dict[str, Any], Tree]:
    """Loss, sums by head, and gradients, added up over the micro-batches: one after the other, where there are several."""
    grad = jax.value_and_grad(micro_loss, has_aux=True)

    def add(carry: tuple, part: tuple[Batch, Int[Array, ""]]) -> tuple[tuple, None]:
        micro, number = part
        (loss, sums), grads = grad(params, micro, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, carry, (loss, sums, grads)), None

    count = batch["tokens"].shape[0]
    if count == 1:
        (loss, sums), grads = grad(params, {k: v[0] for k, v in batch.items()}, jax.random.fold_in(key, 0))
        return loss, sums, grads
    _, sums = jax.eval_shape(micro_loss, params, {k: v[0] for k, v in batch.items()}, key)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    start = (jnp.float32(0), zero, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, start, (batch, jnp.arange(count)))[0]


def head_losses(
    out: Output,
    batch: Batch,
    totals: tuple[Array, Array],
    num_items: int,
    train: TrainConfig,
    arch: Architecture,
    learns: bool = True,
    sampled: tuple[Proposal, Array] | None = None,
    spaces: tuple[int, ...] = (),
) -> tuple[Array, dict[str, Any]]:
    """The loss of a part of a batch, and its sums by head; ``totals`` are the whole batch's numbers of item and text targets, and
    ``learns`` is whether the word head does. ``sampled``: the negatives of the step and what they were drawn from, where the loss on
    items is not over the whole catalogue. ``spaces``: as of ``Sizes``.

    loss = w_item · Σ item_nll / Σ item targets + w_text · Σ text_nll / Σ text targets, and the re-ranking head's, over the item targets,
    where there is one. With a z-loss every nll of words and of the catalogue has z · log² Z beside it, Z being the softmax's normaliser
    (PaLM, arXiv 2204.02311, section 5).
    """
    if sampled is None:
        item = losses.item_loss(out, batch, num_items, train.label_smoothing, train.logits_chunk, spaces)
    else:
        item = sampled_item_loss(out, batch, sampled[1], sampled[0], train)
    text = losses.word_loss(out, batch, train.logits_chunk, arch, tiles=train.vocab_tiles, learns=learns)
    by_item = train.item_loss_weight * (item.loss + train.z_loss * item.z) / totals[0]
    by_text = train.text_loss_weight * (text.loss + train.z_loss * text.z) / totals[1]
    loss, sums = by_item + by_text, {"item": item._asdict(), "text": text._asdict()}
    if out.rerank_direction is not None:
        rerank = losses.rerank_loss(
            out, batch, num_items, train.rerank_candidates, train.rerank_teacher, train.logits_chunk, spaces
        )
        loss = loss + train.rerank_loss_weight * rerank.loss / totals[0]
        sums["rerank"] = rerank._asdict()
    return loss, sums


def count_targets(batch: Batch) -> tuple[Array, Array]:
    """Numbers of item and text targets of a whole batch, at least 1."""
    item, text = (jnp.sum(batch[k] > 0).astype(jnp.float32) for k in ("item_target", "text_target"))
    return jnp.maximum(item, 1.0), jnp.maximum(text, 1.0)


def make_train_step(
    config: Config,
    arch: Architecture,
    sizes: Sizes,
    num_items: int,
    popularity: Int[np.ndarray, " I"] | None = None,
) -> Callable[[State, Tree, Batch, Array], tuple[State, dict[str, Array]]]:
    """The jitted step ``(state, frozen, batch, content) -> (state, metrics)``; the state is donated.

    Targets are counted over the whole batch before the first micro-batch: accumulation gives the full-batch gradient, however
    targets are spread. ``popularity``, training events of every item, is what negatives may be drawn by.
    """
    train = config.train
    if sizes.spaces and train.item_loss != "full":
        raise ConfigError(
            f"train.item_loss = {train.item_loss} draws negatives from one catalogue, and there are {len(sizes.spaces)}",
            remedy="set train.item_loss: full",
        )
    given = proposal(train, num_items, popularity) if train.item_loss != "full" and sizes.items else None
    model = LanguageModel(arch, sizes, config.model, train=True)
    tx = optimizer(train)
    rate = schedule(train)
    learns = not {"all", "embeddings"}.isdisjoint(config.model.trainable)

    def step(state: State, frozen: Tree, batch: Batch, content: Array) -> tuple[State, dict[str, Array]]:
        totals = count_targets(batch)
        key = jax.random.fold_in(jax.random.key(train.seed), state["step"])
        sampled = None
        if given is not None:
            sampled = given, drawn(given, train.item_negatives, jax.random.fold_in(key, 0x5A))

        def micro_loss(params: Tree, micro: Batch, key: Array) -> tuple[Array, dict[str, Any]]:
            out = apply(model, join(params, frozen), micro, content, rngs={"dropout": key})
            return head_losses(out, micro, totals, num_items, train, arch, learns, sampled, sizes.spaces)

        loss, sums, grads = batch_gradients(micro_loss, state["params"], batch, key)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = cast(Tree, optax.apply_updates(state["params"], updates))
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate(state["step"]),
            "useful_tokens": jnp.sum(batch["segment_ids"] > 0),
            # Pairs that causal attention reads, for the FLOPs.
            "attended": jnp.sum(jnp.where(batch["segment_ids"] > 0, batch["positions"] + 1, 0).astype(jnp.float32)),
            **{f"{head}_{k}": v for head, part in sums.items() for k, v in part.items()},
        }
        new = {"params": params, "opt": opt, "step": state["step"] + 1}
        if train.ema:
            new["ema"] = averaged(state["ema"], cast(Tree, params), state["step"], train.ema)
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def put_batch(batch: dict[str, Any], accumulate: int) -> Batch:
    """Host arrays ``[B, S]`` of this process as global arrays ``[A, B/A, S]`` on the mesh."""
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), BATCH_SPEC)
    return {
        k: jax.make_array_from_process_local_data(sharding, v.reshape(accumulate, v.shape[0] // accumulate, v.shape[1]))
        for k, v in batch.items()
    }
