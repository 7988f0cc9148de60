"""Equivalence against the float64 oracle, and step times with their controls."""

from prenorm_jax.measure.comparison import compare_variants

__all__ = ["compare_variants"]
