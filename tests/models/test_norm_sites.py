"""What `swap_norms` and `intercept_norms` refuse of a model that doesn't run as it is described."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prenorm_jax import LayoutError, MainBranch, Norm, Reader, Writer, to_pre_rmsnorm
from prenorm_jax.models import intercept_norms, swap_norms


class Linen(nn.Module):
    def setup(self):
        self.embed, self.norm, self.head = nn.Dense(8), nn.LayerNorm(), nn.Dense(3)

    def logits(self, x):
        return self.head(self.norm(self.embed(x)))

    def embedded(self, x):
        return self.embed(x)

    def __call__(self, x):
        return self.logits(x)


SPEC = MainBranch(
    [Writer("embed/kernel"), Writer("embed/bias")],
    [Norm([Reader("head/kernel", bias="head/bias")], scale="norm/scale", bias="norm/bias")],
)
X = np.random.default_rng(0).normal(size=(4, 5))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    found = Linen().init(jax.random.key(0), X)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.3 * rng.normal(size=leaf.shape), jnp.float64), found)


ENTRIES = {
    "call": lambda params: Linen().apply({"params": params}, X),
    "method": lambda params: Linen().apply({"params": params}, X, method="logits"),
    "bind": lambda params: Linen().bind({"params": params}).logits(X),
}


@pytest.mark.parametrize("enter", ENTRIES.values(), ids=ENTRIES)
def test_linen_by_any_entry(params, enter, assert_same):
    """Recentered parameters give the function, others are refused."""
    expected = enter(params)
    with nn.intercept_methods(intercept_norms(SPEC)):
        assert_same(enter(to_pre_rmsnorm(params, SPEC)), expected, 1e-5)
        with pytest.raises(LayoutError, match="embed/kernel: its mean along the main branch"):
            enter(params)


def test_linen_s_method_without_a_norm_is_refused(params):
    with (
        nn.intercept_methods(intercept_norms(SPEC)),
        pytest.raises(LayoutError, match="embedded: none of the description's norms ran in it"),
    ):
        Linen().apply({"params": to_pre_rmsnorm(params, SPEC)}, X, method="embedded")


def test_numpy_parameters_are_looked_at_again(params):
    there = jax.tree.map(np.array, to_pre_rmsnorm(params, SPEC))
    with nn.intercept_methods(intercept_norms(SPEC)):
        ENTRIES["call"](there)
        there["embed"]["kernel"] += 1
        with pytest.raises(LayoutError, match="embed/kernel: its mean along the main branch"):
            ENTRIES["call"](there)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.down = nnx.Embed(7, 8, rngs=rngs), nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.norm(self.embed(tokens) + self.down(jax.nn.one_hot(tokens, 4))))


class TiedLinen(nn.Module):
    direct: bool = False

    def setup(self):
        self.embed, self.down, self.norm = nn.Embed(7, 8), nn.Dense(8), nn.LayerNorm()

    def __call__(self, tokens):
        x = self.embed.embedding[tokens] if self.direct else self.embed(tokens)
        return self.embed.attend(self.norm(x + self.down(jax.nn.one_hot(tokens, 4))))


def tied(recentered):
    return MainBranch(
        [Writer("down/kernel"), Writer("down/bias")],
        [Norm(scale="norm/scale", bias="norm/bias", keep="tied")],
        others=["embed/embedding"],
        recentered=[recentered],
        width=8,
    )


UNSEEN = "recentered {}: the model {} no module of this path that is called"


def test_a_recentered_module_that_is_not_there():
    model = Nnx(nnx.Rngs(0))
    swap_norms(model, tied("embed"))
    with pytest.raises(LayoutError, match=UNSEEN.format("embedd", "has")):
        swap_norms(model, tied("embedd"))


@pytest.mark.parametrize(("direct", "recentered"), [(False, "embedd"), (True, "embed")])
def test_a_recentered_module_that_is_not_called(direct, recentered):
    tokens = jnp.arange(7)
    params = TiedLinen().init(jax.random.key(0), tokens)["params"]
    there = to_pre_rmsnorm(params, tied("embed"))
    with nn.intercept_methods(intercept_norms(tied("embed"))):
        TiedLinen().apply({"params": there}, tokens)
    with (
        nn.intercept_methods(intercept_norms(tied(recentered))),
        pytest.raises(LayoutError, match=UNSEEN.format(recentered, "ran")),
    ):
        TiedLinen(direct).apply({"params": there}, tokens)
