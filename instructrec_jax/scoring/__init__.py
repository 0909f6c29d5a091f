"""Scores of candidates given a prompt: one interface, several methods, jitted over requests and candidates."""

from instructrec_jax.scoring.scorer import METHODS, Request, Scorer

__all__ = ["METHODS", "Request", "Scorer"]
