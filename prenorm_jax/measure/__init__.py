"""Equivalence against the float64 oracle, drift, and step times with their controls."""

from typing import Any

__all__ = ["compare_variants"]


def __getattr__(name: str) -> Any:
    """`compare_variants`, imported when it is asked for: `drift` also runs where what training needs is not installed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prenorm_jax.measure.comparison import compare_variants

    return compare_variants
