"""The step: the same trajectory in every variant in Pre-LN coordinates, accumulation, weights, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prenorm_jax import models
from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training import step as of_step
from prenorm_jax.training.experiment import Optimizer
from prenorm_jax.training.optimizer import make_optimizer
from prenorm_jax.training.pictures import Pixels
from prenorm_jax.training.step import State, init_state, make_eval_step, make_train_step
from prenorm_jax.training.tasks import ImageClassification, LanguageModelling, Task

STEPS = 100
SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "dtype": "float64", "param_dtype": "float64"}
VIT = ViTConfig(**SIZES, image_size=6, patch_size=3, channels=2, classes=5)
GPT = GPTConfig(**SIZES, context=6, vocab_size=11, vocab_multiple=8)
TASKS: dict[str, tuple[ViTConfig | GPTConfig, Task]] = {
    "vit": (VIT, ImageClassification(label_smoothing=0.1)),
    "gpt": (GPT, LanguageModelling(11)),
}
# A clip_norm that bites at the start and not at the end, a decay that matters.
OPTIMIZER = Optimizer(learning_rate=3e-3, warmup_steps=10, weight_decay=0.1, clip_norm=1.0)


def batch_of(model: ViTConfig | GPTConfig, seed: int, size: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if isinstance(model, ViTConfig):
        inputs = rng.normal(size=(size, model.image_size, model.image_size, model.channels)) + 0.5
        targets = rng.integers(model.classes, size=size)
    else:
        window = rng.integers(model.vocab_size, size=(size, model.context + 1))
        inputs, targets = window[:, :-1], window[:, 1:]
    return {"inputs": inputs, "targets": targets.astype(np.int32), "weights": np.ones(size)}


def random_params(model: ViTConfig | GPTConfig):
    """Pre-LN parameters in general position: norms with scale and bias, a main branch with a mean."""
    params = models.init(dataclasses.replace(model, norm="pre_ln"), 0)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [leaf + 0.2 * rng.normal(size=leaf.shape) for leaf in leaves])


def trajectory(model, task, params, coordinates: str = "pre_ln", accumulate: int = 1, steps: int = STEPS):
    tx = make_optimizer(OPTIMIZER, STEPS)
    step = make_train_step(model, task, tx, coordinates=coordinates, accumulate=accumulate)
    state = init_state(jax.tree.map(jnp.array, params), tx)
    rows = []
    for index in range(steps):
        state, metrics = step(state, batch_of(model, index % 5))
        rows.append(jax.device_get(metrics))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}, state.params


def largest_difference(a, b) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def as_floats(metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module", params=list(TASKS))
def pre_ln_run(request: pytest.FixtureRequest):
    model, task = TASKS[request.param]
    params = random_params(model)
    return model, task, params, *trajectory(model, task, params)


@pytest.mark.parametrize(
    "variant",
    [
        {"norm": "pre_rmsnorm"},
        {"norm": "pre_crmsnorm", "basis": "reflect", "layout": "packed"},
        {"norm": "pre_crmsnorm", "basis": "drop", "layout": "compact"},
    ],
    ids=lambda variant: "-".join(variant.values()),
)
def test_the_variants_share_one_trajectory_in_pre_ln_coordinates(pre_ln_run, variant):
    model, task, params, expected, expected_params = pre_ln_run
    values, trained = trajectory(dataclasses.replace(model, **variant), task, params)
    np.testing.assert_allclose(values["loss"], expected["loss"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(values["grad_norm"], expected["grad_norm"], rtol=0, atol=1e-8)
    assert largest_difference(trained, expected_params) <= 1e-8
    # The run is one in which something happens: clipping at first, then not, and a loss that falls.
    assert expected["grad_norm"][0] > OPTIMIZER.clip_norm > expected["grad_norm"].min()
    assert expected["loss"][-5:].mean() < expected["loss"][:5].mean() - 0.2


def test_native_coordinates_start_alike_and_part(pre_ln_run):
    """The negative control: the same function trained in other coordinates takes another way, and the comparison sees it."""
    model, task, params, expected, _ = pre_ln_run
    variant = dataclasses.replace(model, norm="pre_rmsnorm")
    values, _ = trajectory(variant, task, models.native(params, variant), "native", steps=10)
    assert abs(values["loss"][0] - expected["loss"][0]) <= 1e-10
    assert np.abs(values["loss"] - expected["loss"][:10]).max() >= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "coordinates"), [("vit", "native"), ("gpt", "pre_ln")])
def test_accumulation_equals_the_whole_batch(name, coordinates):
    model, task = TASKS[name]
    model = dataclasses.replace(model, norm="pre_crmsnorm", depth=1)
    tx = make_optimizer(OPTIMIZER, STEPS)
    batch = batch_of(model, 0)
    # Unequal weights: a mean of the micro-batches' means would be another number.
    uneven = {**batch, "weights": np.linspace(0, 2, 8)}
    whole, split = (make_train_step(model, task, tx, coordinates=coordinates, accumulate=n) for n in (1, 4))

    def one_step(step, batch):
        return step(init_state(models.init(model, 0, coordinates), tx), batch)

    (expected, values), (state, split_values) = one_step(whole, uneven), one_step(split, uneven)
    assert largest_difference(state.params, expected.params) <= 1e-12
    assert as_floats(split_values) == pytest.approx(as_floats(values), rel=1e-12)
    # The negative control: even weights are another gradient.
    assert largest_difference(one_step(whole, batch)[0].params, expected.params) >= 1e-6


def test_accumulated_sums_are_wider_than_half_precision():
    model = dataclasses.replace(VIT, depth=1, dtype="bfloat16", param_dtype="bfloat16")
    task, tx = TASKS["vit"][1], make_optimizer(OPTIMIZER, STEPS)
    state = init_state(models.init(model, 0), tx)
    state, metrics = make_train_step(model, task, tx, accumulate=4)(state, batch_of(model, 0))
    assert metrics["loss"].dtype in (jnp.float32, jnp.float64)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))


def test_gradient_is_that_of_the_loss(pre_ln_run):
    """One step of plain gradient descent against jax.grad of the loss written out here."""
    model, task, params, *_ = pre_ln_run
    variant = dataclasses.replace(model, norm="pre_crmsnorm")
    batch = batch_of(model, 3)

    def loss(params):
        logits, _ = models.apply(model, params, batch["inputs"])
        return task.judge(logits, batch["targets"])["loss"].mean()

    tx = optax.sgd(1.0)
    state, metrics = make_train_step(variant, task, tx)(init_state(jax.tree.map(jnp.array, params), tx), batch)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    expected = jax.tree.map(lambda x, g: x - g, params, gradient)
    assert largest_difference(state.params, expected) <= 1e-12
    assert float(metrics["loss"]) == pytest.approx(float(value), abs=1e-12)


def test_state_is_donated_and_counts_steps():
    model, tx = dataclasses.replace(VIT, depth=1), make_optimizer(OPTIMIZER, STEPS)
    state = init_state(models.init(model, 0), tx)
    step = make_train_step(model, TASKS["vit"][1], tx)
    later, _ = step(state, batch_of(VIT, 0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    later, _ = step(later, batch_of(VIT, 1))
    assert isinstance(later, State)
    assert int(later.step) == 2


def test_eval_step_ignores_filled_up_rows_and_label_smoothing():
    model, task = dataclasses.replace(VIT, depth=1), TASKS["vit"][1]
    params = models.init(model, 0)
    batch = batch_of(model, 0)
    part = {key: x[:5] for key, x in batch.items()}
    batch["weights"][5:] = 0
    step = make_eval_step(model, task)
    sums, expected = step(params, batch), step(params, part)
    assert float(sums["weight"]) == 5
    assert as_floats(sums) == pytest.approx(as_floats(expected))
    logits, _ = jax.jit(lambda params, inputs: models.apply(model, params, inputs))(params, part["inputs"])
    plain = -jax.nn.log_softmax(logits)[np.arange(5), part["targets"]]
    assert float(sums["loss"]) == pytest.approx(float(plain.sum()), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_stochastic_depth_follows_seed_and_step_in_every_variant_and_however_the_batch_is_split(name):
    model, task = TASKS[name]
    model = dataclasses.replace(model, depth=1)
    params = random_params(model)

    def losses(norm="pre_ln", accumulate=1, seed=3, rate=0.5):
        tx = make_optimizer(OPTIMIZER, STEPS)
        step = make_train_step(
            dataclasses.replace(model, norm=norm), task, tx, accumulate=accumulate, stochastic_depth=rate, seed=seed
        )
        state, found = init_state(jax.tree.map(jnp.array, params), tx), []
        for index in range(3):
            state, metrics = step(state, batch_of(model, index))
            found.append(float(metrics["loss"]))
        return np.array(found)

    expected = losses()
    np.testing.assert_allclose(losses("pre_crmsnorm", accumulate=4), expected, rtol=0, atol=1e-9)
    # The negative control: another seed.
    assert np.abs(losses(seed=4) - expected).min() > 1e-4


def test_a_step_takes_pictures_as_bytes_and_mixes_them():
    model = dataclasses.replace(VIT, depth=1)
    task = ImageClassification(loss="sigmoid", classes=5, pixels=Pixels(1 / 255, (0.5, 0.4), (0.2, 0.3)))
    rng = np.random.default_rng(0)
    batch = {**batch_of(model, 0), "inputs": rng.integers(0, 256, (8, 6, 6, 2), dtype=np.uint8)}
    batch["mix"] = np.repeat([[0.6, 0, 0, 0, 0]], 8, axis=0).astype(np.float32)
    tx = make_optimizer(OPTIMIZER, STEPS)
    _, whole = make_train_step(model, task, tx)(init_state(models.init(model, 0), tx), batch)
    _, split = make_train_step(model, task, tx, accumulate=2)(init_state(models.init(model, 0), tx), batch)
    assert as_floats(split) == pytest.approx(as_floats(whole), rel=1e-9)
    images = (batch["inputs"] / 255 - np.array([0.5, 0.4])) / np.array([0.2, 0.3])
    partner = np.arange(8) ^ 1
    mixed = 0.6 * images + 0.4 * images[partner]
    logits = jax.jit(lambda params: models.apply(model, params, mixed)[0])(models.init(model, 0))
    present = np.zeros((8, 5))
    present[np.arange(8), batch["targets"]] = present[np.arange(8), batch["targets"][partner]] = 1
    expected = optax.sigmoid_binary_cross_entropy(logits, present).mean()
    assert float(whole["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_options_of_the_compiler(monkeypatch):
    """Those of a backend, on several devices more of them; what XLA_FLAGS sets is the user's."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_dot_merger_threshold_mb=32 --xla_force_host_platform_device_count=8")
    of_step.compiler_options.cache_clear()
    try:
        alone, several = of_step.compiler_options(), of_step.compiler_options(2)
        of_step.compiler_options.cache_clear()
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        between_hosts = of_step.compiler_options(2)
    finally:
        of_step.compiler_options.cache_clear()
    assert alone == {"xla_gpu_enable_triton_gemm": False}
    assert several == alone | of_step.MESH_OPTIONS["gpu"]
    assert between_hosts == several | of_step.BETWEEN_HOSTS["gpu"] != several
