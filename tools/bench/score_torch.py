"""Scores of candidates by transformers on PyTorch, in the four ways that a user of it could write; ``score.py`` measures them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Candidates = list[list[int]]
HEAD_ROWS = 128  # positions whose logits exist at a time; 32 to 64 and all at once are slower
BATCHES = (20, 10, 5)  # sequences at a time that the naive ways try


def their_work(name: str, folder: Path, case: dict[str, Any], threads: int) -> tuple[Callable[[], list[float]], str]:
    """One way of ``WAYS`` with its model and a request: (a run that returns the scores, what was chosen for it).

    ``exact`` is ``packed_torch`` in float64: what all are compared with. The naive ways take the fastest of
    ``BATCHES``, the better of two runs each, on the first twenty candidates.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    # Newer versions call the argument ``cache``; those from 5.0 on all take this one.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
    dtype = torch.float64 if name == "exact" else torch.float32
    torch.set_default_dtype(dtype)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.eval()
    prompt, candidates = case["prompt"], case["candidates"]

    def run(batch: int, some: Candidates) -> list[float]:
        with torch.inference_mode():
            return WAYS["packed_torch" if name == "exact" else name](model, prompt, some, batch).tolist()

    if name not in NAIVE:
        return lambda: run(0, candidates), ""
    few = candidates[: max(BATCHES)]
    run(1, few[:1])
    seconds: dict[int, float] = {}
    for batch in 2 * BATCHES:
        if batch <= len(few):
            begun = time.perf_counter()
            run(batch, few)
            seconds[batch] = min(seconds.get(batch, float("inf")), time.perf_counter() - begun)
    best = min(seconds, key=seconds.__getitem__, default=1)
    tried = ", ".join(f"{batch}: {s:.1f} s" for batch, s in seconds.items())
    return lambda: run(best, candidates), f"batches of {best} ({len(few)} candidates by {tried})"


def naive(model: Any, prompt: list[int], candidates: Candidates, batch: int) -> Any:
    """Prompt and candidate in a row per candidate; all logits."""
    return _by_rows(model, prompt, candidates, batch, needed=False)


def naive_needed_logits(model: Any, prompt: list[int], candidates: Candidates, batch: int) -> Any:
    """As ``naive``, with the head at the positions that predict a candidate's tokens only."""
    return _by_rows(model, prompt, candidates, batch, needed=True)


def prefix_cache(model: Any, prompt: list[int], candidates: Candidates, batch: int) -> Any:
    """The prompt once; its cache is repeated for every candidate, and all of them continue it in one pass."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import DynamicCache

    del batch
    count, cache = len(candidates), DynamicCache(config=model.config)
    read = model.model(torch.tensor([prompt]), past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    cache.batch_repeat_interleave(count)
    tokens, real = _padded(candidates)
    hidden = read.expand(count, -1, -1)
    if tokens.shape[1] > 1:
        rest = model.model(tokens[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
        hidden = torch.cat([hidden, rest], dim=1)
    return _sums(_log_probs(model, hidden[real], tokens[real]), real)


def packed_torch(model: Any, prompt: list[int], candidates: Candidates, batch: int) -> Any:
    """One row of the prompt and all candidates: a mask hides them from each other, and each has the positions after the prompt."""
    import torch  # pyright: ignore[reportMissingImports]

    del batch
    tokens, real = _padded(candidates)
    length = len(prompt)
    inputs = real[:, 1:]  # the last token of a candidate is read from the one before it
    owner, place = inputs.nonzero(as_tuple=True)
    size = length + len(owner)
    ids = torch.cat([torch.tensor(prompt), tokens[:, :-1][inputs]])
    positions = torch.cat([torch.arange(length), length + place])
    who = torch.cat([torch.full((length,), -1), owner])
    mask = ((who[:, None] == who) | (who == -1)).tril()
    # Floats: the kernel of sdpa would turn a mask of truth values into them in every layer.
    mask = torch.zeros(size, size).masked_fill_(~mask, float("-inf"))
    hidden = model.model(
        ids[None], attention_mask=mask[None, None], position_ids=positions[None], use_cache=False
    ).last_hidden_state[0]
    # The first token of every candidate is read from the prompt's end, once for all of them.
    logits = model.lm_head(hidden[length - 1])
    first = logits[tokens[:, 0]] - logits.logsumexp(-1)
    rest = _log_probs(model, hidden[length:], tokens[:, 1:][inputs])
    return first + torch.zeros(len(candidates)).index_add_(0, owner, rest)


NAIVE: dict[str, Any] = {"naive": naive, "naive_needed_logits": naive_needed_logits}
WAYS: dict[str, Any] = {**NAIVE, "prefix_cache": prefix_cache, "packed_torch": packed_torch}


def _by_rows(model: Any, prompt: list[int], candidates: Candidates, batch: int, *, needed: bool) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    order = sorted(range(len(candidates)), key=lambda i: len(candidates[i]))  # rows of one batch need little padding
    out = torch.zeros(len(candidates))
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        tokens, real = _padded([candidates[i] for i in some])
        # Padding stands behind, where a causal model does not see it: no mask is needed.
        ids = torch.cat([torch.tensor([prompt]).expand(len(some), -1), tokens], dim=1)
        span = slice(len(prompt) - 1, -1)
        if needed:
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, span]
            found = _log_probs(model, hidden[real], tokens[real])
        else:
            logits = model(ids, use_cache=False).logits[:, span]
            found = _picked(logits, tokens)[real]
        out[some] = _sums(found, real)
    return out


def _log_probs(model: Any, hidden: Any, tokens: Any) -> Any:
    """log P of one token per hidden state, ``[n]``; a part at a time, which is faster than all logits at once."""
    import torch  # pyright: ignore[reportMissingImports]

    parts = zip(hidden.split(HEAD_ROWS), tokens.split(HEAD_ROWS))
    return torch.cat([_picked(model.lm_head(h), t) for h, t in parts])


def _picked(logits: Any, tokens: Any) -> Any:
    """log softmax(logits)[token]. PyTorch's own float32 ``log_softmax`` of 49,152 words is 1e-5 off per token, to one side."""
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def _padded(candidates: Candidates) -> tuple[Any, Any]:
    """Token ids ``[C, W]``, zeros behind, and which of them are real."""
    import torch  # pyright: ignore[reportMissingImports]

    width = max(len(c) for c in candidates)
    tokens = torch.tensor([[*c, *[0] * (width - len(c))] for c in candidates])
    lengths = torch.tensor([len(c) for c in candidates])
    return tokens, torch.arange(width) < lengths[:, None]


def _sums(values: Any, real: Any) -> Any:
    """Sums per row of values ``[n]`` that stand where ``real [C, W]`` is."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.zeros(real.shape).masked_scatter_(real, values).sum(-1)
