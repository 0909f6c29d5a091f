"""A model of ours as the teacher, by our own generation, in batches that are stored as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from instructrec_jax.config import TeacherConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions.teacher.budget import Budget, most
from instructrec_jax.instructions.teacher.cache import Cache, Reply, Usage
from instructrec_jax.instructions.teacher.questions import Request

_BATCH = 64  # prompts that the model gets at one time; they are stored together


class Local:
    """Answers requests with a published model or a run.

    Raises:
        ConfigError: no model.
    """

    trouble = ""  # nothing goes wrong on the way to it

    def __init__(self, config: TeacherConfig, cache: Cache, budget: Budget, owner: Callable[[int], str]):
        if not config.model:
            raise ConfigError("teacher.model is empty", remedy="a folder, a known name or a hub id, e.g. smollm2-135m")
        self._config, self._cache, self._budget, self._owner = config, cache, budget, owner
        self.stopped = ""

    def answer(self, requests: Iterable[Request], done: Callable[[], None]) -> None:
        """Answer every request that has no answer yet; ``done`` is called once for each.

        Raises:
            UserError, DataError: the model cannot be loaded, or answers nothing.
        """
        left = iter(requests)
        batch = list(islice(left, _BATCH))
        if not batch or self.stopped:
            return
        from instructrec_jax.generate import loaded

        with loaded(self._config.model) as generator:
            while batch:
                answered = self._batch(generator, batch, done)
                if self.stopped:
                    return
                batch = [*batch[answered:], *islice(left, answered)]

    def _batch(self, generator: Any, batch: list[Request], done: Callable[[], None]) -> int:
        """Answer the first ones, as many as the budget has room for at their most; gives their number.

        Answers turn out smaller than they might, so that what had no room may have it in the next batch.
        """
        from instructrec_jax.models.generate import Decoding

        config = self._config
        taken = []
        for one in batch:
            wanted = most(one.prompt, config.max_output_tokens)
            if not self._budget.fits(wanted):
                if not taken:
                    self.stopped = (
                        f"the budget is used up: {self._budget}, and the next request may take {wanted.total:,}"
                    )
                    return 0
                break
            self._budget.begin(wanted)
            taken.append((one, wanted, self._cache.begin(wanted)))
        decoding = Decoding(max_new=config.max_output_tokens, temperature=config.temperature)
        seed = int(taken[0][0].key[:7], 16) ^ config.seed
        answers = generator.answers([one.prompt for one, _, _ in taken], decoding, seed=seed)
        for (one, wanted, charge), answer in zip(taken, answers, strict=True):
            used = Usage(generator.length(one.prompt), len(answer.tokens))
            cut = len(answer.tokens) >= config.max_output_tokens
            self._cache.put(one.key, Reply(answer.text, used, cut), charge, self._owner(one.user))
            self._budget.end(wanted, used)
            done()
        return len(taken)
