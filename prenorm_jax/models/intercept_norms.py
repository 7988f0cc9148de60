"""Flax Linen: a model of anybody's with RMSNorm in the place of its LayerNorms, while it is applied."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamNotFoundError

from prenorm_jax.main_branch import LayoutError, MainBranch, Norm, patterns
from prenorm_jax.models.norm_sites import Form, eps_of, require_all, require_plain, require_recentered_modules
from prenorm_jax.paths import Tree, leaves
from prenorm_jax.transforms import require_recentered

Array = jax.Array


def intercept_norms(
    spec: MainBranch,
    *,
    norm: str = "pre_rmsnorm",
    basis: str = "reflect",
    layout: str = "compact",
    norm_classes: tuple[type, ...] = (),
    recentered: bool = True,
) -> Callable[..., Any]:
    """For `nn.intercept_methods`: runs RMSNorm (or CRMSNorm) at the norms of a main branch, on transformed parameters.

    Norms that the description doesn't name stay. Each eps is the module's own; a norm's scale and bias are applied if the parameters have
    them. A bias that a `Dense` (or anything else with `use_bias`) gained is added, one that became a row of its kernel is not asked for.
    Outputs of `spec.recentered` are recentered, or compressed. Under `jit` the interceptor has to be active while the model is traced.

    Args:
      norm: "pre_rmsnorm" or "pre_crmsnorm": the form of the parameters. Linen modules declare their widths, so a compressed model is
        built at d - 1 lanes (or d, packed), with everything that is not a lane of the main branch (heads, mlp width) said explicitly.
      basis, layout: of "pre_crmsnorm".
      norm_classes: classes beside `nn.LayerNorm` that compute LayerNorm over the last axis; leaves named as in the description.
      recentered: whether parameters have to be those of a recentered model, where they have values (traced ones have none): with others,
        RMSNorm is another function than the LayerNorm in whose place it stands. False for an RMSNorm model in its own right.

    Raises: LayoutError while the model is applied: for a description that doesn't fit the model, naming the module; for parameters
      whose writers have a mean, unless `recentered` is False.

    >>> import jax.numpy as jnp
    >>> from prenorm_jax import Norm, Reader, Writer, to_pre_rmsnorm
    >>> class Model(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, tokens):
    ...         x = nn.Embed(7, 4, name="embed")(tokens)
    ...         return nn.Dense(3, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))
    >>> spec = MainBranch(
    ...     [Writer("embed/embedding")],
    ...     [Norm([Reader("head/kernel", bias="head/bias")], scale="norm/scale", bias="norm/bias")],
    ... )
    >>> model, tokens = Model(), jnp.arange(7)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> with nn.intercept_methods(intercept_norms(spec)):
    ...     logits = model.apply({"params": to_pre_rmsnorm(params, spec)}, tokens)
    >>> bool(jnp.allclose(logits, model.apply({"params": params}, tokens), atol=1e-5))
    True
    """
    return _Interceptor(spec, Form(norm, basis, layout), norm_classes, recentered and norm == "pre_rmsnorm")


class _Interceptor:
    def __init__(self, spec: MainBranch, form: Form, norm_classes: tuple[type, ...], recentered: bool):
        self.spec, self.form, self.norm_classes, self.recentered = spec, form, norm_classes, recentered
        self.seen: tuple[int, ...] = ()  # leaves that are known to be recentered
        self.inside = False  # a call of the model
        self.norms, self.written = set[str](), set[str]()  # paths that ran in it: of norms, of recentered modules
        self.biases = [reader.bias for rule in spec.norms for reader in rule.readers if reader.bias]

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.is_initializing() or context.method_name == "setup":
            return call(*args, **kwargs)
        if module.path or self.inside:
            return self._module(call, args, kwargs, context)
        self.inside, self.norms, self.written = True, set(), set()
        try:
            params = module.variables["params"]
            self._require_recentered(params)
            y = self._module(call, args, kwargs, context)
            self._require_all_ran(params, context.method_name)
        finally:
            self.inside = False
        return y

    def _module(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        module, where = context.module, "/".join(context.module.path)
        rule = self.spec.norm_at(where)
        if rule is not None:
            return self._norm(module, rule, where, *args, **kwargs)
        y = self._with_biases(call, module, where, args, kwargs)
        if not self.spec.is_recentered(where):
            return y
        self.written.add(where)
        return self.form.variant.write(y)

    def _require_all_ran(self, params: Tree, method: str) -> None:
        """Every norm and every recentered module of the description in `__call__`; in another method, which may be a part of the model,
        one norm at least."""
        if method == "__call__":
            require_all(self.spec, params, self.norms, "ran")
            require_recentered_modules(self.spec, self.written, "ran")
        elif not self.norms:
            raise LayoutError(
                f"{method}: none of the description's norms ran in it; call prenorm_jax.rms_norm there yourself, or mend their paths"
            )

    def _require_recentered(self, params: Tree) -> None:
        """Refuses parameters whose writers have a mean; those of one call are looked at once."""
        flat = leaves(params)
        seen = tuple(map(id, flat.values()))
        if self.recentered and seen != self.seen and not any(isinstance(a, jax.core.Tracer) for a in flat.values()):
            require_recentered(params, self.spec, stored=jnp.bfloat16)
            immutable = all(isinstance(leaf, jax.Array) for leaf in flat.values())
            self.seen = seen if immutable else ()

    def _norm(self, module: nn.Module, rule: Norm, where: str, x: Array, *, mask: Array | None = None) -> Array:
        require_plain(module, self.norm_classes, nn.LayerNorm, where)
        if mask is not None:
            raise ValueError(f"{where}: mask: RMSNorm on the main branch is over whole rows; normalise without a mask")
        self.norms.add(where)
        scale, bias = (
            _param(module, (pattern or role).rpartition("/")[2])
            for role, pattern in (("scale", rule.scale), ("bias", rule.bias))
        )
        dtype = getattr(module, "dtype", None)
        return self.form.apply(x, scale, bias, eps=eps_of(module, rule, where), kept=rule.keep is not None, dtype=dtype)

    def _with_biases(
        self, call: Callable[..., Any], module: Any, where: str, args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """A module's output, with the biases of its readers as the parameters have them, declared or not."""
        names = {name for bias in self.biases if patterns.match(bias, f"{where}/{(name := bias.rpartition('/')[2])}")}
        there = {name: bias for name in names if (bias := _param(module, name)) is not None}
        if names - set(there) and getattr(module, "use_bias", False):
            with _without_bias(module):
                return call(*args, **kwargs)
        try:
            y = call(*args, **kwargs)
        except ScopeParamNotFoundError as error:
            asked = next((name for name in names - set(there) if f'"{name}"' in str(error)), None)
            if asked is None or f'/{where.rpartition("/")[2]}"' not in str(error):
                raise
            raise LayoutError(
                f"{where}/{asked}: a {type(module).__name__} asks for this bias, and the parameters don't have it: packed, it is a row of "
                'its kernel. Use layout="compact", or a module that can do without (use_bias=False)'
            ) from error
        for name, bias in there.items():
            if name in module.scope.reservations:  # the module has asked for it
                continue
            if getattr(module, "use_bias", True):
                raise LayoutError(
                    f"{where}/{name}: the reader gains this bias, and a {type(module).__name__} has no place for it; keep the norm's "
                    "affine (Reader without bias, or Norm(keep=...)), or give it a bias"
                )
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


def _param(module: nn.Module, name: str) -> Array | None:
    return nn.meta.unbox(module.get_variable("params", name)) if module.has_variable("params", name) else None


@contextlib.contextmanager
def _without_bias(module: Any) -> Iterator[None]:
    """A module that doesn't ask for its bias. Modules are frozen, and made anew each time a model is applied."""
    object.__setattr__(module, "use_bias", False)
    try:
        yield
    finally:
        object.__setattr__(module, "use_bias", True)
