"""Eight simulated devices, fixed seeds, no network: the same tests with the same numbers on every machine."""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

DEVICES = 8

if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could ask for simulated devices")
# Before jax is imported, here and in the processes that tests start.
os.environ["JAX_PLATFORMS"] = os.environ.get("INSTRUCTREC_TEST_PLATFORM", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = str(DEVICES)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Few examples and always the same ones; HYPOTHESIS_PROFILE=thorough searches further.
_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("quick", _common, max_examples=25, derandomize=True)
settings.register_profile("thorough", _common, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Global generators start every test in one state; code of the project takes explicit seeds and keys anyway."""
    random.seed(0)
    np.random.seed(0)
