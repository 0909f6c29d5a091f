"""TPUs by name: what the vendor publishes of a chip, and the topologies that the compiler knows.

``v5e-16`` is sixteen *chips*, for every generation; Cloud TPU counts cores in the names of v5p and v4, so its ``v5p-128`` (64 chips) is
``v5p-64`` here. ``v5e-16x2`` is two slices of sixteen chips, joined by the data-centre network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from instructrec_jax.errors import UserError, did_you_mean
from instructrec_jax.training.log import PEAKS

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What the vendor publishes: dense bf16 operations a second, bytes a second between memory and chip, bytes of memory."""

    peak: float
    bandwidth: float
    memory: int


CHIPS = {
    "v5e": Chip(PEAKS["v5e"], 819e9, 16 * GIB),
    "v5p": Chip(PEAKS["v5p"], 2765e9, 95 * GIB),
    "v6e": Chip(PEAKS["v6"], 1640e9, 32 * GIB),
    "h100": Chip(PEAKS["h100"], 3350e9, 80 * GIB),  # for comparison with what is published; nothing is compiled for it
}

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
SLICES = {
    f"{kind}-{math.prod(shape)}": f"{kind}:{'x'.join(map(str, shape))}"
    for kind, shapes in (("v5e", _FLAT), ("v5p", _CUBES), ("v6e", _FLAT))
    for shape in shapes
}  # name -> the compiler's name of one slice


@dataclass(frozen=True)
class Topology:
    """Chips of one kind, in one or more slices."""

    name: str
    kind: str  # key of ``CHIPS``
    slice: str  # the compiler's name of a slice, like "v5e:4x4"
    per_slice: int  # chips
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.per_slice * self.slices

    @property
    def chip(self) -> Chip:
        """What is published of one of them."""
        return CHIPS[self.kind]


def topology_of(name: str) -> Topology:
    """The topology of a name like ``v5e-16`` or ``v5e-16x2``.

    Raises:
        UserError: there is none; the known ones are listed.
    """
    base, _, slices = name.partition("x")
    if base not in SLICES or not ((slices.isdecimal() and int(slices) > 0) or name == base):
        raise UserError(
            f"unknown chips {name!r}{did_you_mean(base, SLICES)}",
            remedy=f"kind and number of chips, one of {', '.join(SLICES)}; with x2 behind it for two slices",
        )
    kind, _, chips = base.partition("-")
    return Topology(name, kind, SLICES[base], int(chips), int(slices or 1))
