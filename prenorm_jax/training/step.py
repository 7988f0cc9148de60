"""The step that trains, and the step that evaluates: pure functions of arrays, the same ones that are timed.

Training in Pre-LN coordinates: with h = models.running, theta the trained parameters, L the loss of running parameters,
    dL(h(theta)) / dtheta = (dh/dtheta)^T dL/dphi at phi = h(theta).
So a step maps theta once, differentiates every micro-batch with respect to phi, and pulls the summed gradient back
once: the cost of h does not depend on the batch, on its length or on how often it is split.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prenorm_jax import models, placement
from prenorm_jax.models.config import GPTConfig, ViTConfig
from prenorm_jax.training import guards, sharding
from prenorm_jax.training.tasks import Task, without_smoothing

Params = Any
Metrics = dict[str, jax.Array]


# Options of XLA, by backend, that pay in this step (docs/performance.md has the figures).
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        # Products go to cuBLASLt from the start, which then takes bias, GELU and residual addition into them.
        "xla_gpu_enable_triton_gemm": False,
        # Products that read the same array stay apart: what comes out of a merged one has to be cut into pieces, which are copies.
        "xla_gpu_dot_merger_threshold_mb": 0,
    },
}


def combined(size: int) -> dict[str, Any]:
    """XLA's options that put up to so many bytes of one kind of exchange between devices together."""
    kinds = ("all_reduce", "all_gather", "reduce_scatter")
    return {f"xla_gpu_{kind}_combine_threshold_bytes": size for kind in kinds}


# Those that pay besides on several devices (docs/scale.md).
MESH_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        # Gradients are summed where they lie; the pass puts them into one buffer first, a copy there and one back.
        "xla_disable_hlo_passes": "all-reduce-contiguous",
        # Exchanges go together, up to a size: between the devices of one host that costs less than going beside products.
        # `placement.exchanged_beside` keeps the layers of larger models apart, where they are stacked.
        **combined(placement.AT_ONCE),
    },
}
# Between hosts it takes longer, and about a layer of ViT-B or GPT Small, 14 MB, is exchanged while the next is computed.
BETWEEN_HOSTS: dict[str, dict[str, Any]] = {"gpu": combined(2**24)}


@functools.cache
def compiler_options(devices: int = 1) -> dict[str, Any]:
    """The `COMPILER_OPTIONS` of this process's backend, and for several devices `MESH_OPTIONS` (and `BETWEEN_HOSTS`), less those that
    XLA_FLAGS sets, and those that its version of XLA doesn't know."""
    backend, known = jax.default_backend(), {}
    wanted = COMPILER_OPTIONS.get(backend, {})
    if devices > 1:
        wanted = wanted | MESH_OPTIONS.get(backend, {})
    if jax.process_count() > 1:
        wanted = wanted | BETWEEN_HOSTS.get(backend, {})
    given = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    for name, value in wanted.items():
        if name in given:
            continue
        try:
            jax.jit(lambda: 0, compiler_options={name: value})()
        except jax.errors.JaxRuntimeError as error:
            logging.getLogger(__name__).warning("XLA option %s left out: %s", name, str(error).splitlines()[0])
        else:
            known[name] = value
    return known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes. params: in the trained coordinates. step: how many were taken, () int32."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array


def init_state(params: Params, tx: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return State(params, tx.init(params), jnp.zeros((), jnp.int32))


def abstract_state(model: ViTConfig | GPTConfig, tx: optax.GradientTransformation, coordinates: str) -> State:
    """Shapes and dtypes of a state; allocates nothing."""
    return jax.eval_shape(lambda: init_state(models.init(model, 0, coordinates), tx))


def judged_params(state: State) -> Params:
    """What a state is judged by: the moving average of its parameters where the optimizer keeps one, else they themselves."""
    average = optax.tree.get(state.opt_state, "average", None)
    return state.params if average is None else average


def make_train_step(
    model: ViTConfig | GPTConfig,
    task: Task,
    tx: optax.GradientTransformation,
    *,
    coordinates: str = "pre_ln",
    accumulate: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    stochastic_depth: float = 0.0,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Callable[[State, dict[str, jax.Array]], tuple[State, Metrics]]:
    """A jitted (state, batch) -> (state, metrics); the state is donated.

    batch: "inputs" (B, ...), "targets" (B, ...), "weights" (B,) with B a multiple of `accumulate`. The loss is the
    weighted mean over the batch whatever `accumulate` and the mesh are. metrics: the task's values as weighted means, "grad_norm"
    before clipping, "main_branch_mean" (see there) where the variant's main branch can have one, and "finite": whether the
    loss and the gradient are. Where they are not, parameters and optimizer stay as they were. Each ().

    Args:
      mesh: what the state and the batch lie on (sharding.state_shardings, sharding.batch_sharding); None: on one device.
      stochastic_depth: the rate at which samples skip branches, the same ones whatever `accumulate`, the mesh and the variant are: they
        follow from `seed` and the step.
      options: of XLA, beside those of `compiler_options`.
    """

    def weighted_values(running: Params, batch: dict[str, jax.Array], total: jax.Array) -> tuple[jax.Array, Metrics]:
        scales = batch.get("branch_scales")
        logits, intermediates = models.apply(model, running, batch["inputs"], branch_scales=scales, only_read=True)
        shares = batch["weights"] / total
        with jax.named_scope("loss"):
            values = {name: (value * shares).sum() for name, value in task.judge(logits, batch["targets"]).items()}
        if model.norm != "pre_crmsnorm":
            values["main_branch_mean"] = (main_branch_mean(intermediates["last"]) * shares).sum()
        return values["loss"], values

    @jax.named_scope("weight_map")
    def to_running(params: Params) -> Params:
        # Sums over micro-batches stay in float32.
        running = models.running(params, model, coordinates, narrow=mesh is None and accumulate == 1)
        if mesh is None:
            return running
        # Split as they are stored: what is mapped, and in the backward pass its gradient, stays a share.
        return jax.lax.with_sharding_constraint(running, sharding.param_shardings(running, model, mesh))

    def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        running, pull_back = jax.vjp(to_running, state.params)
        batch = task.prepare(batch)
        if stochastic_depth:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            scales = models.draw_branch_scales(key, len(batch["weights"]), model.depth, stochastic_depth)
            batch = {**batch, "branch_scales": scales}
        total = batch["weights"].sum()
        gradient = jax.grad(weighted_values, has_aux=True)
        if accumulate == 1:
            running_grads, metrics = gradient(running, batch, total)
        else:
            running_grads, metrics = _sum_over_micro_batches(
                lambda micro: gradient(running, micro, total), _split(batch, accumulate)
            )
        (grads,) = pull_back(running_grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
            params, opt_state = guards.keep_where(finite, (params, opt_state), (state.params, state.opt_state))
        return State(params, opt_state, state.step + 1), {**metrics, "grad_norm": norm, "finite": finite}

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options() | dict(options or {}))

    def train_step_on_mesh(state: State, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        with placement.within(mesh):
            return train_step(state, batch)

    places = sharding.state_shardings(abstract_state(model, tx, coordinates), model, tx, mesh)
    return jax.jit(
        train_step_on_mesh,
        donate_argnums=0,
        in_shardings=(places, sharding.batch_sharding(mesh)),
        out_shardings=(places, sharding.everywhere(mesh)),
        compiler_options=compiler_options(mesh.size) | dict(options or {}),
    )


def main_branch_mean(x: jax.Array) -> jax.Array:
    """(B, L, R) main branch -> (B,) float32: |mean| / root mean square over the lanes of a token, mean over the tokens (in training, those
    that the head reads).

    Zero where the main branch is centered; what a LayerNorm has to remove, and what low precision loses digits to.

    >>> main_branch_mean(jnp.array([[[1.0, -1.0], [2.0, 2.0]]])).tolist()
    [0.5]
    """
    wide = x.astype(jnp.float32)
    square = jnp.square(wide).mean(-1)
    return (jnp.abs(wide.mean(-1)) * jax.lax.rsqrt(square + jnp.finfo(jnp.float32).tiny)).mean(-1)


def make_eval_step(
    model: ViTConfig | GPTConfig, task: Task, mesh: jax.sharding.Mesh | None = None
) -> Callable[[Params, dict[str, jax.Array]], Metrics]:
    """A jitted (running parameters, batch) -> sums over the batch, each ().

    The sums are of the task's values without label smoothing, times the weights, and of the weights ("weight"). Running
    parameters are what `models.running` returns: mapped once for a whole evaluation.
    """
    task = without_smoothing(task)

    def eval_step(running: Params, batch: dict[str, jax.Array]) -> Metrics:
        batch = task.prepare(batch)
        with placement.within(mesh):
            logits, _ = models.apply(model, running, batch["inputs"], only_read=True)
        weights = batch["weights"]
        values = task.judge(logits, batch["targets"])
        return {**{name: (value * weights).sum() for name, value in values.items()}, "weight": weights.sum()}

    placed: Any = {"out_shardings": sharding.everywhere(mesh)} if mesh else {}
    return jax.jit(eval_step, compiler_options=compiler_options(mesh.size if mesh else 1), **placed)


def _split(batch: dict[str, jax.Array], accumulate: int) -> dict[str, jax.Array]:
    # Every accumulate-th example: so a device finds its examples of each micro-batch among those that it has.
    return {
        key: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1) for key, x in batch.items()
    }


def _sum_over_micro_batches(gradient: Callable[[Any], Any], micro_batches: dict[str, jax.Array]) -> Any:
    """The sum of `gradient(micro)` over the leading axis, added in at least float32 and returned in its own dtypes."""
    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(gradient, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)

    def add(sums: Any, micro: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, gradient(micro)), None

    sums, _ = jax.lax.scan(add, zeros, micro_batches)
    return jax.tree.map(lambda total, x: total.astype(x.dtype), sums, shapes)
