"""Which layout of a request costs less: its candidates packed behind the prompt, or rows that continue the prompt's cache."""

from __future__ import annotations

from dataclasses import dataclass

from instructrec_jax.models.architecture import Architecture
from instructrec_jax.scoring.buckets import bucket


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of the layers: ``per_token`` for the products with weights, ``per_pair`` for attention."""

    per_token: float
    per_pair: float

    @classmethod
    def of(cls, arch: Architecture) -> Cost:
        """Of one forward pass, all layers; the heads cost the same in either layout."""
        heads = arch.kv_heads * arch.groups * arch.head_size
        attention = 2 * arch.width * (heads + arch.kv_heads * arch.head_size)
        mlp = (3 if arch.gated else 2) * arch.width * arch.mlp_width
        return cls(2.0 * arch.layers * (attention + mlp), 4.0 * arch.layers * heads)

    def packed(self, prompt: int, nodes: int, room: int) -> float:
        """One row of prompt and candidates; rows of up to ``room`` tokens are shared with other requests, longer ones padded."""
        total = prompt + nodes
        size = total if total <= room else bucket(total)
        return size * (self.per_token + self.per_pair * max(size, room if total <= room else size))

    def room(self, nodes: float, shared: int, room: int) -> int:
        """Tokens of a row, ``room`` or a few times as many, where each computes a prefix of ``shared`` tokens once for all of its requests.

        A longer row holds more requests behind the prefix and pays for it in attention. ``nodes``: of a request, the prefix included.
        """
        if not shared:
            return room

        def of_a_request(size: int) -> float:
            requests = max((size - shared) / max(nodes - shared, 1), 1)
            return size * (self.per_token + self.per_pair * size) / requests

        return min((room, 2 * room, 4 * room), key=of_a_request)

    def batched(self, prompt: int, nodes: int, block: int) -> float:
        """The prompt in a row of its own, then blocks of ``block`` nodes."""
        size = bucket(prompt, 16)
        blocks = -(-nodes // block)
        read = size * (self.per_token + self.per_pair * size)
        return read + blocks * block * (self.per_token + self.per_pair * (size + block))
