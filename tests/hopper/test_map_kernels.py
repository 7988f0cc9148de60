"""The kernels that map a stored matrix, in Pallas's interpreter; on a GPU, accelerator/check_kernels.py runs the real ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import bases, hopper, models, transforms
from prenorm_jax.hopper import weight_map

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")

MAPS = {
    "fold": None,
    "recenter": bases.recenter_axis,
    "reflect": bases.reflect,
    "drop": bases.drop_reader,
}
ROUNDING = {jnp.dtype("bfloat16"): 2**-8, jnp.dtype("float32"): 1e-5}


@pytest.fixture
def interpreter():
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.InterpretGPUParams()


@pytest.fixture
def on_hopper(monkeypatch):
    """As on a GPU of compute capability 9, and matrices of every size are worth a kernel."""
    monkeypatch.setattr(hopper, "available", lambda: True)
    monkeypatch.setattr(weight_map, "ENTRIES", 0)


@pytest.fixture
def interpreted(on_hopper, interpreter, monkeypatch):
    """The same, in the interpreter. Returns the forms that were asked for."""
    asked, form = [], weight_map._form

    def noted(*arguments):
        found = form(*arguments)
        asked.append(found and dataclasses.replace(found, interpret=interpreter))
        return asked[-1]

    monkeypatch.setattr(weight_map, "_form", noted)
    return asked


def assert_near(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.abs(one - other).max() <= ROUNDING[jax.tree.leaves(found)[0].dtype] * np.abs(other).max()


def random(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape) + 0.3, dtype) for shape in shapes]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("layers", "width", "columns"), [(2, 128, 64), (1, 64, 32), (1, 192, 32)])
def test_a_reader_is_mapped_as_by_the_plain_form(name, packed, layers, width, columns, interpreter):
    change = MAPS[name]
    arrays = random(0, (layers, width, columns), (layers, columns), (layers, width), (layers, width))
    form = weight_map.Form(bases.as_sums(change, width), packed, jnp.dtype("bfloat16"), interpreter)

    def plain(kernel, bias, gamma, beta):
        bias = bias[:, None] + (beta[..., None] * kernel).sum(1, keepdims=True)
        kernel = kernel * gamma[..., None]
        kernel = kernel if change is None else change(kernel, -2)
        kernel, bias = (bases.set_last(kernel, bias, -2), jnp.zeros_like(bias)) if packed else (kernel, bias)
        return kernel.astype(jnp.bfloat16), bias[:, 0]

    found, pull_back = jax.vjp(lambda *arrays: weight_map.read(form, *arrays), *arrays)
    wanted, plain_pull_back = jax.vjp(plain, *arrays)
    assert_near(found[:1] if packed else found, wanted[:1] if packed else wanted)
    gradients = random(1, found[0].shape, dtype=jnp.bfloat16)[0], random(2, found[1].shape)[0] * (not packed)
    expected = plain_pull_back(gradients)
    assert_near(pull_back(gradients), expected)
    other = jax.vjp(plain, arrays[0], arrays[1], -arrays[2], arrays[3])[1](gradients)
    with pytest.raises(AssertionError):  # the check can fail
        assert_near(pull_back(gradients), other)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["recenter", "reflect"])
def test_a_writer_is_mapped_as_by_the_plain_form(name, packed, interpreter):
    (kernel,), (gradient,) = random(0, (2, 8, 128)), random(1, (2, 8, 128), dtype=jnp.bfloat16)
    form = weight_map.Form(bases.as_sums(MAPS[name], 128), packed, jnp.dtype("bfloat16"), interpreter)

    def plain(kernel):
        new = MAPS[name](kernel, -1)
        return (bases.clear_last(new, -1) if packed else new).astype(jnp.bfloat16)

    found, pull_back = jax.vjp(lambda kernel: weight_map.written(form, kernel), kernel)
    wanted, plain_pull_back = jax.vjp(plain, kernel)
    assert_near(found, wanted)
    assert_near(pull_back(gradient), plain_pull_back(gradient))
    assert np.abs(np.asarray(found - kernel, np.float32)).max() > 0.1  # something is done


CONFIGS = {
    "vit": models.vit_config("Ti/16", depth=2, width=64, heads=1, mlp_width=128, image_size=32, classes=3),
    "gpt": models.gpt_config("small", depth=2, width=64, heads=1, mlp_width=128, context=8, vocab_size=64),
}
VARIANTS = {
    "pre_rmsnorm": {"norm": "pre_rmsnorm"},
    "packed reflect": {"norm": "pre_crmsnorm", "layout": "packed"},
    "packed drop": {"norm": "pre_crmsnorm", "layout": "packed", "basis": "drop"},
}


def config_of(name, variant, **fields):
    stacked = {"scan_layers": True, "unroll": True, "dtype": "bfloat16"}
    return dataclasses.replace(CONFIGS[name], **VARIANTS[variant] | stacked | fields)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_s_parameters_are_mapped_as_by_the_plain_form(name, variant, stacked, request, random_params):
    config = config_of(name, variant, scan_layers=stacked, unroll=stacked)
    params = random_params(config, dtype=np.float32)

    def mapped(params):
        return models.running(params, config, narrow=True)

    wanted, plain_pull_back = jax.vjp(jax.jit(mapped), params)
    asked = request.getfixturevalue("interpreted")
    found, pull_back = jax.vjp(jax.jit(lambda params: mapped(params)), params)
    assert len([form for form in asked if form]) == 6 * (1 if stacked else 2)  # of q, k, v, out, up, down
    gradient = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype), wanted)
    for one, other in ((found, wanted), (pull_back(gradient)[0], plain_pull_back(gradient)[0])):
        for leaf, expected in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert_near(leaf, expected)


@pytest.mark.parametrize(("width", "fits"), [(768, True), (1024, True), (1280, False), (800, False)])
def test_widths_of_readers(width, fits):
    assert weight_map._reader_fits(jax.ShapeDtypeStruct((2, width, 64), jnp.float32)) == fits
    assert not weight_map._reader_fits(jax.ShapeDtypeStruct((2, width, 48), jnp.float32))


def test_what_the_kernels_are_not_made_for_takes_the_plain_form(interpreted, random_params):
    def forms(config, **arguments):
        interpreted.clear()
        params = random_params(config, dtype=np.float32)
        jax.eval_shape(lambda params: models.running(params, config, **{"narrow": True} | arguments), params)
        return [form for form in interpreted if form]

    assert len(forms(config_of("vit", "packed reflect"))) == 6
    assert not forms(config_of("vit", "packed reflect"), narrow=False)
    assert not forms(config_of("vit", "packed reflect", dtype="float32"))
    assert not forms(config_of("vit", "packed reflect", layout="compact"))
    # A LayerScale is folded into its writers; 96 lanes are no multiple of 64.
    assert len(forms(config_of("vit", "packed reflect", layer_scale=True))) == 4
    assert not forms(config_of("vit", "packed reflect", width=96, heads=1))
    interpreted.clear()
    concrete = random_params(config_of("gpt", "packed reflect"), dtype=np.float32)
    config = config_of("gpt", "packed reflect")
    transforms.compress(concrete, models.main_branch(config), layout="packed")
    assert not any(interpreted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", ["S/16", "B/16", "L/16"])
def test_a_model_s_map_lowers_for_a_gpu(size, variant, monkeypatch):
    monkeypatch.setattr(hopper, "available", lambda: True)
    config = models.vit_config(size, scan_layers=True, unroll=True, dtype="bfloat16", **VARIANTS[variant])
    params = models.abstract(dataclasses.replace(config, norm="pre_ln"))

    def there_and_back(params, gradient):
        found, pull_back = jax.vjp(lambda params: models.running(params, config, narrow=True), params)
        return found, pull_back(gradient)

    gradient = jax.eval_shape(lambda params: models.running(params, config, narrow=True), params)
    lowered = jax.jit(there_and_back).trace(params, gradient).lower(lowering_platforms=("cuda",))
    # Of q, k and v (one shape), of up, out and down a kernel there, of the readers another one back.
    assert lowered.as_text().count("mosaic_gpu_v2") == 6
