"""Public JAX models of many authors, as released on PyPI, through `convert`: the second table in docs/tracing.md.

Each row names its package. Widths are small and parameters random; the programs are the released ones. Rows whose package is not installed
are left out; an environment that has them all, as of jax 0.10.2 (old releases pin old versions of jax, hence --no-deps):

    pip install jax==0.10.2 flax==0.12.8 equinox dm-haiku einops transformers==4.52.4
    pip install immutabledict typeguard lark clu tensorflow Pillow torch torchvision
    pip install --no-deps nanodl jvt image-classification-jax nano-moe-jax transformer-in-transformer-flax kauldron palm-jax mlp-gpt-jax \\
        eqxvision foundax jimmy-vision jaxnn vitax penzai esm2quinox equimo semver
"""

import importlib.metadata
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from public_models import line, shaken

Made = tuple[Callable[..., Any], Any, tuple[Any, ...]]
D, V = 16, 32


def images(size: int = 16, channels: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, size, size, channels)), jnp.float32)


def tokens(length: int = 6) -> jax.Array:
    return 3 + jnp.arange(2 * length).reshape(2, length) % (V - 3)


def linen(model: Any, *inputs: Any, out: Callable[[Any], Any] = lambda y: y, **options: Any) -> Made:
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.tree.map(lambda a: a, dict(model.init(rngs, *inputs, **options)))
    return lambda p, *x: out(model.apply(p, *x, **options)), variables, inputs


def nnx_model(model: Any, *inputs: Any, out: Callable[[Any], Any] = lambda y: y) -> Made:
    from flax import nnx

    model.eval()
    graph, state = nnx.split(model)
    return lambda s, *x: out(nnx.merge(graph, s)(*x)), state, inputs


def equinox_model(model: Any, *inputs: Any, keyed: bool = True) -> Made:
    key = jax.random.key(0)
    run = (lambda m, x: m(x, key=key)) if keyed else (lambda m, x: m(x))
    return lambda m, *xs: jax.vmap(lambda *x: run(m, *x))(*xs), model, inputs


def jvt_vit() -> Made:
    from jvt.vit import ViT

    return linen(ViT(8, 3, D, 2, 2, 32), images())


def nanodl_gpt3() -> Made:
    from nanodl import GPT3

    return linen(GPT3(2, D, 2, 32, 0.0, V, D, 8, 0, 1), tokens(), training=False)


def nanodl_vit() -> Made:
    from nanodl import ViT

    return linen(ViT((8, 8), 2, D, 2, D, 0.0, 3), images(), training=False, out=lambda y: y[0])


def nanodl_mixer() -> Made:
    from nanodl import Mixer

    return linen(Mixer((8, 8), 2, D, 2, 32, 0.0, 3), images(), training=False, out=lambda y: y[0])


def nanodl_t5() -> Made:
    from nanodl import T5

    return linen(T5(2, 2, D, 32, 0.0, V, D, 8, 0, 1), tokens(), tokens(), training=False)


def nanodl_transformer() -> Made:
    from nanodl import Transformer

    return linen(Transformer(2, 2, D, 32, 0.0, V, D, 8, 0, 1), tokens(), tokens(), training=False)


def classification_vit() -> Made:
    from image_classification_jax.models.ViT import Transformer

    return linen(
        Transformer(n_layers=2, enc_dim=D, n_heads=2, n_empty_registers=2, output_dim=3), images(32), is_training=False
    )


def nano_moe() -> Made:
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(vocab_size=V, n_layers=2, n_heads=2, d_model=D, d_ff=32, n_experts=2, top_k=1, block_size=8)
    return linen(NanoMoE(config), tokens())


def tnt() -> Made:
    from transformer_in_transformer_flax.tnt import TNTConfig, TransformerInTransformer

    config = TNTConfig(num_classes=3, depth=2, image_size=32, patch_size=16, transformed_patch_size=4, inner_dim=8, inner_heads=2,
                       inner_dim_head=4, outer_dim=D, outer_heads=2, outer_dim_head=8)  # fmt: skip
    return linen(TransformerInTransformer(config), images(32))


def kauldron_vit() -> Made:
    import flax.linen as nn
    from kauldron.modules.vit import Vit, VitEncoder

    encoder = VitEncoder.from_spec(
        num_heads=2, hidden_size=D, num_layers=2, patch_size=8, mlp_size=32, encoder_norm=nn.LayerNorm()
    )
    return linen(Vit(encoder=encoder, num_classes=3), images(), out=jax.tree.leaves)


def palm() -> Made:
    from palm_jax.palm import PaLM

    return equinox_model(
        PaLM(num_tokens=V, dim=D, dim_head=8, depth=2, heads=2, key=jax.random.key(0)), tokens(), keyed=False
    )


def mlp_gpt() -> Made:
    from mlp_gpt_jax.mlp_gpt_jax import TransformedMLPGpt

    model, key = TransformedMLPGpt(num_tokens=V, dim=D, seq_len=6, depth=2), jax.random.key(0)
    return (
        lambda p, t: jax.vmap(lambda s: model.apply(p, key, s))(t),
        model.init(jax.random.key(0), tokens()[0]),
        (tokens(),),
    )


def eqxvision_vit() -> Made:
    from eqxvision.models.classification.vit import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=8, num_classes=3, embed_dim=D, depth=2, num_heads=2, key=jax.random.key(0)
    )
    return equinox_model(model, images().transpose(0, 3, 1, 2))


def eqxvision_convnext() -> Made:
    from eqxvision.models.classification.convnext import ConvNeXt, _CNBlockConfig

    config = [_CNBlockConfig(8, 12, 2), _CNBlockConfig(12, None, 1)]
    return equinox_model(ConvNeXt(config, num_classes=3, key=jax.random.key(0)), images(32).transpose(0, 3, 1, 2))


def eqxvision_swin() -> Made:
    from eqxvision.models.classification.swin import SwinTransformer

    model = SwinTransformer(patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[2, 2],
                            num_classes=3, key=jax.random.key(0))  # fmt: skip
    return equinox_model(model, images(16).transpose(0, 3, 1, 2))


def foundax_encoder() -> Made:
    from foundax.architectures.transformer import TransformerEncoder

    model = TransformerEncoder(2, D, 2, D, 32, 0.0, V, 6, key=jax.random.key(0))
    return lambda m, t: jax.vmap(m)(t), model, (tokens(),)


def foundax_encoder_decoder() -> Made:
    from foundax.architectures.transformer import Transformer

    model = Transformer(2, 2, D, 2, D, 32, V, 0.0, 8, key=jax.random.key(0))
    return lambda m, s, t: jax.vmap(m)(s, t), model, (tokens(), tokens())


def jimmy_dinov2() -> Made:
    from flax import nnx
    from jimmy.models.vit import DinoV2

    model = DinoV2(
        img_size=16, patch_size=8, embed_dim=D, depth=2, num_heads=2, init_values=1.0, reg_tokens=2, rngs=nnx.Rngs(0)
    )
    return nnx_model(model, images())


def jaxnn_vit() -> Made:
    from flax import nnx
    from jaxnn.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=8, num_classes=3, embed_dim=D, depth=2, num_heads=2, init_values=1.0, rngs=nnx.Rngs(0)
    )
    return nnx_model(model, images())


def vitax_vit() -> Made:
    from flax import nnx
    from vitax.models.vit import VisionTransformer

    model = VisionTransformer(3, 3, 16, 8, 2, 2, 32, D, fsdp=False, rngs=nnx.Rngs(0))
    return nnx_model(model, images())


def esm2() -> Made:
    import equinox as eqx
    from esm2quinox import ESM2

    model = ESM2(num_layers=2, embed_size=D, num_heads=2, token_dropout=True, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_array)
    return lambda m, t: jax.vmap(lambda s: eqx.combine(m, rest)(s).logits)(t), arrays, (tokens() + 4,)


def equimo_vit() -> Made:
    from equimo.models import VisionTransformer

    model = VisionTransformer(
        img_size=16, in_channels=3, dim=D, patch_size=8, num_heads=2, depths=[2], num_classes=3, reg_tokens=2, init_values=0.1,
        key=jax.random.key(0),
    )  # fmt: skip
    fn = lambda m, x: jax.vmap(lambda i: m(i, key=jax.random.key(1), inference=True))(x)  # noqa: E731
    return fn, model, (images().transpose(0, 3, 1, 2),)


def penzai_neox() -> Made:
    from penzai import pz
    from penzai.models.transformer.variants.gpt_neox import GPTNeoXTransformerConfig, build_gpt_neox_transformer

    config = GPTNeoXTransformerConfig(
        num_attention_heads=2, embedding_dim=D, projection_dim=8, mlp_hidden_dim=32, num_decoder_blocks=2, vocab_size=V,
        activation_fn="gelu_exact", rope_subset_size=4, rope_wavelength=1e4, layernorm_epsilon=1e-5, parameter_dtype="float32",
        activation_dtype="float32",
    )  # fmt: skip
    model = build_gpt_neox_transformer(config, init_base_rng=jax.random.key(0))
    graph, params = pz.unbind_params(model)
    params = {p.label: p.value for p in params}

    def fn(values: Any, t: Any) -> Any:
        bound = pz.bind_variables(graph, [pz.Parameter(label=k, value=v) for k, v in values.items()])
        return bound(pz.nx.wrap(t).tag("batch", "seq"), token_positions=pz.nx.arange("seq", t.shape[1])).unwrap(
            "batch", "seq", "vocabulary"
        )

    return fn, params, (tokens(),)


MODELS: list[tuple[str, str, Callable[[], Made]]] = [
    ("jvt", "ViT", jvt_vit),
    ("nanodl", "GPT3", nanodl_gpt3),
    ("nanodl", "ViT", nanodl_vit),
    ("nanodl", "Mixer", nanodl_mixer),
    ("nanodl", "T5", nanodl_t5),
    ("nanodl", "Transformer", nanodl_transformer),
    ("image-classification-jax", "ViT", classification_vit),
    ("nano-moe-jax", "NanoMoE", nano_moe),
    ("transformer-in-transformer-flax", "TransformerInTransformer", tnt),
    ("kauldron", "Vit", kauldron_vit),
    ("palm-jax", "PaLM", palm),
    ("mlp-gpt-jax", "MLPGpt", mlp_gpt),
    ("eqxvision", "VisionTransformer", eqxvision_vit),
    ("eqxvision", "ConvNeXt", eqxvision_convnext),
    ("eqxvision", "SwinTransformer", eqxvision_swin),
    ("foundax", "TransformerEncoder", foundax_encoder),
    ("foundax", "Transformer", foundax_encoder_decoder),
    ("jimmy-vision", "DinoV2", jimmy_dinov2),
    ("jaxnn", "VisionTransformer", jaxnn_vit),
    ("vitax", "VisionTransformer", vitax_vit),
    ("penzai", "GPT-NeoX", penzai_neox),
    ("esm2quinox", "ESM2", esm2),
    ("equimo", "VisionTransformer", equimo_vit),
]


def rows() -> list[str]:
    """The installed packages' rows, each from a process of its own: what one imports may not get along with what another does."""
    printed: list[str] = []
    for package, cls, _ in MODELS:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        done = subprocess.run([sys.executable, __file__, package, cls], capture_output=True, text=True)
        found = [row for row in done.stdout.splitlines() if row.startswith("| ")]
        printed += found or [failed(f"{package}", cls, f"its process ended with {done.returncode}")]
        print(printed[-1], flush=True)
    return printed


def failed(name: str, cls: str, why: str) -> str:
    return f"| {name} | `{cls}` | does not run here: {' '.join(why.split())[:100]} | | | |"


def row(package: str, cls: str, make: Callable[[], Made]) -> str:
    name = f"{package} {importlib.metadata.version(package)}"
    try:
        fn, params, inputs = make()
        jax.eval_shape(fn, params, *inputs)
    except Exception as error:  # a released model that does not run on this JAX, or without a package that is missing
        traceback.print_exc()
        return failed(name, cls, f"{type(error).__name__}: {error}")
    return line(name, cls, fn, shaken(params), inputs, verbose=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(next(row(*model) for model in MODELS if list(model[:2]) == sys.argv[1:]))
    else:
        rows()
