"""What a training step takes, as shapes: for compiling it, or adding up its bytes, where neither weights nor devices are at hand."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instructrec_jax.config import Config
from instructrec_jax.data.loader import BATCH_KEYS
from instructrec_jax.models.adapters import Tree, split
from instructrec_jax.models.architecture import Architecture, from_numbers
from instructrec_jax.models.hf.sizes import find
from instructrec_jax.models.language_model import Sizes, init_variables
from instructrec_jax.models.sharding import RULES, padded
from instructrec_jax.training.step import BATCH_SPEC, State, init_state


class StepShapes(NamedTuple):
    """The arguments of ``make_train_step``'s step; every leaf has shape, type and partition spec."""

    state: State
    frozen: Tree
    batch: dict[str, Any]
    content: Any


def architecture_of(config: Config, items: int, users: int = 0) -> tuple[Architecture, Sizes]:
    """Architecture and table sizes of a config, without its data and without published weights.

    Args:
        config: a known name, or a folder, as ``model.pretrained``; or a model from scratch.
        items: of the catalogue; used where the model has items at all.
        users: values of user features.

    Raises:
        UserError: the pretrained model is not known.
    """
    m = config.model
    vocab = padded(find(m.pretrained).vocab if m.pretrained else m.vocab_size)
    arch = find(m.pretrained) if m.pretrained else from_numbers(m, vocab)
    if not (m.uses_items and items):
        return arch, Sizes(vocab)
    return arch, Sizes(vocab, padded(items), padded(users, 64) if users else 0, m.content_features)


def step_shapes(config: Config, arch: Architecture, sizes: Sizes) -> StepShapes:
    """Shapes, types and partition specs of a step's arguments. Call it on a mesh, real or abstract; nothing is allocated."""
    rows = config.train.batch_size // config.train.accumulate
    shape = (config.train.accumulate, rows, config.train.sequence_length)

    def start() -> tuple[Tree, Tree]:
        variables = init_variables(arch, sizes, config.model, jax.random.key(0))
        return split(variables, config.model.trainable)

    trained, frozen = jax.eval_shape(start)
    state = jax.eval_shape(partial(init_state, config=config.train), trained)
    types = {name: jnp.float32 if name == "feature_value" else jnp.int32 for name in BATCH_KEYS}
    mesh = jax.sharding.get_abstract_mesh()
    batch = {k: jax.ShapeDtypeStruct(shape, v, sharding=jax.NamedSharding(mesh, BATCH_SPEC)) for k, v in types.items()}
    content = jax.ShapeDtypeStruct(
        (sizes.items, sizes.content), jnp.float32, sharding=jax.NamedSharding(mesh, RULES.table_used)
    )
    return StepShapes(state, frozen, batch, content)
