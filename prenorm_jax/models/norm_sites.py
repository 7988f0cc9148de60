"""What `swap_norms` and `intercept_norms` share: what stands at the norms of a described main branch, and what may stand there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from prenorm_jax import transforms
from prenorm_jax.main_branch import LayoutError, MainBranch, Norm, patterns
from prenorm_jax.models.config import require_one_of
from prenorm_jax.models.variants import Variant, variant_of
from prenorm_jax.paths import Tree

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Form:
    """The form in which a model computes: the norm on its main branch, and there a basis and a layout where that is compressed."""

    norm: str = "pre_rmsnorm"
    basis: str = "reflect"
    layout: str = "compact"

    def __post_init__(self) -> None:
        require_one_of("norm", self.norm, ("pre_rmsnorm", "pre_crmsnorm"))
        require_one_of("basis", self.basis, ("reflect", "drop"))
        require_one_of("layout", self.layout, ("compact", "packed"))

    @property
    def variant(self) -> Variant:
        """Norm and coordinates as functions."""
        return variant_of(self.norm, self.basis, self.layout)

    def of(self, params: Tree, spec: MainBranch) -> Tree:
        """Pre-LN parameters (or recentered ones) -> this form's."""
        if self.norm == "pre_rmsnorm":
            return transforms.to_pre_rmsnorm(params, spec)
        compact = transforms.compress(params, spec, self.basis)
        return transforms.pack(compact, spec) if self.layout == "packed" else compact

    def apply(
        self, x: Array, scale: Array | None, bias: Array | None, *, eps: float, kept: bool, dtype: Any = None
    ) -> Array:
        """The norm of a main branch (..., R): (..., R), or (..., D) in the Pre-LN coordinates where its affine is kept.

        Args:
          dtype: of the result; None for the widest of x, scale and bias.
        """
        dtype = dtype or jnp.result_type(x, *(leaf for leaf in (scale, bias) if leaf is not None))
        norm = self.variant.norm_in_pre_ln if kept else self.variant.norm
        return norm(x.astype(jnp.promote_types(x.dtype, dtype)), scale, bias, eps=eps).astype(dtype)


def eps_of(module: Any, rule: Norm, where: str) -> float:
    """The eps of a norm module. Raises: LayoutError where its description has another, or neither has one."""
    found = getattr(module, "epsilon", getattr(module, "eps", None))
    eps = rule.eps if found is None else found
    if eps is None:
        raise LayoutError(
            f"{where}: a {type(module).__name__} without epsilon; say it in the description (Norm(eps=...))"
        )
    if None not in (found, rule.eps) and found != rule.eps:
        raise LayoutError(f"{where}: its epsilon is {found}, the description says {rule.eps}; leave eps out of it")
    return float(eps)


def require_plain(module: Any, classes: tuple[type, ...], layer_norm: type, where: str) -> None:
    """Refuses what is no LayerNorm over the last axis alone, as far as a module shows it. Raises: LayoutError."""
    is_layer_norm = isinstance(module, layer_norm) and type(module).__call__ is layer_norm.__call__
    if not is_layer_norm and not isinstance(module, classes):
        raise LayoutError(
            f"{where}: the description has a norm there, the model has a {type(module).__name__}; if that computes LayerNorm over its "
            f"last axis, say so (norm_classes=({type(module).__name__},))"
        )
    for name, allowed in (("reduction_axes", (-1, (-1,))), ("feature_axes", (-1, (-1,))), ("axis_name", (None,))):
        value = getattr(module, name, allowed[0])
        if value not in allowed:
            raise LayoutError(f"{where}: a LayerNorm with {name}={value}; only one over the last axis can be swapped")


def require_all(spec: MainBranch, params: Tree, found: set[str], how: str) -> None:
    """Every norm of a description has its module among those `found`. Raises: LayoutError."""
    for norm in spec.resolve(params).norms:
        if norm.module is None:
            raise LayoutError(
                f"norm {norm.name}: it has no leaf to be found by; name its module in the description (Norm(module=...))"
            )
        if not any(patterns.match(norm.module, path) for path in found):
            raise LayoutError(
                f"{norm.module}: the description has a norm there, the model {how} no LayerNorm of this path; it saw "
                f"{', '.join(sorted(found)[:6]) or 'none'}. Call prenorm_jax.rms_norm there yourself, or mend the path"
            )


def require_recentered_modules(spec: MainBranch, found: set[str], how: str) -> None:
    """Every pattern of `recentered` has a module among those `found`. Raises: LayoutError."""
    for pattern in spec.recentered:
        if not any(patterns.match(pattern, path) for path in found):
            raise LayoutError(
                f"recentered {pattern}: the model {how} no module of this path that is called, so nothing is recentered; a table read "
                "directly, or what another method returns, has to be recentered where it is used: x - x.mean(-1, keepdims=True)"
            )
