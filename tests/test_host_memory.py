"""A command on a CPU asks for large pages: once, and where the system has them for those who ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instructrec_jax.host_memory import with_large_pages


def started(system: str, environ: dict[str, str], tmp_path: Path) -> list[tuple[Any, ...]]:
    """The processes that took this one's place."""
    (tmp_path / "enabled").write_text(system)
    out: list[tuple[Any, ...]] = []
    with_large_pages(environ, tmp_path / "enabled", lambda *given: out.append(given))
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_setting_joins_the_others(tmp_path: Path) -> None:
    ((program, arguments, environ),) = started(
        "always [madvise] never", {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.check=1"}, tmp_path
    )
    assert program == arguments[0] == sys.executable and arguments[1:] == sys.orig_argv[1:]
    assert environ == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}
    assert not started("always [madvise] never", environ, tmp_path)  # once
    assert not started("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, tmp_path)


@pytest.mark.parametrize("system", ["[always] madvise never", "always madvise [never]", ""])
def test_nothing_happens_elsewhere(system: str, tmp_path: Path) -> None:
    assert not started(system, {}, tmp_path)
    with_large_pages({}, tmp_path / "no such file", lambda *_: pytest.fail("started"))


def test_a_command_stays_the_same_process(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    code = (
        "import os, sys; from instructrec_jax.host_memory import with_large_pages; "
        f"open({str(tmp_path / 'seen')!r}, 'a').write(f'{{os.getpid()}} {{sys.argv[1:]}}\\n'); "
        "with_large_pages(); print('went on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "a b"], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "went on\n", done.stderr
    first, *more = (tmp_path / "seen").read_text().splitlines()
    assert first.endswith("['train', 'a b']") and all(line == first for line in more) and len(more) <= 1


def test_the_collector_leaves_imports_alone_and_waits_longer() -> None:
    code = (
        "import gc; from instructrec_jax.host_memory import spare_collector; older = gc.get_threshold()[1:]; "
        "spare_collector(); first = gc.get_freeze_count(); kept = [[] for _ in range(1000)]; spare_collector(); "
        "print(first > 1_000, gc.get_freeze_count() == first, gc.get_threshold() == (20_000, *older))"
    )
    assert printed(code) == "True True True\n"


@pytest.mark.parametrize("chosen", [0, 50_000])
def test_a_threshold_that_somebody_chose_stays(chosen: int) -> None:
    code = (
        f"import gc; from instructrec_jax.host_memory import spare_collector; gc.set_threshold({chosen}); "
        "spare_collector(); print(gc.get_threshold()[0])"
    )
    assert printed(code) == f"{chosen}\n"


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout or done.stderr
