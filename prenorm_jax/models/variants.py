"""The variants as data: what a model asks of Pre-LN, Pre-RMSNorm, Pre-CRMSNorm (two bases, two layouts) and the no-norm control.

A model built from a `Variant` never asks which one it is. `R = lanes(D)` is the width of its main branch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prenorm_jax import bases, norms, transforms
from prenorm_jax.main_branch import MainBranch
from prenorm_jax.models.config import Transformer
from prenorm_jax.paths import Tree
from prenorm_jax.transforms import NO_DTYPES, Dtypes

Array = jax.Array
Chart = Callable[..., Tree]
"""(parameters, their main branch) -> parameters; one that maps takes `dtypes` as well (`transforms.compress`)."""


def _same(x: Array) -> Array:
    return x


def _same_tree(params: Tree, spec: MainBranch, *, dtypes: Dtypes = NO_DTYPES) -> Tree:
    return params


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of the equivalent Transformers.

    Attributes:
      kind: kind(R, eps), which of the norms of `prenorm_jax.norms` it has, in the main branch's coordinates; None for none.
      affine: whether its norms have a scale and a bias of their own (only the Pre-LN model's).
      reader_bias: whether a reader's bias is a leaf (not where it is its kernel's spare row).
      lanes: D -> R.
      write: an activation (..., D) -> (..., R), for what reaches the main branch otherwise than through a mapped weight;
        float32 or wider.
      read: a normalised main branch (..., R) -> (..., D), for what reads it in the Pre-LN coordinates.
      from_pre_ln: Pre-LN parameters -> what this variant computes with.
      from_native: the variant's own parameters, as trained and stored -> what it computes with.
      to_native: Pre-LN parameters -> the variant's own.
      to_pre_ln: the variant's own parameters -> Pre-LN ones (less the norms' affine, which is 1 and 0).
    """

    kind: Callable[[int, float], norms.Kind] | None
    affine: bool = False
    reader_bias: bool = True
    lanes: Callable[[int], int] = lambda width: width
    write: Callable[[Any], Array] = _same
    read: Callable[[Array], Array] = _same
    from_pre_ln: Chart = _same_tree
    from_native: Chart = _same_tree
    to_native: Chart = _same_tree
    to_pre_ln: Chart = _same_tree

    def norm(self, x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float) -> Array:
        """The norm of x (..., R) with a scale and a bias (R,)."""
        return x if self.kind is None else norms.norm(x, scale, bias, self.kind(x.shape[-1], eps))

    def norm_in_pre_ln(self, x: Array, scale: Array | None, bias: Array | None, *, eps: float) -> Array:
        """LayerNorm's value in its own coordinates, (..., R) -> (..., D), whatever the coordinates of x."""
        if self.read is _same:
            return self.norm(x, scale, bias, eps=eps)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        n = self.read(self.norm(wide, eps=eps))
        for apply, leaf in ((jnp.multiply, scale), (jnp.add, bias)):
            n = n if leaf is None else apply(n, leaf.astype(n.dtype).reshape((1,) * (n.ndim - 1) + leaf.shape))
        return n.astype(x.dtype)


def variant(config: Transformer) -> Variant:
    """The variant that a model's config names."""
    return variant_of(config.norm, config.basis, config.layout)


@functools.cache
def variant_of(norm: str, basis: str = "reflect", layout: str = "compact") -> Variant:
    """The variant of this norm, basis and layout."""
    if norm == "pre_crmsnorm":
        return _pre_crmsnorm(basis, packed=layout == "packed")
    return _FULL_WIDTH[norm]


def _to_pre_rmsnorm(params: Tree, spec: MainBranch, *, dtypes: Dtypes = NO_DTYPES) -> Tree:
    return transforms.strip_affine(transforms.to_pre_rmsnorm(params, spec, dtypes=dtypes), spec, layer_scales=True)


def _recentered(params: Tree, spec: MainBranch) -> Tree:
    transforms.require_recentered(params, spec)
    return params


_FULL_WIDTH = {
    "pre_ln": Variant(norms.layer, affine=True),
    "pre_rmsnorm": Variant(
        norms.rms,
        write=bases.recenter_activation,
        from_pre_ln=_to_pre_rmsnorm,
        to_native=_to_pre_rmsnorm,
        to_pre_ln=_recentered,
    ),
    "no_norm": Variant(None, from_pre_ln=_to_pre_rmsnorm, to_native=_to_pre_rmsnorm),
}


def _pre_crmsnorm(basis: str, packed: bool) -> Variant:
    def compressed(params: Tree, spec: MainBranch, layout: str, *, dtypes: Dtypes = NO_DTYPES) -> Tree:
        narrow = transforms.compress(params, spec, basis, layout, dtypes=dtypes)
        return transforms.strip_affine(narrow, spec, layer_scales=True)

    to_compact = functools.partial(compressed, layout="compact")

    def to_pre_ln(params: Tree, spec: MainBranch) -> Tree:
        return transforms.decompress(params, spec, basis)

    if not packed:
        return Variant(
            functools.partial(norms.crms, basis=basis),
            lanes=lambda width: width - 1,
            write=lambda x: bases.compress_activation(x, basis),
            read=lambda n: bases.expand_activation(n, basis),
            from_pre_ln=to_compact,
            to_native=to_compact,
            to_pre_ln=to_pre_ln,
        )
    return Variant(
        functools.partial(norms.packed, basis=basis),
        reader_bias=False,
        write=lambda x: bases.compress_activation(x, basis, layout="packed"),
        read=lambda n: bases.expand_activation(n, basis, layout="packed"),
        from_pre_ln=functools.partial(compressed, layout="packed"),
        from_native=transforms.pack,
        to_native=to_compact,
        to_pre_ln=to_pre_ln,
    )
