"""Are they the same function? Every variant against the Pre-LN model in float64, the oracle.

In float64 the claim is a bound: the largest difference of a logit (of a gradient entry) is at most 1e-10 of the largest logit (gradient
entry). In float32 and bfloat16 it is a ratio: a variant may miss the oracle by so many times what the Pre-LN model itself misses it by.
The negative control is the variant run on weights whose main branch was not recentered: it has to fail.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax import models, transforms
from prenorm_jax.models import GPTConfig, ViTConfig, variant
from prenorm_jax.paths import Tree, leaves, with_leaves

TINY = float(np.finfo(np.float64).tiny)
Config = ViTConfig | GPTConfig
Loss = Callable[[jax.Array], jax.Array] | None

TOLERANCES: dict[str, Any] = {
    # 1e-10: float64 rounding (1e-16) times what 48 layers and 4096-wide sums amplify it by, with two orders to spare.
    "float64": 1e-10,
    # What untransformed weights must miss by, for the check to mean anything: a thousandth of the logits' scale.
    "negative_control": 1e-3,
    # error(variant) / error(pre_ln), root mean square over logits: RMSNorm and the reflection round no more than LayerNorm does;
    # dropping a coordinate is no isometry: each reader entry is a difference of two, so its rounding has twice the variance.
    "ratio": {
        "pre_rmsnorm": 1.1,
        "pre_crmsnorm-reflect": 1.1,
        "pre_crmsnorm-drop": 2.0,
    },
    # The ratios are claims about the mean over models. One checkpoint is one draw of rounding errors: single draws of models that meet
    # the claim were seen between 0.8 and 1.5 of it (12 layers, width 64), so one checkpoint may miss it by this factor.
    "single_draw": 1.5,
}


@dataclasses.dataclass(frozen=True)
class Form:
    """A form that a model can run in: its variant, and for pre_crmsnorm the basis and the layout."""

    norm: str
    basis: str = "reflect"
    layout: str = "packed"

    @property
    def name(self) -> str:
        """As tables and JSON spell it: pre_ln, pre_rmsnorm, pre_crmsnorm-reflect, pre_crmsnorm-drop, with -compact where compact."""
        if self.norm != "pre_crmsnorm":
            return self.norm
        return f"{self.norm}-{self.basis}" + ("-compact" if self.layout == "compact" else "")

    def of(self, config: Config, **fields: Any) -> Config:
        """`config` in this form."""
        return dataclasses.replace(config, norm=self.norm, basis=self.basis, layout=self.layout, **fields)


PRE_LN = Form("pre_ln")
EQUIVALENT = (Form("pre_rmsnorm"), Form("pre_crmsnorm", "reflect"), Form("pre_crmsnorm", "drop"))
FORMS = (PRE_LN, *EQUIVALENT)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one form computed: logits, the loss, its gradient with respect to the Pre-LN parameters (flat, concatenated), and the
    recentered main branch (layers, tokens, D) in the Pre-LN coordinates with its mean, |mean| / rms, by layer."""

    logits: np.ndarray
    loss: float
    gradient: np.ndarray
    stream: np.ndarray
    stream_mean: np.ndarray


@dataclasses.dataclass(frozen=True)
class Errors:
    """What one form misses the oracle by, relative to the oracle's scale: max over entries / max entry, or rms / rms."""

    logits_max: float
    logits_rms: float
    loss: float
    gradient_max: float
    gradient_rms: float
    agreement: float  # share of positions whose likeliest class is the oracle's
    stream_rms: list[float]  # by layer
    stream_mean: list[float]  # by layer, of the form itself


def run(config: Config, params: Tree, inputs: np.ndarray, loss: Loss, dtype: str, *, control: bool = False) -> Outcome:
    """Runs the form that `config` names on Pre-LN parameters, in `dtype`.

    Args:
      loss: logits -> scalar; None leaves out the gradient.
      dtype: of the computation; the parameters are float64 beside float64, else float32.
      control: leaves out the recentering: the negative control of pre_rmsnorm.
    """
    storage = "float64" if dtype == "float64" else "float32"
    config = dataclasses.replace(config, dtype=dtype, param_dtype=storage)
    with jax.enable_x64(storage == "float64"), jax.default_matmul_precision("highest"):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), storage), params)
        x = jnp.asarray(inputs, storage) if np.issubdtype(inputs.dtype, np.floating) else jnp.asarray(inputs)
        chart = _unrecentered if control else models.running
        forward_and_back, pull_back = _functions(config, loss, chart)
        (value, (logits, stream)), gradient = forward_and_back(chart(params, config), x)
        gradient = pull_back(params, gradient) if loss else [np.zeros(1)]
        wide = np.asarray(stream, np.float64).reshape(len(stream), -1, stream.shape[-1])
        stream = np.asarray(variant(config).read(wide))  # type: ignore[arg-type]
    mean, rms = stream.mean(-1), np.sqrt(np.square(stream).mean(-1))
    return Outcome(
        np.asarray(logits, np.float64),
        float(value),
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)]),
        stream - mean[..., None],
        np.sqrt(np.square(mean / rms).mean(-1)),
    )


@functools.lru_cache(maxsize=32)
def _functions(config: Config, loss: Loss, chart: Callable[[Tree, Config], Tree]) -> tuple[Any, Any]:
    """The model and the loss, differentiated with respect to the running parameters, and the way back to the Pre-LN ones. The chart
    itself is applied to concrete weights, as a converted checkpoint is: in float64, rounded once."""

    def value(running: Tree, x: jax.Array) -> tuple[jax.Array, Any]:
        logits, intermediates = models.apply(config, running, x)
        logits = _meaningful(logits, config)
        return loss(logits) if loss else jnp.zeros(()), (logits, intermediates["main_branch"])

    def pull_back(params: Tree, gradient: Tree) -> Tree:
        return jax.vjp(lambda params: chart(params, config), params)[1](gradient)[0]

    forward = jax.value_and_grad(value, has_aux=True) if loss else lambda running, x: (value(running, x), None)
    return jax.jit(forward), jax.jit(pull_back)


def _unrecentered(params: Tree, config: Config) -> Tree:
    """What an RMSNorm model must not be given: the affine folded, the writers left as they are."""
    spec = models.main_branch(config)
    return transforms.strip_affine(transforms.fold_affine(params, spec), spec, layer_scales=True)


def _meaningful(logits: jax.Array, config: Config) -> jax.Array:
    """Without the columns of the padded vocabulary."""
    return logits[..., : config.vocab_size] if isinstance(config, GPTConfig) else logits


def errors(outcome: Outcome, oracle: Outcome) -> Errors:
    """What `outcome` misses the oracle by."""

    def worst(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), TINY))

    def rms(a: np.ndarray, b: np.ndarray, axis: Any = None) -> Any:
        return np.sqrt(np.square(a - b).mean(axis) / np.maximum(np.square(b).mean(axis), TINY))

    return Errors(
        logits_max=worst(outcome.logits, oracle.logits),
        logits_rms=float(rms(outcome.logits, oracle.logits)),
        loss=abs(outcome.loss - oracle.loss) / max(abs(oracle.loss), TINY),
        gradient_max=worst(outcome.gradient, oracle.gradient),
        gradient_rms=float(rms(outcome.gradient, oracle.gradient)),
        agreement=float((outcome.logits.argmax(-1) == oracle.logits.argmax(-1)).mean()),
        stream_rms=rms(outcome.stream, oracle.stream, (1, 2)).tolist(),
        stream_mean=outcome.stream_mean.tolist(),
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """Errors by dtype and form, the negative control's in float64, and what does not hold (nothing, one hopes)."""

    errors: dict[str, dict[str, Errors]]
    control: Errors
    failures: list[str]

    def ratio(self, dtype: str, form: str) -> float:
        """error(form) / error(pre_ln), of the logits' rms."""
        return self.errors[dtype][form].logits_rms / self.errors[dtype]["pre_ln"].logits_rms

    def as_markdown(self) -> str:
        """A row for each dtype and form: relative errors against the oracle, and the ratio that is judged."""
        head = (
            "dtype|form|logits, max|logits, rms|/ pre_ln|loss|gradient, max|same argmax|mean of main branch, last layer"
        )
        lines = [f"| {' | '.join(head.split('|'))} |", "|---" * (head.count("|") + 1) + "|"]
        rows = [(dtype, form, found) for dtype, forms in self.errors.items() for form, found in forms.items()]
        for dtype, form, found in [*rows, ("float64", "negative control: pre_rmsnorm, not recentered", self.control)]:
            ratio = "" if dtype == "float64" else f"{self.ratio(dtype, form):.2f}"
            numbers = [found.logits_max, found.logits_rms, found.loss, found.gradient_max]
            cells = [f"{number:.1e}" for number in numbers]
            mean = f"{found.stream_mean[-1]:.1e}"
            lines.append(
                f"| {' | '.join([dtype, form, *cells[:2], ratio, *cells[2:], f'{found.agreement:.2%}', mean])} |"
            )
        verdict = "Everything holds." if not self.failures else "Does not hold: " + "; ".join(self.failures)
        return "\n".join([*lines, "", verdict])

    def as_json(self) -> dict[str, Any]:
        """Plain data: errors, control, failures, tolerances."""
        return {**dataclasses.asdict(self), "tolerances": TOLERANCES}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> "Report":
        """The report that `as_json` wrote."""
        found = {dtype: {form: Errors(**row) for form, row in forms.items()} for dtype, forms in data["errors"].items()}
        return cls(found, Errors(**data["control"]), data["failures"])


def compare(
    config: Config,
    params: Tree,
    inputs: np.ndarray,
    loss: Loss,
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16"),
) -> Report:
    """Measures every form of a Pre-LN parameter tree against the float64 Pre-LN oracle, in each dtype, and judges it.

    Args:
      config: of the model, in any variant.
      params: Pre-LN parameters.
      inputs: images (B, H, W, C) or tokens (B, L).
      loss: logits -> scalar.
    """
    oracle = run(PRE_LN.of(config), params, inputs, loss, "float64")
    found = {
        dtype: {form.name: errors(run(form.of(config), params, inputs, loss, dtype), oracle) for form in FORMS}
        for dtype in dtypes
    }
    control = errors(run(Form("pre_rmsnorm").of(config), params, inputs, loss, "float64", control=True), oracle)
    report = Report(found, control, [])
    return dataclasses.replace(report, failures=_failures(report))


def _failures(report: Report) -> list[str]:
    lines = []
    for form, found in report.errors.get("float64", {}).items():
        for what, error in (("logits", found.logits_max), ("gradient", found.gradient_max)):
            if not error <= TOLERANCES["float64"]:
                lines.append(
                    f"float64 {form}: {what} differ by {error:.1e} of their scale; allowed: {TOLERANCES['float64']}"
                )
    if not report.control.logits_max >= TOLERANCES["negative_control"]:
        lines.append(f"negative control: differs by {report.control.logits_max:.1e} only, so the check shows nothing")
    for dtype in report.errors:
        for form, bound in TOLERANCES["ratio"].items() if dtype != "float64" else ():
            allowed = bound * TOLERANCES["single_draw"]
            if not report.ratio(dtype, form) <= allowed:
                lines.append(
                    f"{dtype} {form}: {report.ratio(dtype, form):.2f} x the error of pre_ln; allowed: {allowed:.2f}"
                )
    return lines


def perturbed(params: Tree, seed: int, scale: float = 0.3) -> Tree:
    """Parameters of a model that hides nothing: noise on every leaf, so that gamma != 1 and beta != 0; the first entry of each norm's
    scale is exactly 0."""
    rng = np.random.default_rng(seed)
    flat = leaves(params)
    for path, leaf in flat.items():
        array = np.asarray(leaf, np.float64)
        array = array + scale * (array.std() or 1.0) * rng.normal(size=array.shape)
        if path.endswith("/scale"):
            array[..., 0] = 0.0
        flat[path] = array.astype(leaf.dtype)
    return with_leaves(params, flat)


def shifted(params: Tree, config: Config, deviations: float) -> Tree:
    """The same function on another main branch: every writer's entries get a mean of `deviations` times their standard deviation,
    which adds a multiple of (1, ..., 1) to what they write; LayerNorm ignores it."""
    flat = leaves(params)
    for path, _ in models.main_branch(config).resolve(params).writers:
        array = np.asarray(flat[path], np.float64)
        flat[path] = (array + deviations * array.std()).astype(flat[path].dtype)
    return with_leaves(params, flat)
