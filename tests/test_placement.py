"""Kernels on a mesh: each device is given its own rows, and what is summed over rows is summed over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import norms, placement
from prenorm_jax.hopper import gelu_gradient, norm_gradient
from prenorm_jax.models import gelu
from prenorm_jax.training import cross_entropy as loss
from prenorm_jax.training import sharding
from prenorm_jax.training.experiment import Mesh

ROWS, WIDTH, CLASSES = 16, 12, 10
KIND = norms.layer(WIDTH, 1e-6)


def split(function, mesh):
    """The function of arrays with ROWS rows (and of others, which are whole), on a mesh."""

    def on_mesh(*arrays):
        with placement.within(mesh):
            return function(*arrays)

    def place(array):
        return sharding.batch_sharding(mesh) if array.shape[0] == ROWS else sharding.everywhere(mesh)

    return lambda *arrays: jax.jit(on_mesh, in_shardings=tuple(map(place, arrays)))(*arrays)


@pytest.fixture(params=[Mesh(), Mesh(fsdp=2, tensor=2)], ids=["8", "2x2x2"])
def mesh(request):
    return sharding.make_mesh(request.param)


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def test_a_norms_gradient_by_its_kernel(mesh, monkeypatch):
    """The kernel's plain form stands for it; with the sums of one device's rows alone, the comparison fails."""
    seen = []

    def by_xla(*, x, dn, dbranch, scale, column_sums, **kind):
        seen.append(x.shape)
        return norms._gradients_by_xla(norms.Kind(**kind), x, dn, dbranch, scale, column_sums)

    def gradients(x, y, written, scale, bias, dx, dn):
        return jax.vjp(functools.partial(norms.add_and_norm, kind=KIND), x, y, written, scale, bias)[1]((dx, dn))

    arrays = drawn((ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,), (ROWS, WIDTH), (ROWS, WIDTH))
    expected = jax.jit(gradients)(*arrays)
    monkeypatch.setattr(norm_gradient, "served", lambda x: True)
    monkeypatch.setattr(norm_gradient, "norm_gradient", by_xla)
    for found, wanted in zip(split(gradients, mesh)(*arrays), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    with placement.within(mesh):
        assert set(seen) == {(placement.own(ROWS), WIDTH)}

    monkeypatch.setattr(jax.lax, "psum", lambda x, axes: x)
    wrong = split(lambda *given: gradients(*given), mesh)(*arrays)
    assert np.abs(np.asarray(wrong[3]) - expected[3]).max() > 1e-3


def test_the_product_in_front_of_a_gelus_gradient_by_its_kernel(mesh, monkeypatch):
    """A plain form stands for the kernel; with a matrix that each device sees whole, it would be given another share."""
    seen = []

    def kernel(dy, matrix, z):
        seen.append((dy.shape, matrix.shape, z.shape))
        return jax.vjp(gelu.gelu, z)[1](dy @ matrix.T)[0]

    def gradients(z, matrix, dy):
        y, pull_back = jax.vjp(gelu.product, z, matrix)
        return y, *pull_back(dy)

    arrays = drawn((ROWS, 8), (8, WIDTH), (ROWS, WIDTH))
    expected = jax.jit(gradients)(*arrays)
    assert not seen
    monkeypatch.setattr(gelu_gradient, "served", lambda z, matrix: True)
    monkeypatch.setattr(gelu_gradient, "gelu_gradient", kernel)
    for found, wanted in zip(split(gradients, mesh)(*arrays), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    with placement.within(mesh):
        rows, columns = placement.own(ROWS), placement.own(8, (placement.TENSOR,))
    assert set(seen) == {((rows, WIDTH), (columns, WIDTH), (rows, columns))}


def test_the_cross_entropy_by_its_kernels(mesh, monkeypatch):
    def log_sum_exp(logits, *, classes):
        return jax.nn.logsumexp(logits[:, :classes].astype(jnp.float32), axis=-1)

    def gradient(logits, log_sums, targets, dloss, *, classes):
        assert logits.shape[0] < ROWS
        columns = jnp.arange(logits.shape[1])[None]
        slope = jnp.exp(logits - log_sums[:, None]) - (columns == targets[:, None])
        return jnp.where(columns < classes, slope, 0) * dloss[:, None]

    def both(logits, targets, dloss):
        out, pull_back = jax.vjp(lambda logits: loss.cross_entropy(logits, targets, CLASSES), logits)
        return out, pull_back(dloss)[0]

    logits, dloss = (array.astype(jnp.float32) for array in drawn((ROWS, WIDTH), (ROWS,)))
    targets = jnp.arange(ROWS) % CLASSES
    expected = jax.jit(both)(logits, targets, dloss)
    monkeypatch.setattr(loss, "_by_kernel", lambda *_: True)
    monkeypatch.setattr(loss.hopper, "log_sum_exp", log_sum_exp)
    monkeypatch.setattr(loss.hopper, "gradient", gradient)
    for found, wanted in zip(split(both, mesh)(logits, targets, dloss), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_exchanges_go_in_turn(mesh):
    """A split weight's gathering waits for the main branch, and in the backward pass the main branch for the weight's gradient."""

    def loss(weight, x):
        (ahead,), x = placement.in_turn([{"kernel": weight, "bias": weight[0]}], x)
        return ((x @ ahead["kernel"] + ahead["bias"][None]) ** 2).sum()

    def on_mesh(weight, x):
        with placement.within(mesh):
            return jax.value_and_grad(loss, (0, 1))(weight, x)

    weight, x = drawn((WIDTH, WIDTH), (ROWS, WIDTH))
    program = jax.make_jaxpr(on_mesh)(weight, x).jaxpr
    barriers = [eqn for eqn in program.eqns if eqn.primitive.name == "optimization_barrier"]
    assert len(barriers) == 2
    # What isn't used XLA takes out of a barrier, which then holds nothing back.
    used = {id(var) for eqn in program.eqns for var in eqn.invars} | {id(var) for var in program.outvars}
    assert all(id(var) in used for eqn in barriers for var in eqn.outvars)
    # Vectors are not waited for.
    assert [len(eqn.invars) for eqn in barriers] == [2] * len(barriers)
    found, expected = split(lambda x: on_mesh(weight, x), mesh)(x), jax.value_and_grad(loss, (0, 1))(weight, x)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-12), found, expected)


def test_which_layers_are_exchanged_beside_which(mesh, monkeypatch):
    layers, size = 5, 100

    def beside(index):
        with placement.within(mesh):
            return list(range(layers))[placement.exchanged_beside(index, layers, size)]

    split = mesh.shape["fsdp"] > 1
    assert [beside(index) for index in range(layers)] == [[], [] if split else [2, 3, 4], [], [], []]
    # Of many bytes, or between processes, the next layer's; along data alone XLA decides.
    alone = [[1], [2], [3], [4], []] if split else [[]] * layers
    monkeypatch.setattr(placement, "AT_ONCE", layers * size - 1)
    assert [beside(index) for index in range(layers)] == alone
    monkeypatch.setattr(placement, "AT_ONCE", layers * size)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [beside(index) for index in range(layers)] == alone
    # On one device there is nothing to exchange.
    monkeypatch.undo()
    assert placement.exchanged_beside(1, layers, size) == slice(2, 2)
