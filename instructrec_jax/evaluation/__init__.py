"""Metrics with intervals, paired tests, slices, and the evaluation of recommendation files. See ``docs/metrics.md``.

Nothing in these modules imports JAX: they read scores and lists as NumPy arrays, whoever made them.
"""
