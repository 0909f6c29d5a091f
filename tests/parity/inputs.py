"""Token batches for the parity tests, in numpy: padded on the right, padded on the left, packed, long.

Padding holds random tokens, not one pad token: whoever reads padding is seen. Token 0 is left out, because families that
declare it as their pad token give its embedding no gradient.

Letters: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def random_tokens(rng: np.random.Generator, vocab: int, *shape: int) -> np.ndarray:
    """Tokens ``1 .. vocab - 1``, int32."""
    return rng.integers(1, vocab, shape, dtype=np.int32)


def right_mask(lengths: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """``[B, length]`` int32, 1 on the first ``lengths[i]`` places of row i."""
    return (np.arange(length) < np.asarray(lengths)[:, None]).astype(np.int32)


def to_left(array: np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """The rows of ``[B, S]`` rolled so that the first ``lengths[i]`` places of row i become its last."""
    return np.stack([np.roll(row, array.shape[1] - n) for row, n in zip(array, lengths)])


def generate_positions(mask: np.ndarray) -> np.ndarray:
    """Position ids that ``generate()`` of transformers makes from an attention mask: 0 at the first real token."""
    return np.maximum(np.cumsum(mask, -1) - 1, 0).astype(np.int32)


def pack(lengths: Sequence[int] | np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids (1, 2, ...; 0 is padding) and positions of sequences of ``lengths`` one after the other, ``[1, length]``."""
    segments, positions = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
    begin = 0
    for number, n in enumerate(lengths, 1):
        segments[0, begin : begin + n] = number
        positions[0, begin : begin + n] = np.arange(n)
        begin += n
    return segments, positions
