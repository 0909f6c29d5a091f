"""Recommendation as instruction tuning of a language model, on JAX.

Shape letters, used in every einsum string, annotation and comment of the package:

    B batch          S sequence       D model width      L layers
    N query heads    K key/value heads  H head size      F feed-forward width
    V vocabulary     I items          C candidates       U users
    P prompt         R adapter rank

Importing the package imports neither JAX nor Flax; the modules that need them do.
"""

__version__ = "0.1.0"
