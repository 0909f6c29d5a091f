"""What of a layer is kept for the backward pass; the rest is computed again. The names are those of ``model.remat``.

none        everything                                                         fastest, most memory
dots        the results of products with weights (MaxText: minimal)
qkv         queries, keys and values after their rotation, and what attention gives (MaxText: save_qkv_proj and context)
attention   what attention gives
full        only the layer's input (MaxText: full)                             about a third more operations
least       as full; and attention once more, apart from the MLP               least memory, a tenth more again
offload     as dots, but in the host's memory; where the backend can (TPU, GPU)
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

_POLICIES = jax.checkpoint_policies


def _policy(remat: str) -> Any:
    return {
        "full": _POLICIES.nothing_saveable,
        "least": _POLICIES.nothing_saveable,
        "attention": _POLICIES.save_only_these_names("context"),
        "qkv": _POLICIES.save_only_these_names("qkv", "context"),
        "dots": _POLICIES.dots_with_no_batch_dims_saveable,
        "offload": _POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[remat]


def rematerialised(block: type[nn.Module], remat: str) -> Any:
    """The module's class with the policy."""
    return block if remat == "none" else nn.remat(block, prevent_cse=False, policy=_policy(remat))


def named(name: str, *values: jax.Array) -> Any:
    """The values under a name that policies know: ``qkv`` or ``context``."""
    out = [checkpoint_name(value, name) for value in values]
    return tuple(out) if len(out) > 1 else out[0]
