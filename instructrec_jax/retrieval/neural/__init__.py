"""Baselines that are trained by gradients, in Flax Linen. JAX is imported when one is fitted or restored."""
