"""Norm scale and bias into the readers: (gamma * n + beta) W + b = n (diag(gamma) W) + (b + beta^T W), with the original W.

PAPER.md's identity 4. A fold is exact only if everything that reads the norm takes it: then scale and bias become ones and zeros,
and the program stops looking at them. Nothing is divided by gamma.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from prenorm_jax.tracing.leaf_views import Alignment, lined_up
from prenorm_jax.tracing.norms import NormFound, norms_of
from prenorm_jax.tracing.plan import Plan


@dataclasses.dataclass(frozen=True)
class Taker:
    """One reader: the kernel at `kernel`, contracted along its axis `axis`, and its bias."""

    kernel: int
    axis: int
    scale: Alignment  # how the norm's scale lines up with the kernel's leaf; () if it has none
    shift: Alignment  # and its bias
    bias: int  # -1 if there is none
    bias_order: tuple[int, ...]  # the kernel's other axes, in the order of the bias's


@dataclasses.dataclass(frozen=True)
class Fold:
    """One norm's affine and the readers that take it, by position among the arguments; -1 for what it does not have."""

    scale: int
    bias: int
    takers: tuple[Taker, ...]

    @property
    def own(self) -> set[int]:
        """The norm's own leaves."""
        return {self.scale, self.bias} - {-1}

    def positions(self) -> set[int]:
        """All arguments that it changes."""
        biases = {t.bias for t in self.takers} if self.bias >= 0 else set()
        return self.own | {t.kernel for t in self.takers} | biases

    def moved(self, at: Mapping[int, int]) -> Fold:
        """The same for arguments at other positions."""
        takers = (dataclasses.replace(t, kernel=at[t.kernel], bias=at[t.bias]) for t in self.takers)
        return Fold(at[self.scale], at[self.bias], tuple(takers))

    def applied(self, arrays: list[Any]) -> list[Any]:
        """The arguments with the affine moved."""
        arrays = list(arrays)
        for t in self.takers:
            kernel = arrays[t.kernel]
            if self.bias >= 0:
                taken = (kernel * lined_up(arrays[self.bias], kernel.ndim, t.shift)).sum(t.axis, keepdims=True)
                old = arrays[t.bias]
                moved = taken.transpose([*t.bias_order, t.axis]).reshape(old.shape)
                arrays[t.bias] = (old + moved).astype(old.dtype)
            if self.scale >= 0:
                arrays[t.kernel] = (kernel * lined_up(arrays[self.scale], kernel.ndim, t.scale)).astype(kernel.dtype)
        if self.scale >= 0:
            arrays[self.scale] = arrays[self.scale] * 0 + 1
        if self.bias >= 0:
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
        scale = reader.lined_up_with(norm.scale) if norm.scale is not None else ()
        shift = reader.lined_up_with(norm.bias) if norm.bias is not None else ()
        if scale is None or shift is None or (norm.bias is not None and reader.bias is None):
            return None
        bias = -1 if reader.bias is None else reader.bias
        takers.append(Taker(reader.kernel.position, reader.kernel.axis, scale, shift, bias, reader.bias_order))
    scale_at = -1 if norm.scale is None else norm.scale.position
    return Fold(scale_at, -1 if norm.bias is None else norm.bias.position, tuple(takers))
