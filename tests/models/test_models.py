"""The variants are one function: logits, gradients, coordinates and the way back, in float64; the main branch's mean layer by layer;
exact sizes; stacked and looped layers, remat, dtypes, causality, attention, memory; and one clear line for a wrong input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import prenorm_jax as pn
from prenorm_jax import models, norms
from prenorm_jax.models import GPT_SIZES, VIT_SIZES, GPTConfig, ViTConfig, blocks, gpt_config, vit_config
from prenorm_jax.models.attention import attend
from prenorm_jax.paths import leaves

VARIANTS = {
    "pre_rmsnorm": {"norm": "pre_rmsnorm"},
    "reflect packed": {"norm": "pre_crmsnorm"},
    "reflect compact": {"norm": "pre_crmsnorm", "layout": "compact"},
    "drop packed": {"norm": "pre_crmsnorm", "basis": "drop"},
    "drop compact": {"norm": "pre_crmsnorm", "basis": "drop", "layout": "compact"},
}
FLOAT64 = {"width": 8, "depth": 2, "heads": 2, "mlp_width": 12, "dtype": "float64", "param_dtype": "float64"}
VIT = ViTConfig(**FLOAT64, image_size=4, patch_size=2, channels=2, classes=3)
GPT = GPTConfig(**FLOAT64, context=6, vocab_size=11, vocab_multiple=4)
CONFIGS = {
    "vit": VIT,
    "vit mean sincos": dataclasses.replace(VIT, pool="mean", positions="sincos", gelu="erf", scan_layers=True),
    "gpt tied": dataclasses.replace(GPT, remat=True),
    "gpt untied": dataclasses.replace(GPT, tied=False, scan_layers=True, remat=True),
}
EXACT = 1e-10  # the claim of equality in float64, relative to the logits' scale

every_config = pytest.mark.parametrize("name", CONFIGS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def inputs(config, batch=3):
    rng = np.random.default_rng(1)
    if isinstance(config, ViTConfig):
        return rng.normal(size=(batch, config.image_size, config.image_size, config.channels))
    return rng.integers(config.vocab_size, size=(batch, config.context))


def outcome(config, params, coordinates="pre_ln"):
    """Logits, the main branch, and the gradient with respect to the stored parameters."""
    x = inputs(config)

    def loss(params):
        logits, intermediates = models.apply(config, models.running(params, config, coordinates), x)
        return jnp.sum(jnp.sin(logits)), (logits, intermediates["main_branch"])

    (_, (logits, branch)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, branch, gradient


@functools.cache
def _oracle(name, random_params):
    config = CONFIGS[name]
    params = random_params(config)
    return params, outcome(config, params)


def assert_near(actual, expected, tolerance=EXACT):
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))


@pytest.mark.slow  # on one Python
@every_config
@every_variant
def test_logits_and_gradients_are_the_pre_ln_model_s(name, variant, random_params, assert_same):
    params, (logits, _, gradient) = _oracle(name, random_params)
    config = dataclasses.replace(CONFIGS[name], **VARIANTS[variant])
    ours, branch, our_gradient = outcome(config, params)
    assert_near(ours, logits)
    scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(our_gradient), jax.tree.leaves(gradient), strict=True):
        assert np.max(np.abs(a - b)) <= EXACT * scale
    assert jax.tree.structure(our_gradient) == jax.tree.structure(gradient)
    if variant == "pre_rmsnorm":
        assert np.max(np.abs(branch.mean(-1))) <= 1e-13 * np.max(np.abs(branch))
    assert branch.shape[0] == config.depth + 1


@every_config
def test_the_main_branch_of_pre_ln_has_a_mean_and_pre_rmsnorm_s_is_that_branch_less_its_mean(name, random_params):
    params, (_, branch, _) = _oracle(name, random_params)
    means = np.abs(branch.mean(-1)).reshape(len(branch), -1).max(axis=1)
    assert np.all(means > 1e-2)  # at every layer
    config = dataclasses.replace(CONFIGS[name], norm="pre_rmsnorm")
    assert_near(outcome(config, params)[1], branch - branch.mean(-1, keepdims=True))


@every_config
def test_untransformed_weights_in_the_rmsnorm_model_are_another_function(name, random_params):
    params, (logits, _, _) = _oracle(name, random_params)
    config = CONFIGS[name]
    untransformed = pn.strip_affine(pn.fold_affine(params, models.main_branch(config)), models.main_branch(config))
    other = jax.jit(functools.partial(models.apply, dataclasses.replace(config, norm="pre_rmsnorm")))(
        untransformed, inputs(config)
    )[0]
    assert np.max(np.abs(other - logits)) >= 1e-3 * np.max(np.abs(logits))


@pytest.mark.parametrize("name", ["vit", "gpt tied", "gpt untied"])
@every_variant
def test_native_coordinates_and_the_way_back(name, variant, random_params, assert_same):
    params, (logits, _, _) = _oracle(name, random_params)
    config = dataclasses.replace(CONFIGS[name], **VARIANTS[variant])
    native = models.native(params, config)
    x = inputs(config)
    apply = jax.jit(functools.partial(models.apply, config))
    assert_near(apply(models.running(native, config, "native"), x)[0], logits)
    back = models.pre_ln(native, config)
    assert_same(
        jax.tree.map(jnp.zeros_like, back), jax.tree.map(jnp.zeros_like, params)
    )  # the Pre-LN model's own leaves
    assert_near(jax.jit(functools.partial(models.apply, CONFIGS[name]))(back, x)[0], logits)
    expected = jax.eval_shape(functools.partial(models.init, config, 0, "native"))
    assert jax.tree.map(lambda leaf: leaf.shape, native) == jax.tree.map(lambda leaf: leaf.shape, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reflected_model_runs_as_a_plain_rms_norm_model(name, random_params, monkeypatch):
    params, (logits, _, _) = _oracle(name, random_params)
    config, spec = CONFIGS[name], models.main_branch(CONFIGS[name])
    plain = pn.to_plain_rmsnorm(pn.compress(params, spec), spec)
    # A compact model whose norm is the plain RMSNorm of width d - 1 and nothing else
    compact = dataclasses.replace(config, norm="pre_crmsnorm", layout="compact")
    eps = pn.plain_eps(config.eps, config.width)
    variant = dataclasses.replace(models.variant(compact), kind=norms.rms)
    for module in ("gpt", "vit"):
        monkeypatch.setattr(f"prenorm_jax.models.{module}.variant", lambda config: variant)
    models._split.cache_clear()
    with_eps = functools.partial(models.apply, dataclasses.replace(compact, eps=eps))
    try:
        actual = jax.jit(with_eps)(pn.strip_affine(plain, spec), inputs(config))[0]
    finally:
        models._split.cache_clear()
    assert_near(actual, logits)


def linears(width, mlp):
    return 4 * (width * width + width) + 2 * width * mlp + mlp + width


def vit_count(width, depth, heads, mlp_width, patch):
    tokens = (224 // patch) ** 2 + 1
    embedding = 3 * patch * patch * width + width + width + tokens * width
    return embedding + depth * (linears(width, mlp_width) + 4 * width) + 2 * width + 1000 * width + 1000


VIT_COUNTS = {
    "Ti/16": 5717416,
    "S/16": 22050664,
    "B/16": 86567656,
    "L/16": 304326632,
    "H/14": 632045800,
    "G/14": 1844440680,
}


@pytest.mark.parametrize("name", VIT_COUNTS)
def test_exact_parameter_counts_of_vit(name):
    size, patch = name.split("/")
    assert models.count(vit_config(name, scan_layers=True)) == VIT_COUNTS[name]
    assert vit_count(**VIT_SIZES[size], patch=int(patch)) == VIT_COUNTS[name]


def gpt_count(width, depth, heads, mlp_width, tied):
    tables = (50257 + 1024) * width + (0 if tied else 50257 * width + 50257)
    return tables + depth * (linears(width, mlp_width) + 4 * width) + 2 * width


GPT_COUNTS = {
    "small": (124439808, 163087441),
    "medium": (354823168, 406336593),
    "large": (758727168, 835972177),
    "xl": (1313626112, 1416602705),
    "2.7b": (2648931840, 2777640017),
    "6.7b": (6654210048, 6860112977),
    "13b": (12848143360, 13105509457),
}


@pytest.mark.parametrize("name", GPT_COUNTS)
def test_exact_parameter_counts_of_gpt(name):
    for tied, expected in zip((True, False), GPT_COUNTS[name], strict=True):
        assert models.count(gpt_config(name, vocab_multiple=1, tied=tied, scan_layers=True)) == expected
        assert gpt_count(**GPT_SIZES[name], tied=tied) == expected


def test_no_size_lacks_a_count():
    assert {name.split("/")[0] for name in VIT_COUNTS} == set(VIT_SIZES)
    assert set(GPT_COUNTS) == set(GPT_SIZES)


@pytest.mark.parametrize(
    ("norm", "layout", "lanes", "rows"),
    [
        ("pre_ln", "packed", 8, 8),
        ("pre_rmsnorm", "packed", 8, 8),
        ("pre_crmsnorm", "compact", 7, 7),
        ("pre_crmsnorm", "packed", 8, 8),
    ],
)
def test_counts_of_the_variants(norm, layout, lanes, rows):
    # d-1 lanes are fewer; a packed reader has its bias in its kernel; only Pre-LN has norms with leaves
    config = dataclasses.replace(VIT, norm=norm, layout=layout)
    readers = config.depth * (3 * (rows * 8 + 8) + rows * 12 + 12) + rows * 3 + 3
    readers -= (config.depth * (3 * 8 + 12) + 3) if (norm, layout) == ("pre_crmsnorm", "packed") else 0
    writers = lanes * (8 + 1 + 1 + 5) + config.depth * (9 * lanes + 13 * lanes)
    norms = 2 * 8 * (2 * config.depth + 1) if norm == "pre_ln" else 0
    assert models.count(config) == readers + writers + norms


@pytest.mark.parametrize("name", ["vit", "gpt tied"])
def test_stacked_and_looped_layers_and_remat_are_one_function(name, random_params, assert_same, without_key_biases):
    looped = dataclasses.replace(CONFIGS[name], scan_layers=False, remat=False)
    params = random_params(looped)
    logits, branch, gradient = outcome(looped, params)
    for scan, unroll, remat in ((True, False, False), (True, True, False), (False, False, True)):
        config = dataclasses.replace(looped, scan_layers=scan, unroll=unroll, remat=remat)
        stored = models.stack_layers(params) if scan else params
        ours, our_branch, our_gradient = outcome(config, stored)
        assert_near(ours, logits, 1e-13)
        assert_near(our_branch, branch, 1e-13)
        ours = models.unstack_layers(our_gradient) if scan else our_gradient
        assert_same(without_key_biases(ours), without_key_biases(gradient), 1e-11)
    assert_same(models.unstack_layers(models.stack_layers(params)), params)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_keeps_less_for_the_backward_pass(scan):
    def kept(remat):
        config = dataclasses.replace(VIT, depth=4, scan_layers=scan, remat=remat)
        params = models.abstract(config)
        pull_back = jax.eval_shape(
            lambda p: jax.vjp(lambda p: models.apply(config, p, inputs(config, 16))[0], p)[1], params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize("scan", [False, True])
def test_a_main_branch_that_nobody_uses_costs_nothing(scan):
    config = dataclasses.replace(VIT, depth=12, scan_layers=scan)
    params, x = models.abstract(config), inputs(config, 64)

    def memory(select):
        compiled = jax.jit(lambda p: select(models.apply(config, p, x))).lower(params).compile().memory_analysis()
        return compiled.temp_size_in_bytes + compiled.output_size_in_bytes

    branch = 13 * 64 * config.tokens * 8 * 8
    assert memory(lambda out: out) - memory(lambda out: out[0]) >= 0.9 * branch


def test_bfloat16_computation_keeps_float32_parameters():
    config = dataclasses.replace(VIT, dtype="bfloat16", param_dtype="float32", norm="pre_crmsnorm")
    pre_ln = models.abstract(dataclasses.replace(config, norm="pre_ln"))
    params = jax.eval_shape(functools.partial(models.running, config=config), pre_ln)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, intermediates = jax.eval_shape(functools.partial(models.apply, config), params, inputs(config))
    assert (logits.dtype, intermediates["main_branch"].dtype) == (jnp.float32, jnp.bfloat16)
    gradient = jax.eval_shape(jax.grad(lambda p: jnp.sum(models.apply(config, p, inputs(config))[0])), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_initial_parameters_of_the_variants_are_one_function(assert_same):
    config = dataclasses.replace(VIT, depth=1, **VARIANTS["reflect compact"])
    params = models.init(config, 3)
    assert_same(models.init(config, 3, "native"), models.native(params, config), 1e-13)
    assert jax.eval_shape(lambda: params) == models.abstract(dataclasses.replace(config, norm="pre_ln"))


@pytest.mark.parametrize("stacked", [False, True], ids=["looped", "stacked"])
def test_blocks_are_traced_by_kind_not_one_by_one(stacked, random_params, monkeypatch):
    config = dataclasses.replace(GPT, depth=6, scan_layers=stacked, unroll=True)
    traced, call = [], blocks.Block.__call__
    monkeypatch.setattr(blocks.Block, "__call__", lambda *args, **kwargs: traced.append(1) or call(*args, **kwargs))
    jax.jit(lambda params: models.apply(config, params, inputs(config))[0])(random_params(config))
    assert len(traced) == 2  # the first one has nothing to add to the main branch


def test_outside_of_a_traced_program_nothing_is_compiled_again(random_params, caplog):
    params = random_params(GPT)
    models.apply(GPT, params, inputs(GPT))
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        models.apply(GPT, params, inputs(GPT))
    assert [record.getMessage() for record in caplog.records if "ompiling" in record.getMessage()] == []


@pytest.mark.parametrize("variant", ["pre_rmsnorm", "reflect packed"])
def test_a_later_token_leaves_earlier_logits(variant, random_params):
    config = dataclasses.replace(GPT, **VARIANTS[variant])
    apply = jax.jit(lambda tokens: models.apply(config, models.running(random_params(GPT), config), tokens)[0])
    tokens = inputs(GPT)
    other = tokens.copy()
    other[:, 4] = (other[:, 4] + 1) % GPT.vocab_size
    difference = np.abs(apply(tokens) - apply(other)).max(axis=(0, 2))
    assert np.all(difference[:4] == 0)
    assert np.all(difference[4:] > 1e-3)


def test_attention_is_softmax_by_the_formula():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 3, 4))
    scores = np.einsum("blhk,bthk->bhlt", q, k) / 2
    for causal in (False, True):
        masked = np.where(np.tril(np.ones((5, 5), bool)) | (not causal), scores, -np.inf)
        weights = np.exp(masked - masked.max(-1, keepdims=True))
        expected = np.einsum("bhlt,bthk->blhk", weights / weights.sum(-1, keepdims=True), v)
        for implementation in ("auto", "xla"):
            assert_near(attend(q, k, v, causal=causal, implementation=implementation), expected, 1e-14)


def test_an_unknown_attention_and_one_that_this_device_lacks_are_refused():
    q = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="nosuch"):
        attend(q, q, q, implementation="nosuch")
    # Where JAX has its CUDA plugin and runs on the CPU all the same, it is the primitive that is missing.
    with pytest.raises(RuntimeError, match=r"cuDNN|dot_product_attention"):
        attend(q, q, q, implementation="cudnn")


def test_no_norm_is_another_function_that_runs(random_params):
    config = dataclasses.replace(VIT, norm="no_norm")
    params = random_params(config)
    logits = jax.jit(functools.partial(models.apply, config))(models.running(params, config), inputs(config))[0]
    assert np.all(np.isfinite(logits))
    assert models.count(config) == models.count(dataclasses.replace(VIT, norm="pre_rmsnorm"))


@pytest.mark.parametrize(
    ("config", "x", "message"),
    [
        (VIT, np.ones((1, 4, 4, 3)), r"images: got shape \(1, 4, 4, 3\); expected \(batch, 4, 4, 2\)"),
        (GPT, np.ones((1, 7), int), "tokens: got 7 of them; expected at most the context, 6"),
    ],
)
def test_wrong_inputs_are_one_line(config, x, message, random_params):
    with pytest.raises(ValueError, match=message):
        models.apply(config, random_params(config), x)


def test_a_position_beyond_the_context_is_refused(random_params):
    cache = models.empty_cache(GPT, 1)
    with pytest.raises(ValueError, match="tokens: got 7 of them; expected at most the context, 6"):
        models.apply(GPT, random_params(GPT), np.ones((1, 2), int), cache=cache, position=5)


def test_parameters_of_another_chart_are_refused_by_name(random_params):
    params = random_params(VIT)
    compact = dataclasses.replace(VIT, norm="pre_crmsnorm", layout="compact")
    with pytest.raises(
        pn.LayoutError, match=r"blocks/0/.*: the pre_crmsnorm model expects \(7, 8\), the parameters have \(8, 8\)"
    ):
        models.apply(compact, models.native(params, dataclasses.replace(VIT, norm="pre_rmsnorm")), inputs(VIT))
    with pytest.raises(pn.LayoutError, match="extra: the pre_ln model expects no such leaf"):
        models.apply(VIT, {**params, "extra": np.ones(2)}, inputs(VIT))
    with pytest.raises(ValueError, match="coordinates: got 'compact'; allowed: pre_ln, native"):
        models.running(params, VIT, "compact")


def test_the_module_itself_is_the_function(random_params):
    params, (logits, _, _) = _oracle("vit", random_params)
    module = models.ViT(VIT, rngs=nnx.Rngs(0))
    state = nnx.state(module)
    nnx.update(module, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params)))
    assert_near(nnx.jit(lambda m, x: m(x)[0])(module, inputs(VIT)), logits, 1e-13)


@pytest.mark.parametrize("traced", [True, False])
@every_variant
def test_matrices_that_are_mapped_come_out_as_products_take_them(variant, traced, random_params):
    config = dataclasses.replace(VIT, **VARIANTS[variant], dtype="bfloat16")
    params = random_params(config, dtype=np.float32)

    def running(narrow):
        this = functools.partial(models.running, config=config, narrow=narrow)
        return leaves((jax.jit(this) if traced else this)(params))

    wide, narrow = running(False), running(True)
    for path, leaf in narrow.items():
        mapped = path.startswith("blocks/") and path.endswith("/kernel")
        assert leaf.dtype == (jnp.bfloat16 if mapped else jnp.float32), path
        # Rounded once, from what the map computes in: wide is that to float32.
        near = np.abs(np.asarray(leaf, np.float64) - np.asarray(wide[path], np.float64))
        assert (near <= (2**-8 if mapped else 0) * np.abs(np.asarray(wide[path], np.float64))).all()
