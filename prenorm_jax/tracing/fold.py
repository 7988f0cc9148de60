"""Norm scale and bias into the readers: (gamma * n + beta) W + b = n (diag(gamma) W) + (b + beta^T W), with the original W.

PAPER.md's identity 4. A fold is exact only if everything that reads the norm takes it: then scale and bias become ones and zeros,
and the program stops looking at them. Nothing is divided by gamma.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from prenorm_jax.tracing.leaf_views import Alignment, lined_up
from prenorm_jax.tracing.norms import NormFound, norms_of
from prenorm_jax.tracing.plan import Plan


@dataclasses.dataclass(frozen=True)
class Taker:
    """One reader: the kernel at `kernel`, contracted along its axis `axis`; how scale and bias line up with it; and its bias."""

    kernel: int
    axis: int
    scale: Alignment | None
    shift: Alignment | None
    bias: int | None
    bias_order: tuple[int, ...]  # the kernel's other axes, in the order of the bias's


@dataclasses.dataclass(frozen=True)
class Fold:
    """One norm's affine and the readers that take it, by position among the arguments."""

    scale: int | None
    bias: int | None
    takers: tuple[Taker, ...]

    @property
    def first(self) -> int:
        """The argument to name it by."""
        return min(k for k in (self.scale, self.bias) if k is not None)

    def positions(self) -> set[int]:
        """All arguments that it changes."""
        own = {k for k in (self.scale, self.bias) if k is not None}
        return (
            own
            | {t.kernel for t in self.takers}
            | {t.bias for t in self.takers if t.bias is not None and self.bias is not None}
        )

    def applied(self, arrays: list[Any]) -> list[Any]:
        """The arguments with the affine moved."""
        arrays = list(arrays)
        for t in self.takers:
            kernel = arrays[t.kernel]
            if self.bias is not None:
                taken = (kernel * lined_up(arrays[self.bias], kernel.ndim, t.shift)).sum(t.axis, keepdims=True)
                order = [*t.bias_order, t.axis]
                old = arrays[t.bias]
                arrays[t.bias] = (old + taken.transpose(order).reshape(old.shape)).astype(old.dtype)
            if self.scale is not None:
                arrays[t.kernel] = (kernel * lined_up(arrays[self.scale], kernel.ndim, t.scale)).astype(kernel.dtype)
        if self.scale is not None:
            arrays[self.scale] = arrays[self.scale] * 0 + 1
        if self.bias is not None:
            arrays[self.bias] = arrays[self.bias] * 0
        return arrays


def folds_of(plan: Plan) -> list[Fold]:
    """The folds that are possible for the converted norms of a plan's program."""
    found = []
    for norm in norms_of(plan):
        fold = _fold(norm) if plan.converted[norm.site] else None
        if fold is not None:
            found.append(fold)
    taken: list[int] = [k for f in found for k in f.positions()]
    return [f for f in found if all(taken.count(k) == 1 for k in f.positions())]


def _fold(norm: NormFound) -> Fold | None:
    if norm.keep is not None or (norm.scale is None and norm.bias is None):
        return None
    takers = []
    for reader in norm.readers:
        if norm.bias is not None and reader.bias is None:
            return None
        takers.append(
            Taker(
                reader.kernel.position,
                reader.kernel.axis,
                norm.scale and reader.lined_up_with(norm.scale),
                norm.bias and reader.lined_up_with(norm.bias),
                reader.bias,
                reader.bias_order,
            )
        )
        if (norm.scale and takers[-1].scale is None) or (norm.bias and takers[-1].shift is None):
            return None
    return Fold(norm.scale and norm.scale.position, norm.bias and norm.bias.position, tuple(takers))
