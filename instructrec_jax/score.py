"""A file of requests to a file of scores.

Three threads work at once: one reads lines and tokenises ahead, the calling one drives the device, one ranks and writes. A shard of
requests is done when its part stands in a folder beside the output; a killed command goes on after the last part. The output is put
together from the parts at the end, so it is complete or absent.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from instructrec_jax.errors import UserError
from instructrec_jax.evaluation.metrics import top_lists
from instructrec_jax.files import path_of, sha256
from instructrec_jax.run import trained
from instructrec_jax.score_input import Asked, Bad, Parser, check_suffix, examine, lines
from instructrec_jax.score_parts import Parts
from instructrec_jax.scoring import Scorer
from instructrec_jax.scoring.prepare import Prepared

Progress = Callable[[str, int, Iterator], Iterator]
BATCH = 256  # requests in one call of the scorer
CATALOGUE_SCORES = 2**24  # scores of whole catalogues that are held at once
AHEAD = 2  # batches that are read ahead, and that wait for being written
SHOWN_ERRORS = 20


@dataclass(frozen=True)
class Scored:
    """What was done. ``requests`` and ``seconds`` are of this process, without loading; the counts of lines are of the whole file."""

    lines: int  # that have scores
    errors: int  # lines that have none
    requests: int
    seconds: float
    waited: float  # share of the seconds in which the device waited for the host
    compiling: float  # share of the seconds that went into compilation

    def __str__(self) -> str:
        rate = self.requests / self.seconds if self.seconds else 0.0
        return (
            f"{self.requests:,} requests in {self.seconds:.1f} s, {rate:,.1f} requests/s; the device waited for the host "
            f"{100 * self.waited:.0f} % of the time, and {100 * self.compiling:.0f} % went into compiling"
        )


def score(
    run_dir: str | Path,
    requests: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    normalise: str = "sum",
    shifts: int = 1,
    count: int = 20,
    keep_seen: bool = False,
    shard_size: int = 1000,
    restart: bool = False,
    set_name: str = "",
    overrides: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda _label, _expected, items: items,
) -> Scored:
    """Score every request of a file, into ``{"id", "candidates", "scores"}`` per line, in the order of the requests.

    The candidates keep their order; of a whole catalogue the best are kept, best first. A line that cannot be scored is reported, and
    written to ``OUT.errors.jsonl`` as ``{"line", "error"}``. Where no line has scores, no output is written.

    Args:
        run_dir: a trained run.
        requests: a ``.jsonl`` or ``.parquet`` file; ``score_input`` says what it holds.
        out: a ``.jsonl`` or ``.parquet`` file, replaced at the end.
        method, normalise, shifts: as in ``Scorer.score``; None = items if the run has an item head, else likelihood.
        count: best items that are kept of a whole catalogue.
        keep_seen: also rank items of the history.
        shard_size: requests after which a killed command can go on.
        restart: throw away what an earlier command left.
        set_name: of a mixture, the set whose items and users the requests name.
        overrides: dotted options over the run's config.
        say, warn, progress: for messages, bad lines, and the progress of the requests.

    Raises:
        UserError: no such file or run; options that do not fit; parts of another command; another process is at work.
        DataError: a file that is damaged.
    """
    requests, out = Path(requests), Path(out)
    check_suffix(out)
    if count < 1 or shard_size < 1:
        raise UserError(f"count = {count}, shard_size = {shard_size}; at least 1 is needed")
    digest, number = examine(requests)
    if out.exists() and out.samefile(requests):
        raise UserError(f"{out} holds the requests", remedy="another --out")
    with trained(run_dir, overrides) as (whole, params, step):
        s = whole.one_set(set_name)
        method = method or ("items" if s.sizes.items else "likelihood")
        _check_options(method, normalise, shifts)
        scorer = s.scorer(params)
        how: dict[str, Any] = {"method": method, "normalise": normalise, "shifts": shifts}
        scorer.prepare([], **how)  # what no request could be scored with is an error at once, not one per line
        manifest = {
            "requests": {"file": requests.name, "sha256": digest},
            "options": {
                **how,
                "k": count,
                "keep_seen": keep_seen,
                "shard_size": shard_size,
                "overrides": [*overrides],
                **({"set": s.space.name} if s.space else {}),
            },
            "run": {"config_sha256": sha256(path_of(run_dir) / "config.yaml"), "step": step},
        }
        with Parts.opened(out, manifest, restart) as parts:
            done = min(len(parts) * shard_size, number)
            say(f"{number:,} requests by {method}, step {step} of {run_dir}")
            if done:
                say(f"continuing after the last complete shard: {done:,} requests are done ({len(parts)} shards)")
            clock = DeviceClock(scorer)
            most = max(1, min(BATCH, CATALOGUE_SCORES // s.prepared.data.num_items))
            writer = Writer(parts, s.prepared.data.catalogue.item_ids, count, keep_seen, requests, warn)
            batches = _batches(Parser(s), lines(requests, done), shard_size, most)
            work = _pipeline((_ready(batch, scorer, how) for batch in batches), scorer.run, writer.write)
            begun = time.perf_counter()
            for _ in progress("scoring", number - done, work):
                pass
            seconds = time.perf_counter() - begun
            busy, compiling = clock.stop()
            written, failed = parts.finish()
    if failed > (told := min(writer.errors, SHOWN_ERRORS)):
        warn(f"{requests}: {failed - told:,} more lines have no scores; all are in {parts.errors}")
    waited = max(seconds - busy - compiling, 0.0)
    shares = (waited / seconds, min(compiling / seconds, 1.0)) if number > done else (0.0, 0.0)
    return Scored(written, failed, number - done, seconds, *shares)


def _check_options(method: str, normalise: str, shifts: int) -> None:
    if normalise != "sum" and method not in ("likelihood", "trie"):
        raise UserError(f"normalise = {normalise} does nothing to {method}", remedy="--method likelihood or trie")
    if shifts != 1 and method != "labels":
        raise UserError(f"shifts = {shifts} does nothing to {method}", remedy="--method labels")


# -------------------------------------------------------------------------------------------------------------- pipeline


@dataclass(frozen=True)
class Batch:
    """Requests of one call of the scorer. ``last``: the shard ends with it."""

    asked: list[Asked]
    bad: list[Bad]
    last: bool
    prepared: Prepared | None = None  # of ``asked``


def _batches(
    parser: Parser, source: Iterable[tuple[int, bytes | dict[str, Any]]], shard_size: int, most: int
) -> Iterator[Batch]:
    """Batches that never cross a shard, so that a resumed command makes the same ones."""
    inside, held = 0, []
    for line, content in source:
        held.append(parser.parse(line, content))
        inside += 1
        if len(held) == most or inside == shard_size:
            yield _batch(held, inside == shard_size)
            held, inside = [], inside % shard_size
    if inside:
        yield _batch(held, True)


def _batch(held: list[Asked | Bad], last: bool) -> Batch:
    return Batch([x for x in held if isinstance(x, Asked)], [x for x in held if isinstance(x, Bad)], last)


def _ready(batch: Batch, scorer: Scorer, how: dict[str, Any]) -> Batch:
    """The batch with the host's part of scoring done; what the scorer refuses is bad."""
    asked, bad = batch.asked, [*batch.bad]
    try:
        return replace(batch, prepared=scorer.prepare([a.request for a in asked], **how))
    except UserError:
        kept = []
        for a in asked:
            try:
                scorer.prepare([a.request], **how)
                kept.append(a)
            except UserError as error:
                bad.append(Bad(a.line, error.message.removeprefix("request 0: ")))
        return Batch(kept, bad, batch.last, scorer.prepare([a.request for a in kept], **how))


def _pipeline(
    batches: Iterator[Batch], run: Callable[[Prepared], list[Any]], write: Callable[[Batch, list[Any]], None]
) -> Iterator[int]:
    """Read and tokenise, score, and write at once; yields the line of every request that was handed on."""
    with ThreadPoolExecutor(1, "requests") as reading, ThreadPoolExecutor(1, "scores") as writing:
        read = deque(reading.submit(next, batches, None) for _ in range(AHEAD))
        written: deque[Future[None]] = deque()
        while (batch := read.popleft().result()) is not None:
            read.append(reading.submit(next, batches, None))
            scores = run(batch.prepared) if batch.prepared is not None and batch.asked else []
            if len(written) == AHEAD:
                written.popleft().result()
            written.append(writing.submit(write, batch, scores))
            yield from sorted(x.line for x in (*batch.asked, *batch.bad))
        for left in written:
            left.result()


class DeviceClock:
    """Measures when the device works: a thread waits for whatever the scorer's kernel was asked to compute.

    A program runs from its dispatch, or from the end of the one before it, until its result is there. Compilation is counted apart.
    """

    def __init__(self, scorer: Scorer):
        self._kernel, self._runner = scorer.runner.kernel, scorer.runner
        self._waiting = ThreadPoolExecutor(1, "device")
        self._busy = self._compiling = self._free = 0.0
        scorer.runner.kernel = self  # pyright: ignore[reportAttributeAccessIssue]

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernel, name)
        if not hasattr(function, "lower"):  # not jitted
            return function

        def timed(*args: Any, **options: Any) -> Any:
            before, begun = function._cache_size(), time.perf_counter()
            result = function(*args, **options)
            if function._cache_size() > before:
                self._compiling += (now := time.perf_counter()) - begun
                begun = now
            self._waiting.submit(self._wait, begun, result)
            return result

        return timed

    def _wait(self, begun: float, result: Any) -> None:
        jax.block_until_ready(result)
        ended = time.perf_counter()
        self._busy += max(ended - max(begun, self._free), 0.0)
        self._free = ended

    def stop(self) -> tuple[float, float]:
        """Seconds of the device's work, and of compilation; the scorer is as before."""
        self._waiting.shutdown()
        self._runner.kernel = self._kernel
        return self._busy, self._compiling


class Writer:
    """Scored batches to parts. Runs in one thread."""

    def __init__(
        self,
        parts: Parts,
        item_ids: list[str],
        count: int,
        keep_seen: bool,
        requests: Path,
        warn: Callable[[str], None],
    ):
        self._parts, self._item_ids, self._count, self._keep_seen = parts, item_ids, count, keep_seen
        self._requests, self._warn = requests, warn
        self._lines: list[str] = []
        self._bad: list[Bad] = []
        self.errors = 0

    def write(self, batch: Batch, scores: list[Float[np.ndarray, " C"]]) -> None:
        """Add a batch to the shard, and write the shard if it is the last one."""
        bad = [*batch.bad]
        for asked, found in zip(batch.asked, scores):
            if np.isfinite(found).all():
                self._lines.append(json.dumps(self._row(asked, found), ensure_ascii=False))
            else:
                bad.append(Bad(asked.line, "a score is not finite"))
        bad.sort(key=lambda b: b.line)
        for b in bad[: max(SHOWN_ERRORS - self.errors, 0)]:
            self._warn(f"{self._requests}, line {b.line}: {b.error}")
        self.errors += len(bad)
        self._bad += bad
        if batch.last:
            self._parts.add(self._lines, [json.dumps(vars(b), ensure_ascii=False) for b in self._bad])
            self._lines, self._bad = [], []

    def _row(self, asked: Asked, scores: Float[np.ndarray, " C"]) -> dict[str, Any]:
        if asked.shown is not None:
            return {"id": asked.id, "candidates": asked.shown, "scores": scores.tolist()}
        best = top_lists(scores[None], self._count, None if self._keep_seen else [asked.history])[0]
        best = best[best >= 0]
        return {
            "id": asked.id,
            "candidates": [self._item_ids[i] for i in best.tolist()],
            "scores": scores[best].tolist(),
        }
