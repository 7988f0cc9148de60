"""Shows that a converted checkpoint is the same function: both run in transformers, the converted one with RMSNorm in place.

prenorm verify SRC DST [--inputs FILE] [--json FILE] [--picture FILE]

The oracle is SRC with its LayerNorms in float64. Run in float64, DST may miss it by 1e-9, or by twice what SRC does when each of its
weights is rounded once to the dtype that DST is stored in (`prenorm convert --dtype float64` leaves only the bound). Run in its own dtype,
it may miss it by twice what SRC does there. The negative control, SRC's own weights with RMSNorm in place, has to fail. Exit status 1
where anything does not hold. Needs torch and transformers.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import inspect
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from prenorm_jax.interop.formats import _library
from prenorm_jax.interop.tensors import FormatError

FLOAT64 = (
    1e-9  # of the largest output: rounding (1e-16) times what dozens of layers amplify it by, with orders to spare
)
RATIO = 2.0  # error(DST) / error(SRC), root mean square over outputs, where both round
CONTROL = 1e-3  # what the negative control must miss by, for the check to mean anything
TINY = float(np.finfo(np.float64).tiny)
NOT_OUTPUTS = ("past_key_values", "hidden_states", "attentions", "cross_attentions", "loss")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("source", type=pathlib.Path, metavar="SRC", help="the checkpoint that was converted")
    parser.add_argument("converted", type=pathlib.Path, metavar="DST", help="what `prenorm convert` made of it")
    parser.add_argument("--inputs", type=pathlib.Path, help="an .npz of forward's arguments; random ones otherwise")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=16, help="of random token sequences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="write the report there")
    parser.add_argument("--picture", type=pathlib.Path, help="draw the main branch's mean there, norm by norm")


def run(chosen: argparse.Namespace) -> int:
    """Verifies, prints the table; 1 where something does not hold."""
    report = verify(
        chosen.source,
        chosen.converted,
        inputs=chosen.inputs,
        batch=chosen.batch,
        length=chosen.length,
        seed=chosen.seed,
    )
    print(report.as_markdown())
    if chosen.json:
        chosen.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    if chosen.picture:
        draw(report, chosen.picture)
    return 1 if report.failures else 0


@dataclasses.dataclass(frozen=True)
class Row:
    """What one run misses the oracle by: the largest difference as it is and relative to the largest output, root mean square relative
    to the outputs' own, and the share of positions whose largest output is the oracle's."""

    run: str
    dtype: str
    largest: float
    relative: float
    rms: float
    agreement: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows, |mean| / rms of what each norm reads (norm -> before and after), and what does not hold (nothing, one hopes)."""

    rows: list[Row]
    means: dict[str, tuple[float, float]]
    failures: list[str]
    outputs: list[str]

    def as_markdown(self) -> str:
        """The tables."""
        lines = [f"Outputs compared: {', '.join(self.outputs)}", ""]
        lines += [
            "| run | dtype | largest error | relative | rms, relative | same argmax |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.run} | {row.dtype} | {row.largest:.1e} | {row.relative:.1e} | {row.rms:.1e} | {row.agreement:.2%} |"
            for row in self.rows
        ]
        lines += ["", "| mean of the main branch / its rms, float64 | SRC | DST |", "|---|---|---|"]
        lines += [f"| {name} | {before:.1e} | {after:.1e} |" for name, (before, after) in self.means.items()]
        verdict = "It holds." if not self.failures else "Does not hold: " + "; ".join(self.failures)
        return "\n".join([*lines, "", verdict])

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "tolerances": {"float64": FLOAT64, "ratio": RATIO, "control": CONTROL}}


def verify(
    source: pathlib.Path,
    converted: pathlib.Path,
    *,
    inputs: pathlib.Path | None = None,
    batch: int = 2,
    length: int = 16,
    seed: int = 0,
) -> Report:
    """Runs both checkpoints and compares. Raises: FormatError for what can't be run."""
    torch = _library("torch", converted, "this command")
    transformers = _library("transformers", converted, "this command")
    torch_norms = importlib.import_module("prenorm_jax.interop.torch_norms")
    if not (converted / "prenorm.json").is_file():
        raise FormatError(f"{converted}: no prenorm.json in it; expected what `prenorm convert` writes")
    manifest = torch_norms.read_manifest(converted)
    names = [name for name, found in manifest["norms"].items() if found["converted"]]

    model = load(source, transformers, torch)
    stored = dtype_of(load(converted, transformers, torch))
    narrow = max(stored, dtype_of(model), key=lambda dtype: torch.finfo(dtype).eps)
    given = read_inputs(inputs, torch) if inputs else random_inputs(model, torch, batch, length, seed)

    try:
        own = outputs(copy.deepcopy(model).to(narrow), given, torch, seed)
        model.to(torch.float64)
        oracle, before = _watch(model, torch_norms.find_modules(model, names), given, torch, seed)
        with _weights_rounded(model, stored, torch, seed):
            rounded = outputs(model, given, torch, seed)
        torch_norms.swap_norms(model, manifest)
        control = outputs(model, given, torch, seed)

        model = load(converted, transformers, torch).to(torch.float64)
        stock = outputs(model, given, torch, seed)
        swapped, after = _watch(model, torch_norms.swap_norms(model, manifest), given, torch, seed)
        native = outputs(model.to(narrow), given, torch, seed)
    except ValueError as error:
        raise FormatError(f"{converted}: {error}") from None

    word = str(narrow).removeprefix("torch.")
    rows = [
        row("DST, LayerNorm as it is", "float64", stock, oracle),
        row("DST, RMSNorm in place", "float64", swapped, oracle),
        row(f"SRC, weights rounded once to {str(stored).removeprefix('torch.')}", "float64", rounded, oracle),
        row("negative control: SRC, RMSNorm in place", "float64", control, oracle),
        row("SRC", word, own, oracle),
        row("DST, RMSNorm in place", word, native, oracle),
    ]
    means = {name: (before[name], after[name]) for name in before}  # in the order of the network
    return Report(rows, means, failures(rows), list(oracle))


def failures(rows: list[Row]) -> list[str]:
    """What does not hold."""
    *exact, rounded, control, own, native = rows
    lines = [
        f"{found.dtype}, {found.run}: misses the oracle by {found.rms:.1e} (rms), {found.rms / max(less.rms, TINY):.3g} times as "
        f"much as {less.run}; allowed: {RATIO}, or {FLOAT64} of the largest output"
        for found, less in [*((found, rounded) for found in exact), (native, own)]
        if not (found.rms <= RATIO * less.rms or found.relative <= FLOAT64)
    ]
    least = max(CONTROL, 2 * RATIO * rounded.rms)
    if not control.rms >= least:
        lines.append(
            f"{control.run}: misses by {control.rms:.1e} only, so the check shows nothing; expected {least:.1e}"
        )
    return lines


def row(run: str, dtype: str, found: dict[str, np.ndarray], oracle: dict[str, np.ndarray]) -> Row:
    """One run against the oracle: the worst of the outputs."""
    if found.keys() != oracle.keys():
        raise FormatError(f"{run}: outputs {', '.join(found)}; the oracle's are {', '.join(oracle)}")
    largest, relative, rms, same = [], [], [], []
    for name, expected in oracle.items():
        difference = np.abs(found[name] - expected)
        largest.append(_worst(difference))
        relative.append(_worst(difference) / max(_worst(np.abs(expected)), TINY))
        rms.append(np.sqrt(np.square(difference).mean() / max(np.square(expected).mean(), TINY)))
        same.append((found[name].argmax(-1) == expected.argmax(-1)).mean())
    return Row(run, dtype, _worst(largest), _worst(relative), _worst(rms), float(min(same)))


def _worst(values: Any) -> float:
    return float(np.max(values, initial=0.0))  # NaN stays NaN, and fails every bound


def load(folder: pathlib.Path, transformers: Any, torch: Any) -> Any:
    """The model of a folder, of the class that its config names, in the dtype of its files. Raises: FormatError."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        name = (config.architectures or ["AutoModel"])[0]
        found = getattr(transformers, name, transformers.AutoModel)
        return found.from_pretrained(folder, config=config, dtype="auto").eval()
    except Exception as error:  # whatever transformers stumbles over
        raise FormatError(f"{folder}: transformers can't load it ({str(error).splitlines()[0][:200]})") from None


def dtype_of(model: Any) -> Any:
    """The dtype of a model's weights."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


@contextlib.contextmanager
def _weights_rounded(model: Any, dtype: Any, torch: Any, seed: int) -> Iterator[None]:
    """Every weight off by as much as one rounding to `dtype`, at random; undone afterwards, up to float64's own rounding."""

    def scale(up: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5
                factor = 1 + torch.finfo(dtype).eps * noise
                parameter.mul_(factor if up else 1 / factor)

    scale(True)
    yield
    scale(False)


def random_inputs(model: Any, torch: Any, batch: int, length: int, seed: int) -> dict[str, Any]:
    """Arguments of the model's forward, from a seed: tokens, images, audio features, whatever it takes and its config has sizes for."""
    rng = np.random.default_rng(seed)
    takes = inspect.signature(model.forward).parameters
    config = model.config
    text, vision = (getattr(config, name, config) for name in ("text_config", "vision_config"))
    given: dict[str, np.ndarray] = {}
    longest = getattr(text, "max_position_embeddings", None) or length
    for name in ("input_ids", "decoder_input_ids"):
        # A config has a vocabulary where its model has tokens; a decoder's belong to models of two halves alone.
        if name in takes and getattr(text, "vocab_size", None) and (name == "input_ids" or config.is_encoder_decoder):
            given[name] = rng.integers(text.vocab_size, size=(batch, min(length, longest)))
    if "pixel_values" in takes and hasattr(vision, "image_size"):
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        given["pixel_values"] = rng.normal(size=(batch, vision.num_channels, side, side))
    if "input_features" in takes and hasattr(config, "num_mel_bins"):
        given["input_features"] = rng.normal(size=(batch, config.num_mel_bins, 2 * config.max_source_positions))
    if not given:
        raise FormatError(f"{type(model).__name__}: its arguments {', '.join(takes)} can't be made up; give --inputs")
    return {name: torch.from_numpy(value) for name, value in given.items()}


def read_inputs(file: pathlib.Path, torch: Any) -> dict[str, Any]:
    """Arguments of forward from an .npz. Raises: FormatError."""
    try:
        with np.load(file, allow_pickle=False) as found:
            return {name: torch.from_numpy(found[name]) for name in found.files}
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{file}: not an .npz of forward's arguments ({error})") from None


def outputs(model: Any, given: dict[str, Any], torch: Any, seed: int) -> dict[str, np.ndarray]:
    """All floating outputs of a run, by name, in float64."""
    dtype = dtype_of(model)
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    torch.manual_seed(seed)  # some models draw a mask
    with torch.no_grad(), _wide_throughout(torch, dtype):
        result = model(**given)
    found = {
        name: value.double().numpy()
        for name, value in result.items()
        if name not in NOT_OUTPUTS and isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if not found:
        raise FormatError(f"{type(model).__name__}: returns no floating tensor to compare")
    return found


def _watch(
    model: Any, norms: dict[str, Any], given: dict[str, Any], torch: Any, seed: int
) -> tuple[Any, dict[str, float]]:
    """The outputs, and |mean| / rms of what each norm reads."""
    means: dict[str, float] = {}

    def hook(name: str) -> Any:
        def note(module: Any, inputs: Any) -> None:
            x = inputs[0].double()
            share = x.mean(-1).square() / x.square().mean(-1).clamp_min(TINY)
            means[name] = max(means.get(name, 0.0), float(share.mean().sqrt()))

        return note

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in norms.items()]
    found = outputs(model, given, torch, seed)
    for handle in handles:
        handle.remove()
    silent = [name for name in norms if name not in means]
    if silent:
        raise FormatError(
            f"{silent[0]}: no run reached this norm, so nothing is shown of it ({len(silent)} such); give --inputs"
        )
    return found, means


def _wide_throughout(torch: Any, dtype: Any) -> Any:
    """Reference code takes softmax, rotary angles and more in float32, whatever the model's dtype; in a float64 run it is float64."""

    class Wide(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if dtype == torch.float64:
                function = torch.Tensor.double if function is torch.Tensor.float else function
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
                kwargs = {
                    key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()
                }
            return function(*args, **(kwargs or {}))

    return Wide()


def draw(report: Report, file: pathlib.Path) -> None:
    """The picture: the mean that each norm reads, before and after. Raises: FormatError without matplotlib."""
    _library("matplotlib", file, "pictures")
    figure_of = importlib.import_module("matplotlib.figure").Figure
    figure = figure_of(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    floor = 1e-18
    for label, at in (("SRC", 0), ("DST", 1)):
        axes.semilogy([max(pair[at], floor) for pair in report.means.values()], marker=".", label=label)
    axes.set_xlabel("norm, in the order of the network")
    axes.set_ylabel("|mean| / rms of the main branch, float64")
    axes.legend()
    figure.savefig(file)
