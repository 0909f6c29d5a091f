"""Eight simulated devices, fixed seeds, no network: the same tests with the same numbers on every machine."""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

DEVICES = 8

if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could ask for simulated devices")
# Before jax is imported, here and in the processes that tests start.
os.environ["JAX_PLATFORMS"] = os.environ.get("INSTRUCTREC_TEST_PLATFORM", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = str(DEVICES)
# Many tests, and the processes that they start, compile the same functions: within one run they share the executables.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="instructrec-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Most of the time is the compiler's, for programs that run once: it leaves out its costly passes and makes one module of a program, not
# parts for many threads, which halves it. XLA_FLAGS= has them all, as users do; `make parity` compares those.
_quick = ("backend_optimization_level=0", "llvm_disable_expensive_passes=true", "cpu_parallel_codegen_split_count=1")
os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in _quick))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A twentieth of the time is the garbage collector's, which looks through JAX again and again.
gc.set_threshold(50_000, 20, 50)

# Few examples and always the same ones; HYPOTHESIS_PROFILE=thorough searches further.
_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("quick", _common, max_examples=25, derandomize=True)
settings.register_profile("thorough", _common, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


# The files that take longest, first: begun last, one would keep a worker busy for minutes while the other waits.
LONG = (
    "export",
    "training",
    "scorer_methods",
    "mixed_run",
    "pretrained",
    "parity_golden",
    "cli",
    "adapters",
    "step",
    "sizes",
    "hosts",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; ``make test`` tells xdist to keep the order."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Global generators start every test in one state; code of the project takes explicit seeds and keys anyway."""
    random.seed(0)
    np.random.seed(0)
