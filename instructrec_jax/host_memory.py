"""Memory of a process: large pages, so that a step's temporary memory costs less than the step; and what the garbage collector looks at."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_NEW = 20_000  # objects that the garbage collector waits for
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def with_large_pages(
    environ: Mapping[str, str] = os.environ,
    system: Path = _SYSTEM,
    replace: Callable[[str, list[str], dict[str, str]], object] = os.execve,
) -> None:
    """Start this process anew with glibc asking for large pages, where the system gives them to those who ask.

    glibc maps every large buffer anew and unmaps it behind its use, so the system maps a step's temporary memory in every step: 1.1
    million pages of 4 KiB, 3.4 s of processor time of 23, in a LoRA step of SmolLM2-135M on 8 x 256 tokens; with pages of 2 MiB 3
    thousand and 1.1 s. glibc reads the setting when a process starts (2.35 and newer; others ignore it), so it is to be the first
    thing that a command does: the process, its number and its arguments stay the same.

    Nothing happens where ``GLIBC_TUNABLES`` has the setting already (``glibc.malloc.hugetlb=0`` turns this off), away from Linux, and
    where the system gives large pages to everybody or to nobody.
    """
    given = environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in given or not sys.platform.startswith("linux") or not sys.executable:
        return
    try:
        if "[madvise]" not in system.read_text():
            return
        settings = ":".join(filter(None, (given, f"{TUNABLE}=1")))
        replace(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environ, "GLIBC_TUNABLES": settings})
    except OSError:  # no such file, or not allowed: the command works without
        return


@functools.cache
def spare_collector() -> None:
    """Give the garbage collector less to do. The first call in a process counts.

    It is told to leave alone what is there now, which is modules for the most part: JAX and TFDS bring a million objects, all of which it
    would visit again each time that enough new ones have come, a tenth of the processor time in which examples are written and read.
    And it looks at new ones when there are twenty thousand, not seven hundred or two thousand: an example has no cycles, and JAX asks
    for its own garbage on each of these occasions (3 % of the same time).
    """
    gc.freeze()
    new, *older = gc.get_threshold()
    if 0 < new < _NEW:  # 0: somebody has turned it off
        gc.set_threshold(_NEW, *older)
