"""What ``aot_check.py --scorer`` compiles: the calls that a ``Scorer`` makes, caught on their way to the device, and their cost.

The scorer itself chooses layouts, paddings and batches; here its arrays are replaced by their shapes and its kernel by one that compiles
instead of running. So what is compiled is what a server would run, whatever the scorer's rules come to be.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from instructrec_jax.config import MeshConfig, ModelConfig
from instructrec_jax.errors import UserError
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.attention import fuses
from instructrec_jax.models.language_model import Sizes, abstract_params
from instructrec_jax.models.sharding import padded
from instructrec_jax.models.tree_attention import fits
from instructrec_jax.scoring import Request, Scorer
from instructrec_jax.scoring.forest import Forest
from instructrec_jax.scoring.layout import Cost
from instructrec_jax.scoring.runner import BLOCK
from instructrec_jax.scoring.trees import CHUNK
from instructrec_jax.scoring.trie import CatalogueTrie
from instructrec_jax.training import xla_flags
from instructrec_jax.training.mesh import make_mesh

BF16 = 2  # bytes
LAYOUTS = ("packed", "batched", "trie")


@dataclass(frozen=True)
class Workload:
    """``requests`` that arrive at one time, each of a prompt of ``prefix`` tokens and ``candidates`` of ``tokens`` tokens.

    Tokens are random, so candidates share next to nothing: the dearest case. ``items`` is the size of the catalogue, whose titles are
    as long as the candidates. ``rows``: the scorer's packed rows (and prompts) in a batch; None = its own choice.
    """

    requests: int = 16
    prefix: int = 300
    candidates: int = 100
    tokens: int = 30
    items: int = 10_000
    rows: int | None = None


class Count(NamedTuple):
    """What one run of an executable does."""

    operations: float
    moved: float  # bytes between memory and chip, at least
    scores: float  # bytes of attention scores that are written and read once: the kernel keeps its own on the chip


@dataclass
class Call:
    """One executable that a device runs, and how often it is run."""

    name: str
    count: Count
    seconds: float = 0.0  # to compile
    arguments: int = 0  # bytes on the device, as the compiler counts them
    temporaries: int = 0
    output: int = 0
    peak: int = 0
    error: str = ""  # why it does not compile
    runs: int = 1


@dataclass(frozen=True)
class Costs:
    """Analytic operations and bytes of the kernel's calls, of a decoder whose tables have ``vocab`` rows.

    *Operations* are two per multiplication and addition of matrix products: ``Cost.per_token`` for every token of the shapes, padding
    included, ``Cost.per_pair`` for every query and key of the shapes (the reference attention computes what the mask hides), and
    ``2 D V`` for every node whose next-token distribution is read, in whole chunks. XLA's own ``cost_analysis`` counts the body of a
    loop once, and layers, chunks and blocks are loops.

    *Bytes* are a lower bound: each pass over the layers reads their weights once, each chunk reads the word head once, in bfloat16; a
    prompt's keys and values are written once, and read by each pass that continues them. Nothing of this stays on the chip in between.
    Activations and logits are not counted. *Scores* are apart: the reference attention has them in float32, ``[B, K, S, G, T]``; where
    the kernel takes its place (``fused``, and lengths that it takes) there are none, and it computes less than is counted: blocks of
    pairs that the mask hides are skipped.
    """

    arch: Architecture
    vocab: int
    fused: bool = False

    def __post_init__(self) -> None:
        if self.arch.kind != "decoder":
            raise UserError(f"costs are counted for decoders, not for an {self.arch.kind}")

    def _layers(self, rows: int, queries: int, keys: int) -> float:
        cost = Cost.of(self.arch)
        return rows * queries * (cost.per_token + cost.per_pair * keys)

    def _weights(self) -> float:
        """Bytes of the layers' matrices."""
        return Cost.of(self.arch).per_token / 2 * BF16

    def _cache(self, tokens: int) -> float:
        """Bytes of keys and values."""
        a = self.arch
        return 2 * tokens * a.layers * a.kv_heads * a.head_size * BF16

    def _head(self, rows: int, reads: int, nodes: int) -> tuple[float, float]:
        """(operations, bytes) of scoring ``reads`` nodes of each of ``rows`` rows, and of adding paths over ``nodes`` nodes."""
        chunks = -(-reads // CHUNK)
        table = self.vocab * self.arch.width
        return 2.0 * rows * (chunks * CHUNK * table + nodes**2), float(chunks * table * BF16)

    def _scores(self, rows: int, queries: int, keys: int) -> float:
        """Bytes of attention scores, written and read."""
        if self.fused and fits(queries, keys):
            return 0.0
        a = self.arch
        return 2.0 * 4 * a.layers * a.heads * rows * queries * keys

    def packed(self, rows: int, size: int, reads: int) -> Count:
        """``rows`` rows of ``size`` tokens, of which at most ``reads`` in a row are read."""
        head, table = self._head(rows, reads, size)
        moved = self._weights() + self._cache(rows * size) + table
        return Count(self._layers(rows, size, size) + head, moved, self._scores(rows, size, size))

    def read(self, rows: int, size: int) -> Count:
        """``rows`` prompts of ``size`` tokens."""
        table = self.vocab * self.arch.width  # the head reads the last token of each
        moved = self._weights() + self._cache(rows * size) + table * BF16
        return Count(self._layers(rows, size, size) + 2.0 * rows * table, moved, self._scores(rows, size, size))

    def blocks(self, prompts: int, size: int, rounds: int, group: int, block: int) -> Count:
        """``group`` blocks of ``block`` nodes continue each of ``prompts`` prompts of ``size`` tokens, ``rounds`` times."""
        rows = prompts * group
        head, table = self._head(rows, block, block)
        layers = self._layers(rows, block, size + block)
        moved = self._weights() + self._cache(prompts * size) + table
        scores = self._scores(rows, block, block) + self._scores(prompts, group * block, size)
        return Count(rounds * (layers + head), rounds * moved, rounds * scores)


def needed(arch: Architecture, vocab: int, prompt: int, forest: Forest) -> float:
    """Operations that one request cannot do without: its own tokens, the pairs that they may read, the nodes that have children."""
    cost = Cost.of(arch)
    pairs = prompt * (prompt + 1) / 2 + float(np.sum(prompt + forest.depth + 1))
    reads = len(np.unique(np.concatenate([forest.parent, forest.leaf_parent])))
    return (prompt + len(forest)) * cost.per_token + pairs * cost.per_pair + 2.0 * reads * arch.width * vocab


# ----------------------------------------------------------------------------------------------------- shapes for arrays


def shapes_on(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Shapes with shardings on a real mesh, of shapes (or arrays) whose shardings are on the abstract one, or that have none."""

    def on(x: Any) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if getattr(x, "sharding", None) is not None else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(on, tree)


def described(tree: Any, sharding: jax.NamedSharding) -> Any:
    """What stands in for ``jax.device_put``: the devices are not there, and the shapes are enough."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=sharding), tree)


@dataclass
class Compiler:
    """Stands in for the scorer's ``Kernel``: it compiles every call once, notes it, and answers with zeros (or with shapes)."""

    kernel: Any
    mesh: jax.sharding.Mesh
    costs: Costs
    progress: Callable[[str], None]
    blocks_of_trie: int = 0
    calls: dict[Any, Call] = field(default_factory=dict)

    def packed(self, *given: Any, **static: Any) -> np.ndarray:
        """See ``Kernel.packed``."""
        rows, size = given[1]["tokens"].shape
        return self._zeros(self._compiled("packed", self.costs.packed(rows, size, int(given[3])), given, **static))

    def read(self, *given: Any, **static: Any) -> Any:
        """See ``Kernel.read``."""
        return self._compiled("read", self.costs.read(*given[1]["tokens"].shape), given, **static)

    def blocks(self, *given: Any, group: int, **static: Any) -> np.ndarray:
        """See ``Kernel.blocks``."""
        cost = self._continued(given[1], int(given[3]) // group, group)
        return self._zeros(self._compiled("blocks", cost, given, group=group, **static))

    def every(self, *given: Any, group: int, **static: Any) -> Any:
        """See ``Kernel.every``."""
        cost = self._continued(given[1], -(-self.blocks_of_trie // group), group)
        return self._zeros(self._compiled("every", cost, given, group=group, **static))

    def _continued(self, read: Any, rounds: int, group: int) -> Count:
        prompts, size = read.memory.mask.shape
        return self.costs.blocks(prompts, size, rounds, group, BLOCK)

    def _zeros(self, shapes: Any) -> Any:
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    def _compiled(self, name: str, count: Count, given: tuple, **static: Any) -> Any:
        step = getattr(self.kernel, name)
        signature = (name, str(jax.tree.map(lambda x: (np.shape(x), str(x.dtype)), given[1:])), tuple(static.items()))
        if signature in self.calls:
            self.calls[signature].runs += 1
        else:
            self.calls[signature] = self._compile(name, count, step, given, static)
        return shapes_on(self.mesh, jax.eval_shape(partial(step, **static), *given))

    def _compile(self, name: str, count: Count, step: Any, given: tuple, static: dict[str, Any]) -> Call:
        start = time.perf_counter()
        call = Call(name, count)
        lowered = step.lower(*given, **static)
        flags = xla_flags.missing(self.mesh.devices.flat[0].platform)
        try:
            memory = lowered.compile(compiler_options=flags).memory_analysis()
            call.arguments, call.output = memory.argument_size_in_bytes, memory.output_size_in_bytes
            call.temporaries, call.peak = memory.temp_size_in_bytes, memory.peak_memory_in_bytes
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            call.error, call.peak = exhausted(str(error))
        call.seconds = time.perf_counter() - start
        self.progress(f"compiled {name} in {call.seconds:.0f} s{': ' + call.error if call.error else ''}")
        return call


UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def exhausted(message: str) -> tuple[str, int]:
    """The compiler's words that a program does not fit, and the bytes that it would take (0 = they are not told)."""
    forms = (
        r"HLO temporaries \(([0-9.]+)([KMGT])\) exceeds available HBM \([0-9.]+[KMGT]\)",
        r"Used ([0-9.]+)([KMGT]) of [0-9.]+[KMGT] \w+",
    )
    for form in forms:
        if found := re.search(form, message):
            return found[0], int(float(found[1]) * UNITS[found[2]])
    return " ".join(message.split())[:200], 0


# ------------------------------------------------------------------------------------------------------------ the scorer


@contextmanager
def scorer_on(
    device: Any, arch: Architecture, options: ModelConfig, work: Workload, progress: Callable[[str], None]
) -> Iterator[tuple[Scorer, Compiler]]:
    """A scorer on a mesh of one (absent) device, whose calls are compiled instead of run."""
    mesh = make_mesh(MeshConfig(), [device])
    sizes = Sizes(padded(arch.vocab))
    with jax.set_mesh(mesh), mock.patch.object(jax, "device_put", described):
        params = {"params": shapes_on(mesh, abstract_params(arch, sizes, options))}
        content = shapes_on(mesh, jax.ShapeDtypeStruct((0, 0), jnp.float32))
        scorer = Scorer(
            options, arch, sizes, params, content, work.items, cast(Any, None), [], rows=work.rows,
            max_prompt=max(work.prefix, 1), max_candidate=max(work.tokens, 1),
        )  # fmt: skip
        plain = not (arch.window or arch.attention_softcap or arch.positions == "relative")
        costs = Costs(arch, sizes.vocab, plain and fuses(options.attention))
        compiler = Compiler(scorer.runner.kernel, mesh, costs, progress)
        scorer.runner.kernel = cast(Any, compiler)
        yield scorer, compiler


def run(
    device: Any,
    arch: Architecture,
    options: ModelConfig,
    work: Workload,
    layout: str,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Call], float]:
    """Compile what a workload needs in a layout.

    Args:
        device: of a topology.
        arch, options: the model.
        work: what is asked.
        layout: "packed" or "batched" (a request's own candidates), or "trie" (the whole catalogue).
        progress: told after every compilation.

    Returns:
        The calls, and the operations that the requests cannot do without.

    Raises:
        UserError: the architecture is not a decoder. JaxRuntimeError: it does not compile, for another reason than memory.
    """
    r = np.random.default_rng(0)
    words = lambda *shape: r.integers(0, arch.vocab, shape)  # noqa: E731
    prompts = words(work.requests, work.prefix)
    with scorer_on(device, arch, options, work, progress) as (scorer, compiler):
        if layout == "trie":
            titles = words(work.items, work.tokens).tolist()
            scorer._trie = CatalogueTrie(titles, BLOCK, scorer.runner.trie_group)
            compiler.blocks_of_trie = len(scorer._trie.blocks)
            scorer.top_k(list(prompts), min(work.items, 100))
            least = work.requests * needed(arch, arch.vocab, work.prefix, scorer._trie.forest)
        else:
            scorer.runner.layout = cast(Any, layout)
            candidates = words(work.requests, work.candidates, work.tokens).tolist()
            scorer.score([Request(p, c) for p, c in zip(prompts, candidates)], "likelihood")
            least = sum(needed(arch, arch.vocab, work.prefix, Forest.build(c)) for c in candidates)
    return list(compiler.calls.values()), least
