"""An array that several products read, and layers that are cut out of a stack: functions with derivatives of their own."""

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax import placement
from prenorm_jax.models import blocks
from prenorm_jax.models.blocks import unstacked
from prenorm_jax.models.layers import shared
from prenorm_jax.training import sharding
from prenorm_jax.training.experiment import Mesh


def products(x, matrices):
    return tuple(share @ matrix for share, matrix in zip(shared(x, len(matrices)), matrices, strict=True))


def test_products_of_one_array_and_their_gradient():
    rng = np.random.default_rng(0)
    x, matrices = rng.normal(size=(5, 4)), tuple(rng.normal(size=(4, n)) for n in (3, 2, 6))
    found, pull_back = jax.vjp(products, x, matrices)
    wanted, plain_pull_back = jax.vjp(lambda x, matrices: tuple(x @ m for m in matrices), x, matrices)
    dys = tuple(rng.normal(size=y.shape) for y in wanted)
    pairs = zip(jax.tree.leaves((found, pull_back(dys))), jax.tree.leaves((wanted, plain_pull_back(dys))), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


def test_each_product_s_gradient_stands_first_in_its_addition():
    x, matrices = jnp.ones((5, 4)), tuple(jnp.ones((4, n)) for n in (3, 2, 6))
    program = jax.make_jaxpr(lambda dys: jax.vjp(products, x, matrices)[1](dys)[0])(products(x, matrices))
    made_by = {id(v): eqn.primitive.name for eqn in program.jaxpr.eqns for v in eqn.outvars}
    added = [
        [made_by[id(v)] for v in eqn.invars] for eqn in program.jaxpr.eqns if eqn.primitive.name in ("add", "add_any")
    ]
    assert [first for first, _ in added] == ["transpose", "transpose"] or [first for first, _ in added] == [
        "dot_general"
    ] * 2
    # As JAX writes it, what was there before stands first.
    assert added[1][1] in ("add", "add_any")


def test_layers_of_a_stack_and_their_gradient():
    stack = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(3.0)}
    layers, pull_back = jax.vjp(lambda stack: unstacked(stack, {}), stack)
    assert [layer["b"].tolist() for layer in layers] == [0.0, 1.0, 2.0]
    (found,) = pull_back([jax.tree.map(lambda leaf, i=i: leaf * i, layer) for i, layer in enumerate(layers)])
    np.testing.assert_array_equal(found["a"], stack["a"] * jnp.arange(3.0)[:, None])
    # The gradients are put together; those of an index would be arrays of all layers, added up.
    used = {eqn.primitive.name for eqn in jax.make_jaxpr(pull_back)(layers).jaxpr.eqns}
    assert used & {"concatenate", "stack"}
    assert not used & {"add", "add_any", "pad", "scatter", "scatter-add", "dynamic_update_slice"}


def test_shares_that_are_turned_row_by_row_are_the_same_numbers(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arrays = [jnp.arange(6.0).reshape(2, 3) * i for i in range(4)]
    program = jax.jit(lambda arrays: blocks._row_by_row([array.T for array in arrays]))
    assert "optimization_barrier" in program.lower(arrays).as_text()
    np.testing.assert_array_equal(program(arrays), jnp.stack(arrays).transpose(0, 2, 1))


def test_on_a_mesh_each_device_puts_its_own_shares_together(monkeypatch):
    seen = []

    def put_together(arrays):
        seen.append(arrays[0].shape)
        return jnp.stack(arrays)

    monkeypatch.setattr(blocks, "_row_by_row", put_together)
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    places = {("up",): placement.COLUMNS, ("down",): placement.ROWS}
    leaf = np.arange(3 * 8 * 16.0).reshape(3, 8, 16)
    tree = {"up": {"kernel": leaf, "bias": leaf[:, 0]}, "down": {"kernel": leaf}}
    weights = jnp.arange(3.0)

    def loss(tree):
        layers = unstacked(tree, places)
        return sum(weights[i] * (leaf**2).sum() for i, layer in enumerate(layers) for leaf in jax.tree.leaves(layer))

    @jax.jit
    def gradient(tree):
        with placement.within(mesh):
            return jax.grad(loss)(tree)

    found = gradient(jax.device_put(tree, jax.sharding.NamedSharding(mesh, placement.WHOLE)))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, 2 * b * weights.reshape(3, *[1] * (b.ndim - 1))), found, tree
    )
    assert sorted(seen) == [(2, 16), (8, 4)]
    assert found["up"]["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, None, ("tensor", "fsdp"))
