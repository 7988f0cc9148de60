"""Haiku layouts, on Haiku models with the public names: named blocks (a GPT and a ViT) and blocks told apart by counters."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prenorm_jax as pn
from prenorm_jax import layouts

pytestmark = pytest.mark.slow  # on one Python

D, HEADS, VOCAB, CLASSES, LAYERS = 6, 2, 7, 3, 2
TEXT = jnp.array([[1, 2, 6, 3], [5, 1, 0, 2]])
IMAGES = np.random.default_rng(1).normal(size=(2, 4, 4, 3))


def norm(x, name=None):
    return hk.LayerNorm(-1, True, True, name=name)(x)


def attend(x, name=None, causal=True):
    mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]))) if causal else None
    init = hk.initializers.RandomNormal()
    return hk.MultiHeadAttention(HEADS, 2, w_init=init, model_size=D, name=name)(x, x, x, mask)


class Mlp(hk.Module):
    def __call__(self, x):
        y = jax.nn.gelu(hk.Linear(9)(x))
        return hk.Linear(D)(y)


class NamedTransformer(hk.Module):
    def __call__(self, x, causal):
        for i in range(LAYERS):
            x = x + attend(norm(x, f"h{i}_ln_1"), f"h{i}_attn", causal)
            x = x + Mlp(name=f"h{i}_mlp")(norm(x, f"h{i}_ln_2"))
        return norm(x, "ln_f")


def named_gpt(tokens):
    x = hk.Embed(VOCAB, D)(tokens)
    x = x + hk.get_parameter("pos_embs", [tokens.shape[1], D], init=jnp.zeros)
    return hk.Linear(VOCAB)(NamedTransformer(name="transformer")(x, causal=True))


def named_vit(images):
    x = hk.Conv2D(D, 2, 2, padding="VALID")(images).reshape(len(images), -1, D)
    token = hk.get_parameter("cls", [1, 1, D], init=jnp.zeros)
    x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], 1)
    x = x + hk.get_parameter("pos_embs", [1, x.shape[1], D], init=jnp.zeros)
    return hk.Linear(CLASSES)(NamedTransformer(name="transformer")(x, causal=False)[:, 0])


class Transformer(hk.Module):
    def __call__(self, x):
        for _ in range(LAYERS):
            x = x + attend(norm(x))
            x = x + hk.Sequential([hk.Linear(9), jax.nn.gelu, hk.Linear(D)])(norm(x))
        return norm(x)


class LanguageModel(hk.Module):
    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def __call__(self, tokens):
        x = hk.Embed(VOCAB, D)(tokens)
        x = x + hk.get_parameter("positional_embeddings", [tokens.shape[1], D], init=jnp.zeros)
        return hk.Linear(VOCAB)(self.transformer(x))


def counted_gpt(tokens):
    return LanguageModel(Transformer())(tokens)


@pytest.mark.parametrize(
    ("model", "spec", "inputs"),
    [
        (named_gpt, layouts.HAIKU_GPT, TEXT),
        (named_vit, layouts.HAIKU_VIT, IMAGES),
        (counted_gpt, layouts.haiku_gpt(LAYERS), TEXT),
    ],
    ids=["named gpt", "named vit", "counted gpt"],
)
def test_haiku(model, spec, inputs, randomized, check_layout):
    transformed = hk.without_apply_rng(hk.transform(model))

    def run(params, norms):
        def as_rms_norm(call, args, kwargs, context):
            name = getattr(context.module, "module_name", None)
            if context.method_name != "__call__" or name not in norms:
                return call(*args, **kwargs)
            return pn.rms_norm(args[0], params[name]["scale"], params[name]["offset"], eps=norms[name])

        with jax.numpy_rank_promotion("allow"), hk.intercept_methods(as_rms_norm):
            return transformed.apply(params, inputs)

    with jax.numpy_rank_promotion("allow"):
        shapes = jax.eval_shape(transformed.init, jax.random.key(0), inputs)
    check_layout(spec, randomized(shapes), run)


def test_another_number_of_layers_is_refused():
    transformed = hk.without_apply_rng(hk.transform(counted_gpt))
    with jax.numpy_rank_promotion("allow"):
        params = jax.eval_shape(transformed.init, jax.random.key(0), TEXT)
    with pytest.raises(pn.LayoutError, match=r"transformer/layer_norm_3/offset .*no rule covers it"):
        layouts.haiku_gpt(1).resolve(params)
