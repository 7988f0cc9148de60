"""The main branch of a pre-norm Transformer, described: which leaves write to it, which read it, and behind which norm.

A parameter tree is seen as paths ("blocks/0/attn/query/kernel") to arrays. A `MainBranch` names every one of them once, by patterns:

    {i}     one name (no "/" and no "."), remembered, so that a norm finds its readers
    {i...}  any number of path segments, none included, remembered: "blocks/{i...}/norm" is looped and stacked layers alike
    *       one name, forgotten
    **      anything

Axes are negative always, so that one rule serves looped layers (rank 2 kernels) and stacked ones (rank 3, layers first).
Descriptions are strict: a leaf that no rule covers, a leaf that two rules cover, a rule that covers nothing and an axis of the wrong
size are errors that name the leaf. Nothing is guessed from shapes.
"""

from prenorm_jax.main_branch.patterns import LayoutError
from prenorm_jax.main_branch.resolve import NormLeaves, ReaderLeaf, Resolved
from prenorm_jax.main_branch.rules import MainBranch, Norm, Reader, Writer, side_by_side

__all__ = [
    "LayoutError",
    "MainBranch",
    "Norm",
    "NormLeaves",
    "Reader",
    "ReaderLeaf",
    "Resolved",
    "Writer",
    "side_by_side",
]
