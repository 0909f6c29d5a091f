"""What ``aot_check.py CONFIG`` compiles: the step that a run of the config takes, for a topology that is not there.

The step is ``make_train_step``'s own, on shapes instead of arrays (``training/shapes.py``). What comes back is the compiler's account of
the executable, and the collectives that are counted in it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
from aot_scorer import exhausted

from instructrec_jax.config import Config
from instructrec_jax.errors import UserError
from instructrec_jax.training import xla_flags
from instructrec_jax.training.chips import Topology
from instructrec_jax.training.mesh import check_plan, make_mesh, mesh_sizes
from instructrec_jax.training.shapes import architecture_of, step_shapes
from instructrec_jax.training.step import make_train_step

WITHIN = 0.01  # the largest batch is looked for up to this part of itself: each try compiles for minutes


@dataclass
class Compiled:
    """One executable: bytes on each chip, and what moves between chips in a step."""

    rows: int  # sequences on each chip, in a micro-batch
    arguments: int = 0  # state, frozen weights, batch
    temporaries: int = 0
    output: int = 0  # beside what is updated in place
    peak: int = 0
    collectives: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # kind -> {"count": ..., "bytes": ...} of a step
    seconds: float = 0.0  # to compile
    error: str = ""  # why it does not fit


def compile_step(
    config: Config, topology: Topology, devices: list, rows: int, items: int = 0, users: int = 0
) -> Compiled:
    """Compile the step of a config with ``rows`` sequences on each chip (and each of its neighbours along ``tensor``).

    Args:
        config: the run's; its batch size is replaced.
        topology: of the devices.
        devices: as ``devices_of`` gives them.
        rows: sequences on each chip, in a micro-batch.
        items, users: of the data, where the model has item tokens.

    Raises:
        UserError: the plan does not divide. JaxRuntimeError: it does not compile, for another reason than memory.
    """
    start = time.perf_counter()
    mesh = make_mesh(config.mesh, devices)
    shards = mesh.shape["replica"] * mesh.shape["fsdp"]
    config = replace(config, train=replace(config.train, batch_size=rows * shards * config.train.accumulate))
    arch, sizes = architecture_of(config, items, users)
    check_plan(config, arch, sizes, len(devices))
    done = Compiled(rows)
    flags = xla_flags.missing(devices[0].platform)  # those that a run on these devices has
    with jax.set_mesh(mesh):
        lowered = make_train_step(config, arch, sizes, items).lower(*step_shapes(config, arch, sizes))
        try:
            compiled = lowered.compile(compiler_options=flags)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            done.error, done.peak = exhausted(str(error))
        else:
            memory = compiled.memory_analysis()
            done.arguments, done.temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            done.output = memory.output_size_in_bytes - memory.alias_size_in_bytes
            done.peak = memory.peak_memory_in_bytes
            done.collectives = collectives(compiled.as_text())
            if done.peak > topology.chip.memory:
                done.error = f"needs {done.peak:,} bytes of {topology.chip.memory:,}"
    done.seconds = time.perf_counter() - start
    return done


def devices_of(topology: Topology) -> list:
    """The devices of a topology, as libtpu describes them."""
    from jax.experimental import topologies

    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.slice, **more).devices)


@dataclass
class Checked:
    """What was compiled of a config."""

    topology: Topology
    batch: int  # sequences on each chip, of the config itself
    compiled: dict[int, Compiled]  # by sequences on each chip in a step, all micro-batches together
    # Sequences on each chip, which fit; a number larger by more than WITHIN does not. None = it was not looked for
    largest: int | None

    @property
    def fits(self) -> bool:
        """Whether the config itself does."""
        return not self.compiled[self.batch].error

    @property
    def ratios(self) -> dict[str, float | None]:
        """Temporaries in GB on each chip at each number of sequences (None where it does not fit), and the largest number."""
        found: dict[str, float | None] = {
            f"temp_gb_at_{rows}": None if c.error else c.temporaries / 1e9 for rows, c in sorted(self.compiled.items())
        }
        return found if self.largest is None else {**found, "largest_batch": self.largest}


def check(
    config: Config,
    topology: Topology,
    sequences: Sequence[int],
    *,
    items: int = 0,
    users: int = 0,
    search: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Checked:
    """Compile a config's step at its own batch and at other numbers of sequences on each chip, and look for the largest.

    Raises:
        UserError: the plan does not divide, or a number of sequences into micro-batches.
    """
    devices = devices_of(topology)
    compiled: dict[int, Compiled] = {}

    micro = config.train.accumulate

    def fits(count: int) -> bool:
        if count not in compiled:
            compiled[count] = c = compile_step(config, topology, devices, count // micro, items, users)
            say(f"{topology.name}, {count} sequences a chip: {c.error or f'{c.peak / 1e9:.2f} GB'} ({c.seconds:.0f} s)")
        return not compiled[count].error

    if odd := [count for count in sequences if count % micro]:
        raise UserError(
            f"{odd[0]} sequences a chip do not divide into train.accumulate = {micro} micro-batches",
            remedy=f"ask for multiples of {micro}",
        )
    sizes = mesh_sizes(config.mesh, len(devices))
    shards = sizes["replica"] * sizes["fsdp"]
    own = config.train.batch_size // shards
    if own * shards != config.train.batch_size or own % micro:
        arch, tables = architecture_of(config, items, users)
        check_plan(config, arch, tables, len(devices))  # says what does not divide
    for rows in sorted({own, *sequences}):
        fits(rows)
    most = None
    if search:
        sizes_of = lambda n: (fits(n * micro), compiled[n * micro].peak)  # noqa: E731
        known = {count // micro: (not c.error, c.peak) for count, c in compiled.items()}
        most = micro * largest(sizes_of, known, topology.chip.memory, within=WITHIN)
    asked = {rows: c for rows, c in compiled.items() if rows in {own, *sequences}}
    return Checked(topology, own, asked, most)


def report(checked: Checked) -> str:
    """A Markdown table of what was compiled."""
    lines = [
        "| chips | sequences a chip | arguments, GB | temporaries, GB | peak, GB | collectives (GB of their results) a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rows, c in sorted(checked.compiled.items()):
        sizes = [f"{x / 1e9:.3f}" for x in (c.arguments, c.temporaries, c.peak)]
        moved = ", ".join(f"{v['count']:,.0f} {kind} ({v['bytes'] / 1e9:.2f})" for kind, v in c.collectives.items())
        if c.error:
            sizes, moved = ["", "", ""], f"**does not fit**: {c.error}"
        lines.append(f"| {' | '.join([checked.topology.name, str(rows), *sizes, moved])} |")
    if checked.largest is not None:
        memory = checked.topology.chip.memory / 1e9
        lines += ["", f"largest batch that fits {memory:.1f} GB: {checked.largest} sequences a chip (to {WITHIN:.0%})"]
    return "\n".join(lines)


def largest(
    ask: Callable[[int], tuple[bool, int]],
    known: dict[int, tuple[bool, int]],
    memory: int,
    most: int = 4096,
    within: float = 0.0,
) -> int:
    """The largest number that fits, 0 if none does; ``ask`` takes minutes, so it is asked as rarely as can be.

    Bytes grow about linearly: the next number asked is where the line through the two nearest numbers meets the memory, one more where
    that number is known to fit; where lines do not halve what is left, its middle, or twice as many where none is known not to fit.

    Args:
        ask: whether a number fits, and its bytes (0 = not told). Whatever fits, all smaller numbers fit too.
        known: what ``ask`` would say of some numbers.
        memory: bytes that there are.
        most: is not exceeded.
        within: the search ends when no number larger by more than this part can fit; 0 for the largest itself.
    """
    known = dict(known)
    slow = 0  # questions in a row that left more than half
    while True:
        low = max((n for n, (fits, _) in known.items() if fits), default=0)
        high = min((n for n, (fits, _) in known.items() if not fits), default=most + 1)
        if high - low <= 1 + within * low:
            return low
        guess = _crossing(known, low, memory)
        if guess is None or slow > 1:
            guess = (low + high) // 2 if high <= most else min(2 * low, most)
        # What the line says fits is known already: the next step up settles it.
        guess = min(max(guess, low + 1 + int(within * low)), high - 1)
        known[guess] = ask(guess)
        left = (high - guess) if known[guess][0] else (guess - low)
        slow = 0 if 2 * left <= high - low else slow + 1


def _crossing(known: dict[int, tuple[bool, int]], low: int, memory: int) -> int | None:
    """Where the line through the two known sizes that are nearest to ``low`` meets the memory; None without two."""
    sized = sorted((abs(n - low), n, size) for n, (_, size) in known.items() if size)[:2]
    if len(sized) < 2:
        return None
    (a, x), (b, y) = sorted((n, size) for _, n, size in sized)
    return math.floor(b + (memory - y) * (b - a) / (y - x)) if y > x else None


# ------------------------------------------------------------------------------------------------------------- collectives

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"%([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Collectives of one run of a compiled module, by kind: ``count``, and ``bytes`` of their results on each chip.

    Those in the body of a loop count as often as it turns (its condition compares with a constant). The compiler spreads one
    collective over several fusions, to run beside them: they share a channel, and are counted once.
    """
    computations, entry = _computations(text)
    found: dict[tuple[str, str], tuple[str, int, int]] = {}  # (loop, channel) -> kind, bytes, times

    def walk(name: str, times: int, inside: str) -> None:
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                own, shapes, kind, start = match.groups()
                channel = re.search(r"channel_id=(\d+)", line)
                key = (inside, f"{kind} {channel[1] if channel else own}")
                found[key] = max(found.get(key, (kind, 0, 0)), (kind, _bytes(shapes, bool(start)), times))
            turns, within = 1, inside
            if loop := _CONDITION.search(line):
                limits = re.findall(r"constant\((\d+)\)", "\n".join(computations.get(loop[1], ())))
                turns = max(map(int, limits), default=1)
                within = f"{inside}/{loop[1]}"
            branches = [name for part in _BRANCHES.findall(line) for name in re.findall(r"[\w.\-]+", part)]
            for called in (*_CALLED.findall(line), *branches):
                walk(called, times * turns, within)

    walk(entry, 1, "")
    total = {kind: {"count": 0.0, "bytes": 0.0} for kind in KINDS}
    for kind, size, times in found.values():
        total[kind]["count"] += times
        total[kind]["bytes"] += size * times
    return {kind: both for kind, both in total.items() if both["count"]}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the name of the one that is entered."""
    out: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            name = head[2]
            out[name] = []
            entry = name if head[1] else entry
        elif name:
            out[name].append(line)
    return out, entry


def _bytes(shapes: str, start: bool) -> int:
    """Bytes of a result; an asynchronous start's tuple has the operands first."""
    sizes = []
    for kind, dims in _SHAPE.findall(shapes):
        width = 1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * width)
    return sum(sizes[len(sizes) // 2 :] if start else sizes)
