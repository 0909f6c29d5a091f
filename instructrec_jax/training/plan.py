"""What a training step will take, by arithmetic on shapes: bytes on each chip, what moves between chips, operations and time.

No compiler and no chip is asked. Stored arrays are added up exactly, from their shapes and partition specs. What lives for a part of the
step alone is estimated: the inputs that a remat policy keeps (``models/remat.py``), one layer's activations and their gradients (in the
way of Korthikanti et al. 2022, arXiv 2205.05198, section 4), one gathered layer, and one tile of the word head with its logits.
``tools/aot_check.py`` has the compiler's account of the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from instructrec_jax.config import Config
from instructrec_jax.models import attention, quantise
from instructrec_jax.models.adapters import Tree, join
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.models.sharding import MESH_AXES
from instructrec_jax.training.chips import Chip
from instructrec_jax.training.log import step_flops
from instructrec_jax.training.mesh import check_plan
from instructrec_jax.training.shapes import StepShapes, step_shapes

UTILISATION = 0.4  # of the peak: what a well-fed step reaches


class Moved(NamedTuple):
    """A collective of a step: how often it runs, and the bytes of its results on each chip."""

    what: str
    kind: str
    axis: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """All numbers of a plan; bytes are those on each chip."""

    devices: int
    mesh: dict[str, int]
    trained: int  # parameters
    frozen: int
    stored: dict[str, int]  # name -> bytes that stay
    working: dict[str, int]  # name -> bytes at the step's fullest moment
    moved: list[Moved] = field(default_factory=list)
    tokens: int = 0  # of a step, padding included
    flops: float = 0.0  # of a step whose rows are full and whose every position has a target
    chip: Chip | None = None  # None = memory and peak are not known
    tokens_per_epoch: int | None = None  # None = the data is not prepared

    @property
    def arguments(self) -> int:
        """Bytes that stay."""
        return sum(self.stored.values())

    @property
    def temporaries(self) -> int:
        """Bytes at the fullest moment beside them."""
        return sum(self.working.values())

    @property
    def total(self) -> int:
        """Both."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool | None:
        """Whether a chip has the memory; None = not known."""
        return None if self.chip is None else self.total <= self.chip.memory

    @property
    def seconds(self) -> float | None:
        """Time of a step at 40 % of the peak."""
        return None if self.chip is None else self.flops / (UTILISATION * self.chip.peak * self.devices)

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps that read every example once, if rows are packed without a gap."""
        return None if self.tokens_per_epoch is None else max(1, round(self.tokens_per_epoch / self.tokens))


def make_plan(
    config: Config,
    arch: Architecture,
    sizes: Sizes,
    devices: int,
    chip: Chip | None = None,
    *,
    fused: bool = True,
    tokens_per_epoch: int | None = None,
) -> Plan:
    """The plan of a config's training step.

    Args:
        config: the run's.
        arch, sizes: see ``architecture_of``.
        devices: how many.
        chip: what one is.
        fused: whether attention runs in the kernel that keeps its scores on the chip, where it fits (TPUs).
        tokens_per_epoch: of the prepared data.

    Raises:
        ConfigError: the plan does not divide over the mesh.
    """
    mesh = check_plan(config, arch, sizes, devices)
    axes = jax.sharding.AbstractMesh(tuple(mesh.values()), MESH_AXES, axis_types=(AxisType.Explicit,) * 3)
    with jax.sharding.use_abstract_mesh(axes):
        shapes = step_shapes(config, arch, sizes)
    t = config.train
    rows = t.batch_size // t.accumulate // (mesh["replica"] * mesh["fsdp"])
    stored = {
        "trained weights": _bytes(shapes.state["params"]),
        "frozen weights": _bytes(shapes.frozen),
        "optimiser": _bytes(shapes.state["opt"]),
        "mean of the weights": _bytes(shapes.state.get("ema", {})),
        "batch and item features": _bytes(shapes.batch) + _bytes(shapes.content),
    }
    part = _Part(config, arch, sizes, mesh, rows, shapes, fused)
    tokens = t.batch_size * t.sequence_length
    pairs = t.batch_size * t.sequence_length * (t.sequence_length + 1) / 2
    whole = "all" in config.model.trainable
    items = tokens if sizes.items else 0
    words = tokens if t.text_loss_weight else 0
    return Plan(
        devices=devices,
        mesh=mesh,
        trained=_count(shapes.state["params"]),
        frozen=_count(shapes.frozen),
        stored={name: size for name, size in stored.items() if size},
        working=part.working(),
        moved=part.moved(),
        tokens=tokens,
        flops=step_flops(arch, sizes, tokens, pairs, items, words, 3 if whole else 2),
        chip=chip,
        tokens_per_epoch=tokens_per_epoch,
    )


def _bytes(tree: Any) -> int:
    return sum(_local(leaf) for leaf in jax.tree.leaves(tree))


def _local(leaf: Any, *, gathered: bool = False, dtype: Any = None) -> int:
    """Bytes of an array on each device, as it is stored or without its ``fsdp``."""
    sharding = leaf.sharding
    if gathered:
        spec = jax.P(*(None if axis == "fsdp" else axis for axis in sharding.spec))
        sharding = jax.NamedSharding(sharding.mesh, spec)
    return math.prod(sharding.shard_shape(leaf.shape)) * jnp.dtype(dtype or leaf.dtype).itemsize


def _count(tree: Any) -> int:
    """Parameters: two to a byte of NF4, and no scales of quantised weights."""
    if quantise.is_quantised(tree):
        return tree["int8"].size if "int8" in tree else tree["nf4"].size * (2 if tree["nf4"].dtype == jnp.uint8 else 1)
    return sum(map(_count, tree.values())) if isinstance(tree, dict) else tree.size


@dataclass(frozen=True)
class _Part:
    """What a step has on each chip beside what is stored, for the rows of one micro-batch."""

    config: Config
    arch: Architecture
    sizes: Sizes
    mesh: dict[str, int]
    rows: int
    shapes: StepShapes
    fused: bool

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)

    @property
    def tokens(self) -> int:
        return self.rows * self.config.train.sequence_length

    @property
    def layers(self) -> int:
        return self.arch.layers + self.arch.encoder_layers

    @property
    def hidden(self) -> int:
        """Bytes of one [B, S, D]."""
        return self.tokens * self.arch.width * self.dtype.itemsize

    def _in_layers(self, tree: Tree) -> list[Any]:
        params = tree.get("params", {})
        return jax.tree.leaves({k: v for k, v in params.items() if "layer" in k})

    def _layers_bytes(self, *, gathered: bool, floats: bool = True) -> int:
        """Bytes of all layers' matrices as they are used: floats in the compute type, quantised parts as they are."""
        total = 0
        for leaf in self._in_layers(join(self.shapes.state["params"], self.shapes.frozen)):
            integer = not jnp.issubdtype(leaf.dtype, jnp.floating)
            total += (
                _local(leaf, gathered=gathered, dtype=leaf.dtype if integer else self.dtype) if floats or integer else 0
            )
        return total

    def activations(self) -> tuple[int, int, int]:
        """Bytes of (attention's, the MLP's) forward values of a layer, and of the layer's input."""
        a, tensor = self.arch, self.mesh["tensor"]
        queries, keys = a.heads * a.head_size // tensor, 2 * a.kv_heads * a.head_size // tensor
        attended = a.width + queries + keys + queries  # normed input, what attention reads, what it gives
        attended += queries + keys // 2 if a.qk_norm else 0  # queries and keys before their norm
        mlp = a.width + (3 if a.gated else 2) * a.mlp_width // tensor
        size = self.tokens * self.dtype.itemsize
        scores = 0 if self._fuses() else 2 * 4 * self.tokens * self.config.train.sequence_length * a.heads // tensor
        return attended * size + scores, mlp * size, self.hidden

    def _fuses(self) -> bool:
        a, length = self.arch, self.config.train.sequence_length
        plain = a.kind == "decoder" and not a.window and not a.attention_softcap and a.positions != "relative"
        return self.fused and self.config.model.attention != "reference" and plain and attention.fits(length, length)

    def kept(self) -> int:
        """Bytes that a layer keeps for the backward pass."""
        a, tensor, size = self.arch, self.mesh["tensor"], self.tokens * self.dtype.itemsize
        attended, mlp, start = self.activations()
        queries = a.heads * a.head_size // tensor * size
        keys = 2 * a.kv_heads * a.head_size // tensor * size
        wide = (2 if a.gated else 1) * a.mlp_width // tensor * size
        return {
            "none": attended + mlp + start,
            "dots": 3 * start + queries + keys + wide,
            "qkv": start + 2 * queries + keys,
            "attention": start + queries,
        }.get(self.config.model.remat, start)

    def kept_by_all(self) -> int:
        """Bytes that all layers keep: each its own, or each group its input, and those of one group what is theirs."""
        group = self.config.model.layer_group
        if group == 1:
            return self.kept() * self.layers
        return self.layers // group * self.hidden + group * self.kept()

    def working(self) -> dict[str, int]:
        """Bytes by name, at the fullest moment: the backward pass of the first layers."""
        a, remat = self.arch, self.config.model.remat
        attended, mlp, start = self.activations()
        size = self.tokens * self.dtype.itemsize // self.mesh["tensor"]
        # Gradients beside the values: of attention's queries (float32 once), keys and values; of the MLP's inner values.
        by_attended = (3 * a.heads + 2 * a.kv_heads) * a.head_size * size + start
        by_mlp = (3 if a.gated else 2) * a.mlp_width * size + start
        again = 0 if remat == "none" else 1
        if remat == "least":
            layer = max(attended + by_attended, mlp + by_mlp) + start
        else:
            layer = again * (attended + mlp) + max(by_attended, by_mlp) + start
        one = self._layers_bytes(gathered=True) // self.layers
        # Without rematerialisation what a product keeps is the gathered weight.
        gathered = one * self.layers if remat == "none" and self.mesh["fsdp"] > 1 else one
        cast = self._layers_bytes(gathered=False) if self._casts() else 0
        parts = {
            "gradients": _bytes(self.shapes.state["params"]) * (2 if self.config.train.accumulate > 1 else 1),
            "kept by the layers": self.kept_by_all(),
            "weights in use": gathered + cast + self._dequantised(),
        }
        head = self._head()
        name = "one layer's backward pass" if layer >= head else "word head and logits"
        return {**parts, name: max(layer, head)}

    def _casts(self) -> bool:
        """Whether the stored layers have another type than the compute type: the compiler converts them all at once."""
        leaves = self._in_layers(join(self.shapes.state["params"], self.shapes.frozen))
        return any(jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 2 and x.dtype != self.dtype for x in leaves)

    def _dequantised(self) -> int:
        """Bytes of the largest quantised weight of a layer, as floats."""
        codes = [x for x in self._in_layers(self.shapes.frozen) if x.dtype in (jnp.uint8, jnp.int8)]
        return max((_local(x, gathered=True, dtype=jnp.int8) * (2 if x.dtype == jnp.uint8 else 1) for x in codes), default=0) \
            // self.layers * self.dtype.itemsize  # fmt: skip

    def _head(self) -> int:
        """Bytes of the loss on words: a tile of the table with its gradient, its logits and their gradient, hidden states."""
        t, wide = self.config.train, 4
        rows = self.sizes.vocab // self.mesh["tensor"] // t.vocab_tiles
        tile = rows * self.arch.width * (self.dtype.itemsize + (wide if self._head_learns() else 0))
        logits = 2 * self.rows * min(t.logits_chunk, t.sequence_length) * rows * wide
        return tile + logits + self.hidden + self.tokens * self.arch.width * wide

    def _head_learns(self) -> bool:
        return not {"all", "embeddings"}.isdisjoint(self.config.model.trainable)

    # ---------------------------------------------------------------------------------------------------- between chips

    def moved(self) -> list[Moved]:
        """The collectives of a step; an axis of size 1 has none."""
        t, mesh = self.config.train, self.mesh
        micro, layers, remat = t.accumulate, self.layers, self.config.model.remat
        grouped = int(self.config.model.layer_group > 1)  # forward once more
        out = []
        leaves = self._in_layers(join(self.shapes.state["params"], self.shapes.frozen))
        matrices = len([x for x in leaves if "fsdp" in x.sharding.spec])
        learnt = [x for x in self._in_layers(self.shapes.state["params"]) if x.ndim > 2]
        learnt += jax.tree.leaves(self.shapes.state["params"].get("lora", {}))
        table = self.sizes.vocab // mesh["tensor"] * self.arch.width
        if mesh["fsdp"] > 1:
            passes = (1 if remat == "none" else 2) + grouped
            whole = self._layers_bytes(gathered=True)
            count = matrices * (layers if self.config.model.scan_layers else 1)
            out.append(
                Moved("weights of the layers", "all-gather", "fsdp", micro * passes * count, micro * passes * whole)
            )
            tiles = 2 * micro * t.vocab_tiles
            out.append(Moved("word head", "all-gather", "fsdp", tiles, 2 * micro * table * self.dtype.itemsize))
            out.append(Moved("rows of the word table", "all-to-all", "fsdp", 2 * micro, 2 * micro * self.hidden))
            size = sum(_local(x, gathered=True, dtype=self.dtype) for x in learnt)
            out.append(Moved("gradients", "reduce", "fsdp", micro * layers, micro * size))
            if self._head_learns():
                out.append(
                    Moved("gradient of the word head", "reduce", "fsdp", micro * t.vocab_tiles, micro * table * 4)
                )
        if mesh["tensor"] > 1:
            passes = (4 if remat == "none" else 6) + 2 * grouped  # two sums a layer: forward, again, backward
            out.append(
                Moved(
                    "activations",
                    "all-reduce",
                    "tensor",
                    micro * passes * layers,
                    micro * passes * layers * self.hidden,
                )
            )
        if mesh["replica"] > 1:
            size = _bytes(self.shapes.state["params"])
            out.append(Moved("gradients", "all-reduce", "replica", micro * layers, micro * size))
        return out
