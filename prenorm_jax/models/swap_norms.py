"""Flax NNX: a model of anybody's with RMSNorm in the place of its LayerNorms."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prenorm_jax import transforms
from prenorm_jax.main_branch import LayoutError, MainBranch, Norm
from prenorm_jax.models.norm_sites import Form, eps_of, require_all, require_plain, require_recentered_modules
from prenorm_jax.paths import Tree, leaves, with_leaves

Array = jax.Array


class MainBranchNorm(nnx.Module):
    """RMSNorm or CRMSNorm where a LayerNorm was: (..., R) -> (..., R), statistics in float32 or wider.

    A scale and a bias are there if the LayerNorm's could not be folded into its readers; one that is kept returns (..., D), in the Pre-LN
    coordinates.
    """

    def __init__(self, form: Form, *, scale: Any, bias: Any, eps: float, kept: bool, dtype: Any):
        self.form, self.epsilon, self.kept, self.dtype = form, eps, kept, dtype
        self.scale, self.bias = nnx.data(scale), nnx.data(bias)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        if mask is not None:
            raise ValueError("mask: RMSNorm on the main branch is over whole rows; normalise without a mask")
        scale, bias = (leaf if leaf is None else leaf[...] for leaf in (self.scale, self.bias))
        return self.form.apply(x, scale, bias, eps=self.epsilon, kept=self.kept, dtype=self.dtype)


def swap_norms(
    model: nnx.Module,
    spec: MainBranch,
    params: Tree | None = None,
    *,
    norm: str = "pre_rmsnorm",
    basis: str = "reflect",
    layout: str = "compact",
    norm_classes: tuple[type, ...] = (),
) -> nnx.Module:
    """A new model with RMSNorm (or CRMSNorm) at the norms of a main branch, and parameters that fit it; `model` is left as it is.

    Norms that the description doesn't name (of queries and keys, for example) stay. Each eps is the module's own. The scale and bias of a
    norm leave the model where they were folded into its readers; a reader without a bias gains one where the description says so.
    Outputs of `spec.recentered` are recentered, or compressed, where the module is called: a table that is read directly is not, nor is
    what another method returns.

    Args:
      model: with `nnx.LayerNorm`s, looped or stacked for `nnx.scan`, whose `nnx.Param`s the description describes.
      params: parameters in the form asked for, as a tree with the paths of `nnx.state(model, nnx.Param)`. None: the model's own,
        transformed here.
      norm: "pre_rmsnorm" or "pre_crmsnorm".
      basis, layout: of "pre_crmsnorm": "reflect" or "drop", "compact" (width d - 1) or "packed" (d lanes, d - 1 of them live).
      norm_classes: classes beside `nnx.LayerNorm` that compute LayerNorm over the last axis; leaves named as in the description.

    Returns: a model of the same class. Compressed, its linear maps are as wide as their parameters; a module that fixes its width in
      another way has to be built at that width (`model`, with `params` to go with it).
    Raises: LayoutError for a description that doesn't fit the model, naming the module or leaf; for `params` whose writers have a mean.

    >>> from prenorm_jax import Norm, Reader, Writer
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.embed, self.head = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 3, use_bias=False, rngs=rngs)
    ...         self.norm = nnx.LayerNorm(4, rngs=rngs)
    ...     def __call__(self, tokens):
    ...         return self.head(self.norm(self.embed(tokens)))
    >>> spec = MainBranch(
    ...     [Writer("embed/embedding")],
    ...     [Norm([Reader("head/kernel", bias="head/bias")], scale="norm/scale", bias="norm/bias")],
    ... )
    >>> model, tokens = Model(nnx.Rngs(0)), jnp.arange(7)
    >>> converted = swap_norms(model, spec, norm="pre_crmsnorm")
    >>> converted.head.kernel.shape, bool(jnp.allclose(converted(tokens), model(tokens), atol=1e-5))
    ((3, 3), True)
    """
    form = Form(norm, basis, layout)
    own = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if params is None:
        params = _without_folded(form.of(own, spec), spec)
    elif norm == "pre_rmsnorm" and not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves(params).values()):
        transforms.require_recentered(params, spec, stored=jnp.bfloat16)
    swap = _Swap(spec, form, leaves(params), norm_classes)
    swapped = nnx.recursive_map(swap.node, nnx.clone(model))
    require_all(spec, params, swap.norms, "has")
    require_recentered_modules(spec, swap.recentered, "has")
    swap.require_all_used()
    return swapped


def _without_folded(params: Tree, spec: MainBranch) -> Tree:
    """Without the ones and zeros that folding left of the norms' affine."""
    flat = leaves(params)
    folded = {path for norm in spec.resolve(params).norms if norm.folds for path in (norm.scale, norm.bias)}
    return with_leaves(params, {path: leaf for path, leaf in flat.items() if path not in folded})


class _Swap:
    """One pass over a model: leaves take their new values, norms and recentered modules are exchanged."""

    def __init__(self, spec: MainBranch, form: Form, flat: dict[str, Any], norm_classes: tuple[type, ...]):
        self.spec, self.form, self.flat, self.norm_classes = spec, form, flat, norm_classes
        self.unused, self.left = set(flat), set[str]()
        self.norms, self.recentered = set[str](), set[str]()  # paths of those that were exchanged
        norms = spec.resolve(flat).norms
        self.biases = {reader.bias for norm in norms for reader in norm.readers if reader.bias}

    def node(self, path: tuple[Any, ...], node: Any) -> Any:
        where = "/".join(map(str, path))
        if isinstance(node, nnx.Param):
            return self._variable(where, node)
        if not isinstance(node, nnx.Module):
            return node
        rule = self.spec.norm_at(where)
        if rule is not None:
            return self._norm(where, node, rule)
        self._biases(where, node)
        for kind, declare in _DECLARED_WIDTHS:
            if isinstance(node, kind):
                declare(node)
        if self.spec.is_recentered(where) and callable(node):
            self.recentered.add(where)
            node.__class__ = _recentered(type(node), self.form)
        return node

    def require_all_used(self) -> None:
        if self.unused:
            raise LayoutError(f"{min(self.unused)}: the parameters have this leaf, the model has no place for it")
        missing = {path for path in self.left - self.biases if path.rpartition("/")[0] not in self.norms}
        if missing:
            raise LayoutError(f"{min(missing)}: the model has this leaf, the parameters don't")

    def _variable(self, where: str, variable: nnx.Param) -> nnx.Variable:
        if where not in self.flat:
            self.left.add(where)  # a norm's leaf, or a reader's bias that is now a row of its kernel
            return variable
        self.unused.discard(where)
        return variable.replace(self.flat[where])

    def _norm(self, where: str, node: Any, rule: Norm) -> MainBranchNorm:
        require_plain(node, self.norm_classes, nnx.LayerNorm, where)
        self.norms.add(where)
        affine = {}
        for role, default in (("scale", "scale"), ("bias", "bias")):
            pattern = getattr(rule, role)
            name = pattern.rpartition("/")[2] if pattern else default
            affine[role] = getattr(node, name, None) if f"{where}/{name}" in self.flat else None
        return MainBranchNorm(
            self.form,
            **affine,
            eps=eps_of(node, rule, where),
            kept=rule.keep is not None,
            dtype=getattr(node, "dtype", None),
        )

    def _biases(self, where: str, node: Any) -> None:
        """Gives a reader the bias that it gained, and takes the one that became a row of its kernel."""
        for path in self.biases:
            parent, _, name = path.rpartition("/")
            if parent != where:
                continue
            has = getattr(node, name, None) is not None
            if path in self.flat and not has:
                if not hasattr(node, name):
                    raise LayoutError(
                        f"{path}: the reader gains this bias, and a {type(node).__name__} has no place for it; keep the norm's affine "
                        "(Reader without bias, or Norm(keep=...)), or give it a bias"
                    )
                self.unused.discard(path)
                setattr(node, name, nnx.Param(self.flat[path]))
            elif path not in self.flat and has:
                setattr(node, name, nnx.data(None))
            if hasattr(node, "use_bias"):
                node.use_bias = path in self.flat


@functools.cache
def _recentered(cls: type, form: Form) -> type:
    """A module's class, with its output recentered (or compressed); paths of its leaves stay what they were."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Array:
        return form.variant.write(cls.__call__(self, *args, **kwargs))

    return type(cls)(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _declare_linear(node: nnx.Linear) -> None:
    node.in_features, node.out_features = node.kernel.shape[-2:]


def _declare_linear_general(node: nnx.LinearGeneral) -> None:
    inputs, outputs = len(node.in_features), len(node.out_features)
    shape = node.kernel.shape[-(inputs + outputs) :]
    node.in_features, node.out_features = shape[:inputs], shape[inputs:]


def _declare_embed(node: nnx.Embed) -> None:
    node.features = node.embedding.shape[-1]


def _declare_attention(node: nnx.MultiHeadAttention) -> None:
    (node.in_features,), (node.in_kv_features,) = node.query.in_features, node.key.in_features
    (node.out_features,) = node.out.out_features


# Modules that keep their widths beside their parameters, in the order in which they have to be set.
_DECLARED_WIDTHS: tuple[tuple[type, Callable[[Any], None]], ...] = (
    (nnx.Linear, _declare_linear),
    (nnx.LinearGeneral, _declare_linear_general),
    (nnx.Embed, _declare_embed),
    (nnx.MultiHeadAttention, _declare_attention),
)
