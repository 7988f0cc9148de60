"""ViT and GPT in the equivalent variants, as Flax NNX modules and as pure functions of a parameter tree.

    params  = init(config, seed)                       # the Pre-LN tree, whatever the config's variant
    running = running(params, config, "pre_ln")        # what the variant computes with
    logits, intermediates = apply(config, running, inputs)

Parameters are nested dicts with string keys, "blocks/0/attn/query/kernel" as a path. In coordinates "pre_ln" they are the Pre-LN
model's, in "native" the variant's own (compact where it is compressed); `running` maps either to the variant's running form.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prenorm_jax import layouts
from prenorm_jax.main_branch import LayoutError, MainBranch, Reader
from prenorm_jax.models.config import (
    GPT_SIZES,
    VIT_SIZES,
    ConfigError,
    GPTConfig,
    Transformer,
    ViTConfig,
    gpt_config,
    require_one_of,
    vit_config,
)
from prenorm_jax.models.gpt import GPT, empty_cache
from prenorm_jax.models.intercept_norms import intercept_norms
from prenorm_jax.models.stochastic_depth import draw_branch_scales
from prenorm_jax.models.swap_norms import swap_norms
from prenorm_jax.models.variants import Variant, variant
from prenorm_jax.models.vit import ViT
from prenorm_jax.paths import Tree, leaves

__all__ = [
    "GPT",
    "GPT_SIZES",
    "VIT_SIZES",
    "ConfigError",
    "GPTConfig",
    "Transformer",
    "Variant",
    "ViT",
    "ViTConfig",
    "abstract",
    "apply",
    "count",
    "draw_branch_scales",
    "empty_cache",
    "gpt_config",
    "init",
    "intercept_norms",
    "main_branch",
    "native",
    "pre_ln",
    "running",
    "stack_layers",
    "swap_norms",
    "unstack_layers",
    "variant",
    "vit_config",
]

COORDINATES = ("pre_ln", "native")


def init(config: Transformer, seed: int, coordinates: str = "pre_ln") -> Tree:
    """Initial parameters; every variant of a config begins as the same function.

    Args:
      coordinates: "pre_ln" for the Pre-LN tree, "native" for the variant's own.

    >>> config = vit_config("Ti/16", depth=1, norm="pre_crmsnorm")
    >>> init(config, 0)["blocks"]["0"]["mlp"]["up"]["kernel"].shape
    (192, 768)
    >>> init(config, 0, "native")["blocks"]["0"]["mlp"]["up"]["kernel"].shape
    (191, 768)
    """
    require_one_of("coordinates", coordinates, COORDINATES)

    def make(seed: jax.Array) -> Tree:
        params = _as_dicts(nnx.state(_module(_in_pre_ln(config), seed), nnx.Param))
        return native(params, config) if coordinates == "native" else params

    return jax.jit(make)(seed)


def running(params: Tree, config: Transformer, coordinates: str = "pre_ln", *, narrow: bool = False) -> Tree:
    """Stored parameters -> what the config's variant computes with: the h of phi = h(theta). Pure, jittable, differentiable.

    Args:
      narrow: whether the blocks' matrices that are mapped from "pre_ln" come out in config.dtype, as products take them, in one pass;
        else, and where nothing is mapped, as they are stored.
    """
    require_one_of("coordinates", coordinates, COORDINATES)
    this = variant(config)
    if coordinates == "native":
        return this.from_native(params, main_branch(config))
    matrices = [path for path in leaves(params) if path.startswith("blocks/") and path.endswith("/kernel")]
    dtypes = dict.fromkeys(matrices, config.dtype) if narrow else {}
    return this.from_pre_ln(params, main_branch(config), dtypes=dtypes)


def native(params: Tree, config: Transformer) -> Tree:
    """Pre-LN parameters -> the variant's own (compact where it is compressed)."""
    return variant(config).to_native(params, main_branch(config))


def pre_ln(params: Tree, config: Transformer) -> Tree:
    """The variant's own parameters -> Pre-LN ones, with norms of scale 1 and bias 0: the inverse of `native`, up to the fold.

    Raises: LayoutError for a pre_rmsnorm model that was trained away from zero mean: it has no Pre-LN equal; and for a model whose
      readers have the biases that a Pre-LN model has in its norms alone (qkv_bias or head_bias = False).
    """
    widened = leaves(variant(config).to_pre_ln(params, main_branch(config)))
    wanted = leaves(abstract(_in_pre_ln(config)))
    if "head_mean/bias" in widened:  # of two heads that are added, one has a bias
        widened["head/bias"] = widened["head/bias"] + widened.pop("head_mean/bias")
    homeless = [path for path in widened if path not in wanted]
    if homeless:
        raise LayoutError(
            f"{homeless[0]}: holds a norm's bias, and the Pre-LN model of this config has no such leaf ({len(homeless)} such); "
            "it is the Pre-LN model of a config with qkv_bias and head_bias"
        )
    neutral = {"scale": jnp.ones, "bias": jnp.zeros}
    flat = {
        path: widened[path] if path in widened else neutral[path.rsplit("/", 1)[1]](leaf.shape, leaf.dtype)
        for path, leaf in wanted.items()
    }
    return _as_dicts(flat)


def apply(config: Transformer, params: Tree, inputs: jax.Array, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
    """Runs the model of `config` on running parameters: (logits, intermediates) of `ViT` or `GPT`.

    Args:
      params: as `running` returns them.
      inputs: (B, H, W, C) images or (B, L) tokens.
      kwargs: of the model's call, such as `cache` and `position` of a GPT, or `only_read=True` for those who need logits alone.

    Raises: LayoutError for parameters of another model or chart, with the first leaf that differs.
    """
    graph, expected = _split(config)
    flat, wanted = leaves(params), leaves(expected)
    for path in [*wanted, *flat]:
        shapes = [getattr(tree.get(path), "shape", "no such leaf") for tree in (wanted, flat)]
        if shapes[0] != shapes[1]:
            raise LayoutError(
                f"{path}: the {config.norm} model expects {shapes[0]}, the parameters have {shapes[1]}; map them with models.running"
            )
    state = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(expected), [flat[path] for path in wanted])
    return nnx.merge(graph, state)(inputs, **kwargs)


def abstract(config: Transformer) -> Tree:
    """Shapes and dtypes of the running parameters, as a nested dict of jax.ShapeDtypeStruct; allocates nothing."""
    return _as_dicts(_split(config)[1])


def count(config: Transformer) -> int:
    """The number of parameters that the config's variant runs with.

    >>> count(vit_config("B/16"))
    86567656
    """
    return sum(leaf.size for leaf in leaves(abstract(config)).values())


def main_branch(config: Transformer) -> MainBranch:
    """The main branch of a config's parameters, with its eps and width: a shipped layout, filled in."""
    if isinstance(config, ViTConfig):
        layout = _with_heads(config)
    else:
        layout = layouts.GPT_TIED if config.tied else layouts.GPT  # type: ignore[attr-defined]
    norms = tuple(dataclasses.replace(norm, eps=config.eps) for norm in layout.norms)
    return dataclasses.replace(layout, norms=norms, width=config.width)


def _with_heads(config: ViTConfig) -> MainBranch:
    """The layout of a ViT, with the linear maps that read this config's final norm."""
    norm = dataclasses.replace(
        layouts.VIT.norms[-1],
        readers=[Reader(f"{name}/kernel", bias=f"{name}/bias") for name in config.final_readers],
        keep=None if config.final_readers else "no head: its value is what the model returns",
    )
    others = ("head/{leaf}",) if config.head and config.pre_logits else ()
    return dataclasses.replace(layouts.VIT, norms=[*layouts.VIT.norms[:-1], norm], others=others)


def stack_layers(params: Tree) -> Tree:
    """Looped layers -> stacked ones: blocks/0/..., blocks/1/... become blocks/... with layers first (config.scan_layers)."""
    blocks = params["blocks"]
    layers = [blocks[str(index)] for index in range(len(blocks))]
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Tree) -> Tree:
    """The inverse of `stack_layers`."""
    depth = jax.tree.leaves(params["blocks"])[0].shape[0]
    return {
        **params,
        "blocks": {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(depth)},
    }


def _in_pre_ln(config: Transformer) -> Transformer:
    return dataclasses.replace(config, norm="pre_ln")


def _module(config: Transformer, seed: Any) -> nnx.Module:
    model = ViT if isinstance(config, ViTConfig) else GPT
    return model(config, rngs=nnx.Rngs(jax.random.key(seed)))  # type: ignore[arg-type]


@functools.cache
def _split(config: Transformer) -> tuple[Any, Any]:
    """The graph of a config's module and its state as shapes."""
    return nnx.split(nnx.eval_shape(lambda: _module(config, 0)))


def _as_dicts(tree: Tree) -> Tree:
    """Nested dicts with string keys from a state or a flat mapping of paths."""
    nested: dict[str, Any] = {}
    for path, leaf in (tree if type(tree) is dict else leaves(tree)).items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested
