"""What rounding does to the forms of one function: python -m prenorm_jax.measure.drift small|full

A random Pre-LN Transformer (causal attention and an MLP in each layer, every norm with an affine) is built and run layer by layer, so
that 48 layers of width 4,096 need the memory of one. Its mean on the main branch is set to so many standard deviations after every
layer, which LayerNorm does not see: one float64 oracle belongs to all of them. Two questions:

    computation    the float64 weights, mapped to a form, rounded once to a dtype, and everything computed in that dtype (statistics in
                   float32, as everywhere here): how far are the logits from the oracle?
    checkpoint     the weights are rounded to a dtype first, as a stored model's are; mapped in float64, rounded back once, and computed
                   in float64: what does converting a stored model cost? Its oracle is that stored model.

The mean of the main branch is recorded by layer, |mean| / standard deviation, where the form has one.
Writes results/drift/PRESET.json, docs/drift.md and docs/drift.png; --read draws them again from a JSON file.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from prenorm_jax import transforms
from prenorm_jax.main_branch import MainBranch, Norm, Reader, Writer
from prenorm_jax.norms import crms_norm, layer_norm, rms_norm
from prenorm_jax.paths import Tree

Array = jax.Array
EPS = 1e-5
BRANCH = 0.5  # standard deviation of what each residual branch adds to a stream that begins at 1
START = MainBranch([Writer("embed")], [])
LAYER = MainBranch(
    [Writer("attn/out/kernel"), Writer("attn/out/bias"), Writer("mlp/down/kernel"), Writer("mlp/down/bias")],
    [
        Norm([Reader("attn/in/kernel", bias="attn/in/bias")], "norm1/scale", "norm1/bias"),
        Norm([Reader("mlp/up/kernel", bias="mlp/up/bias")], "norm2/scale", "norm2/bias"),
    ],
)
END = MainBranch([], [Norm([Reader("head/kernel", bias="head/bias")], "norm/scale", "norm/bias")])


def _fast_layer_norm(x: Array, scale: Array, bias: Array, *, eps: float) -> Array:
    """LayerNorm with the variance E[x^2] - E[x]^2, in float32 or wider: Flax's default."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0)
    y = (wide - mean) * jax.lax.rsqrt(variance + eps)
    row = (1,) * (x.ndim - 1) + (-1,)
    return (y * scale.astype(y.dtype).reshape(row) + bias.astype(y.dtype).reshape(row)).astype(x.dtype)


def _gauged(params: Tree, spec: MainBranch) -> Tree:
    return transforms.zero_mean_gauge(transforms.to_pre_rmsnorm(params, spec), spec)


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of the function: the map of its parameters, and its norm."""

    convert: Callable[[Tree, MainBranch], Tree]
    norm: Callable[..., Array]


FORMS = {
    "pre_ln, fast variance": Form(lambda params, spec: params, _fast_layer_norm),
    "pre_ln": Form(lambda params, spec: params, layer_norm),
    "pre_rmsnorm, no gauge": Form(transforms.to_pre_rmsnorm, rms_norm),
    "pre_rmsnorm": Form(_gauged, rms_norm),
    "pre_crmsnorm-reflect": Form(transforms.compress, functools.partial(crms_norm, basis="reflect")),
    "pre_crmsnorm-drop": Form(
        lambda params, spec: transforms.compress(params, spec, "drop"), functools.partial(crms_norm, basis="drop")
    ),
}
WITH_A_MEAN = [name for name in FORMS if "crms" not in name]


FORMS_OF = {"computation": tuple(FORMS), "checkpoint": tuple(name for name in FORMS if "fast" not in name)}
"""Question -> the forms that are asked."""


@dataclasses.dataclass(frozen=True)
class Lane:
    """One question in one dtype."""

    question: str
    dtype: str

    @property
    def computes(self) -> str:
        return "float64" if self.question == "checkpoint" else self.dtype


@dataclasses.dataclass(frozen=True)
class Study:
    """One width: how deep, on how many tokens, at which depths the logits are read, with which means of the main branch."""

    width: int
    depths: tuple[int, ...]
    tokens: int = 128
    vocabulary: int = 1024
    head_dim: int = 64
    means: tuple[float, ...] = (0, 1, 3, 10, 30, 100)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    seed: int = 0


PRESETS = {
    "small": (Study(64, (6, 12), tokens=16, vocabulary=64, head_dim=16, means=(0, 3, 100)),),
    "full": tuple(Study(width, (12, 24, 36, 48)) for width in (1024, 4096)),
}


def run(study: Study, report: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measures one width. Needs float64 enabled.

    Returns: a row for each (kind, dtype, form, mean): logits_rms, logits_max and agreement by depth of `study.depths`, and stream_mean by
      layer (before the first, after each) or None.
    """
    lanes = [Lane(question, dtype) for question in FORMS_OF for dtype in study.dtypes]
    means = jnp.asarray(study.means, jnp.float64).reshape(-1, 1, 1)
    keys = iter(jax.random.split(jax.random.key(study.seed), max(study.depths) + 2))

    oracle = _normal(next(keys), (1, study.tokens, study.width))
    deviation = oracle.std(-1).mean()
    start = {"embed": oracle + means * deviation}
    streams = {lane: {name: w["embed"] for name, w in _weights(start, START, lane).items()} for lane in lanes}
    recorded = {(lane, name): [_mean(x)] for lane in lanes for name, x in streams[lane].items() if name in WITH_A_MEAN}
    end = _draw_end(next(keys), study.width, study.vocabulary)
    end_weights = {lane: _weights(end, END, lane) for lane in lanes}
    errors: dict[tuple[Lane, str], list[dict[str, Array]]] = {}
    for depth in range(1, max(study.depths) + 1):
        params = _draw_layer(next(keys), study.width)
        oracle = _oracle(params, oracle, study.head_dim)
        bias = params["mlp"]["down"]["bias"][None, None]
        params["mlp"]["down"]["bias"] = bias + means * (oracle.std(-1).mean() - deviation)
        deviation = oracle.std(-1).mean()
        for lane in lanes:
            streams[lane] = _advance(streams[lane], _weights(params, LAYER, lane), lane, study.head_dim)
            for name, x in streams[lane].items():
                if name in WITH_A_MEAN:
                    recorded[lane, name].append(_mean(x))
        if depth in study.depths:
            for lane in lanes:
                for name, found in _missed(streams[lane], end_weights[lane], oracle, end, lane).items():
                    errors.setdefault((lane, name), []).append(found)
            report(f"width {study.width}: {depth} layers")
    return [
        {
            "question": lane.question,
            "dtype": lane.dtype,
            "form": name,
            "mean": mean,
            **{what: [float(at_depth[what][k]) for at_depth in by_depth] for what in by_depth[0]},
            "stream_mean": [float(layer[k]) for layer in recorded.get((lane, name), [])] or None,
        }
        for (lane, name), by_depth in errors.items()
        for k, mean in enumerate(study.means)
    ]


# A layer, and the end.


# Rounding is a program of its own each time: inside a larger one the compiler may leave it out.


def _weights(params: Tree, spec: MainBranch, lane: Lane) -> dict[str, Tree]:
    """What each form of a lane stores."""
    return _converted(_rounded(params, lane.dtype) if lane.question == "checkpoint" else params, spec, lane)


@functools.partial(jax.jit, static_argnums=(1,))
def _rounded(params: Tree, dtype: str) -> Tree:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _converted(params: Tree, spec: MainBranch, lane: Lane) -> dict[str, Tree]:
    """The parameters of each form, mapped in float64 and rounded once."""
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    return {
        name: jax.tree.map(lambda leaf: leaf.astype(lane.dtype), FORMS[name].convert(exact, spec))
        for name in FORMS_OF[lane.question]
    }


@functools.partial(jax.jit, static_argnums=(2, 3))
def _advance(streams: dict[str, Array], weights: dict[str, Tree], lane: Lane, head_dim: int) -> dict[str, Array]:
    """Every form's main branch, one layer further."""
    return {
        name: _layer(FORMS[name].norm, _rounded(weights[name], lane.computes), x.astype(lane.computes), head_dim)
        for name, x in streams.items()
    }


@functools.partial(jax.jit, static_argnums=(4,))
def _missed(
    streams: dict[str, Array], ends: dict[str, Tree], oracle: Array, end: Tree, lane: Lane
) -> dict[str, dict[str, Array]]:
    """What each form's logits miss the oracle's by, a value for each mean of the main branch."""
    logits = {name: _read(FORMS[name].norm, _rounded(ends[name], lane.computes), x) for name, x in streams.items()}
    expected = logits["pre_ln"] if lane.question == "checkpoint" else _read(layer_norm, end, oracle)

    def errors(found: Array) -> dict[str, Array]:
        missed, scale = found - expected, jnp.sqrt(jnp.square(expected).mean((1, 2)))
        return {
            "logits_rms": jnp.sqrt(jnp.square(missed).mean((1, 2))) / scale,
            "logits_max": jnp.abs(missed).max((1, 2)) / jnp.abs(expected).max((1, 2)),
            "agreement": (found.argmax(-1) == expected.argmax(-1)).mean(-1),
        }

    return {name: errors(found) for name, found in logits.items()}


def _layer(norm: Callable[..., Array], params: Tree, x: Array, head_dim: int) -> Array:
    """Causal attention and an MLP; x is (means, tokens, lanes)."""
    n = norm(x, params["norm1"]["scale"], params["norm1"]["bias"], eps=EPS)
    q, k, v = jnp.split(_linear(params["attn"]["in"], n).reshape(*x.shape[:2], -1, head_dim), 3, axis=2)
    scores = jnp.einsum("mqhk,mthk->mhqt", q, k) / head_dim**0.5
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool)[None, None], scores, -jnp.inf)
    attention = jax.nn.softmax(scores.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)
    attended = jnp.einsum("mhqt,mthk->mqhk", attention, v).reshape(*x.shape[:2], -1)
    x = x + _linear(params["attn"]["out"], attended)
    n = norm(x, params["norm2"]["scale"], params["norm2"]["bias"], eps=EPS)
    return x + _linear(params["mlp"]["down"], jax.nn.gelu(_linear(params["mlp"]["up"], n)))


_oracle = jax.jit(functools.partial(_layer, layer_norm), static_argnums=(2,))


def _read(norm: Callable[..., Array], params: Tree, x: Array) -> Array:
    """Logits, in float64 as far as they can be compared: (means, tokens, vocabulary)."""
    n = norm(x.astype(params["head"]["kernel"].dtype), params["norm"]["scale"], params["norm"]["bias"], eps=EPS)
    return _linear(params["head"], n).astype(jnp.float64)


def _linear(params: Tree, x: Array) -> Array:
    y = x @ params["kernel"]
    return y + params["bias"].reshape((1,) * (y.ndim - params["bias"].ndim) + params["bias"].shape)


@jax.jit
def _mean(x: Array) -> Array:
    """|mean| / standard deviation over lanes, root mean square over tokens: a value for each mean."""
    x = x.astype(jnp.float64)
    return jnp.sqrt(jnp.square(x.mean(-1) / x.std(-1)).mean(-1))


def _normal(key: Array, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    return scale * jax.random.normal(key, shape, jnp.float64)


def _draw_linear(key: Array, rows: int, columns: int, gain: float) -> Tree:
    kernel, bias = jax.random.split(key)
    return {"kernel": _normal(kernel, (rows, columns), gain * rows**-0.5), "bias": _normal(bias, (columns,), 0.1)}


def _draw_norm(key: Array, width: int) -> Tree:
    scale, bias = jax.random.split(key)
    return {"scale": 1 + _normal(scale, (width,), 0.3), "bias": _normal(bias, (width,), 0.3)}


@functools.partial(jax.jit, static_argnums=(1,))
def _draw_layer(key: Array, width: int) -> Tree:
    keys = iter(jax.random.split(key, 6))
    return {
        "norm1": _draw_norm(next(keys), width),
        "attn": {
            "in": _draw_linear(next(keys), width, 3 * width, 1.0),
            "out": _draw_linear(next(keys), width, width, 2 * BRANCH),  # attention averages its values
        },
        "norm2": _draw_norm(next(keys), width),
        "mlp": {
            "up": _draw_linear(next(keys), width, 4 * width, 1.0),
            "down": _draw_linear(next(keys), 4 * width, width, 1.5 * BRANCH),  # and gelu halves
        },
    }


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw_end(key: Array, width: int, vocabulary: int) -> Tree:
    norm, head = jax.random.split(key)
    return {"norm": _draw_norm(norm, width), "head": _draw_linear(head, width, vocabulary, 1.0)}


# What is written.


def measure(preset: str, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Every study of a preset, as the JSON file holds it."""
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "preset": preset,
        "device": f"{device.device_kind} ({device.platform}, {platform.machine()}), jax {jax.__version__}",
        "studies": [],
    }
    begun = time.perf_counter()
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        for study in PRESETS[preset]:
            result["studies"].append({**dataclasses.asdict(study), "rows": run(study, report)})
    return {**result, "seconds": round(time.perf_counter() - begun, 1)}


def markdown(result: Mapping[str, Any], picture: str) -> str:
    """The document: tables of the deepest read-out of every width, and the picture."""
    lines = [
        "# What rounding does to each form",
        "",
        f"Made by `python -m prenorm_jax.measure.drift {result['preset']}` on {result['device']}, in {result['seconds']:.0f} s. "
        "What is measured: the docstring of `prenorm_jax.measure.drift`.",
        "",
        f"![errors, and the mean by layer]({picture})",
    ]
    for study in result["studies"]:
        for question, words in QUESTIONS.items():
            lines += [
                "",
                f"## Width {study['width']}, {max(study['depths'])} layers: {words}",
                "",
                *_table(study, question),
            ]
        lines += [
            "",
            f"## Width {study['width']}: by depth, {_shown(study)}, mean {study['means'][0]:g} sd",
            "",
            *_by_depth(study),
        ]
    return "\n".join(lines) + "\n"


QUESTIONS = {
    "computation": "computing in a dtype; error of the logits (rms, relative to the float64 oracle's), same argmax",
    "checkpoint": "converting a stored checkpoint; computed in float64, error against that checkpoint's own logits",
}


def _table(study: Mapping[str, Any], question: str) -> list[str]:
    means = study["means"]
    lines = [f"| dtype | form | {' | '.join(f'mean {mean:g} sd' for mean in means)} |", "|---" * (len(means) + 2) + "|"]
    rows = {(row["dtype"], row["form"], row["mean"]): row for row in study["rows"] if row["question"] == question}
    for dtype in study["dtypes"]:
        for form in FORMS_OF[question]:
            if question == "checkpoint" and form == "pre_ln":  # its own oracle
                continue
            cells = (rows[dtype, form, mean] for mean in means)
            texts = (f"{row['logits_rms'][-1]:.1e}, {100 * row['agreement'][-1]:.1f} %" for row in cells)
            lines.append(f"| {dtype} | {form} | {' | '.join(texts)} |")
    return lines


def _by_depth(study: Mapping[str, Any]) -> list[str]:
    depths = study["depths"]
    lines = [
        f"| form | {' | '.join(f'{depth} layers' for depth in depths)} | mean of the main branch, last layer |",
        "|---" * (len(depths) + 2) + "|",
    ]
    rows = {(row["question"], row["dtype"], row["mean"], row["form"]): row for row in study["rows"]}
    for form in FORMS:
        row = rows["computation", _shown(study), study["means"][0], form]
        last = f"{row['stream_mean'][-1]:.1e}" if row["stream_mean"] else "none"
        lines.append(f"| {form} | {' | '.join(f'{error:.1e}' for error in row['logits_rms'])} | {last} |")
    return lines


def _shown(study: Mapping[str, Any]) -> str:
    """The dtype of the tables and panels that show one: that of training."""
    return "bfloat16" if "bfloat16" in study["dtypes"] else study["dtypes"][-1]


def main(arguments: list[str]) -> int:
    """Runs a preset, or reads a result, and writes the document."""
    parser = argparse.ArgumentParser(prog="prenorm_jax.measure.drift", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset", nargs="?", choices=list(PRESETS), help="what to run")
    parser.add_argument("--read", type=pathlib.Path, help="draw a JSON file again instead of running")
    parser.add_argument("--json", type=pathlib.Path, help="where the result goes; results/drift/PRESET.json")
    parser.add_argument(
        "--docs", type=pathlib.Path, default=pathlib.Path("docs"), help="where drift.md and drift.png go"
    )
    parser.add_argument("--no-docs", action="store_true", help="write the JSON alone (needs no matplotlib)")
    given = parser.parse_args(arguments)
    if (given.preset is None) == (given.read is None):
        parser.error("give a preset, or --read PATH")
    if given.read:
        result = json.loads(given.read.read_text())
    else:
        result = measure(given.preset, lambda line: print(line, flush=True))
        path = given.json or pathlib.Path("results/drift") / f"{given.preset}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result) + "\n")
        print(f"written: {path}, after {result['seconds']} s")
    if not given.no_docs:
        from prenorm_jax.measure import pictures

        pictures.drift(result["studies"][-1], _shown(result["studies"][-1]), given.docs / "drift.png", result["device"])
        (given.docs / "drift.md").write_text(markdown(result, "drift.png"))
        print(f"written: {given.docs / 'drift.md'}, drift.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
