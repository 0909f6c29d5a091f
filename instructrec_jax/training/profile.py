"""A window of steps under JAX's profiler; look at it with xprof or TensorBoard's profile plug-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from instructrec_jax.config import ProfileConfig


class Profiler:
    """Traces steps ``start`` to ``start + steps - 1`` of this call, counted from 1, into ``run_dir/profile``; process 0 alone."""

    def __init__(self, config: ProfileConfig, run_dir: Path):
        self._config, self.folder = config, run_dir / "profile"
        self._wanted = config.steps > 0 and jax.process_index() == 0
        self._begun = self._active = False
        self._number = 0

    def step(self, number: int, result: Any) -> jax.profiler.StepTraceAnnotation:
        """Enter before step ``number`` of the run; ``result`` is what the step before gives, waited for at the window's ends."""
        self._number += 1
        if self._wanted and not self._begun and self._number >= self._config.start:
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(self.folder))
            self._begun = self._active = True
        elif self._active and self._number >= self._config.start + self._config.steps:
            self.close(result)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def close(self, result: Any = None) -> None:
        """End a window that is open."""
        if self._active:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._active = False
