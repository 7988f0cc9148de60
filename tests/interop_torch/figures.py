"""The errors of every architecture's conversion, against the reference library in float64.

PYTHONPATH=. python tests/interop_torch/figures.py --json=results/interop/architectures.json
"""

import argparse
import json
import pathlib
import sys
import tempfile

import torch
from models import MODELS, outputs, perturbed
from rms import with_rms_norm

from prenorm_jax.interop.convert import MANIFEST, write
from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.plan import make_plan


def loaded(name: str, folder: pathlib.Path, dtype: torch.dtype) -> torch.nn.Module:
    """A checkpoint, by the stock code, no tensor of it missing or unused."""
    model, report = MODELS[name].kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


def convert(source: pathlib.Path, destination: pathlib.Path, **options) -> dict:
    """`prenorm convert`; gives prenorm.json."""
    checkpoint = open_checkpoint(source)
    write(checkpoint, make_plan(checkpoint, **options), destination, fold=options.get("fold", False))
    return json.loads((destination / MANIFEST).read_text())


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def typical(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def measure(name: str, folder: pathlib.Path, *, fold: bool) -> dict:
    """One architecture: largest differences in float64, and float32's errors, of LayerNorm before and RMSNorm after."""
    model, double, single = MODELS[name], torch.float64, torch.float32
    perturbed(model, double).save_pretrained(folder / "source")
    before = loaded(name, folder / "source", double)
    oracle = outputs(model, before, double)
    manifest = convert(folder / "source", folder / "destination", fold=fold)
    after = loaded(name, folder / "destination", double)
    figures = {"layer_norm": worst(outputs(model, after, double), oracle)}
    figures["rms_norm"] = worst(outputs(model, with_rms_norm(after, manifest), double), oracle)
    figures["unconverted"] = worst(outputs(model, with_rms_norm(before, manifest), double), oracle)
    if manifest["recenter"]:
        forgotten = with_rms_norm(loaded(name, folder / "destination", double), manifest, recenter=False)
        figures["not_recentered"] = worst(outputs(model, forgotten, double), oracle)
    # The same in float32: its weights are rounded once more, so the oracle is that of the rounded ones.
    loaded(name, folder / "source", single).save_pretrained(folder / "source32")
    oracle = outputs(model, loaded(name, folder / "source32", double), double)
    manifest = convert(folder / "source32", folder / "destination32", fold=fold)
    figures["float32_before"] = typical(outputs(model, loaded(name, folder / "source32", single), single), oracle)
    swapped = with_rms_norm(loaded(name, folder / "destination32", single), manifest)
    figures["float32_after"] = typical(outputs(model, swapped, single), oracle)
    norms = manifest["norms"].values()
    return {**figures, "norms": len(norms), "converted": sum(norm["converted"] for norm in norms)}


def holds(figures: dict) -> bool:
    """Whether a conversion is the same function: with LayerNorm, with RMSNorm, and in float32, where the controls are not."""
    same = figures["layer_norm"] < 1e-9 and figures["rms_norm"] < 1e-9
    controls = min(figures["unconverted"], figures.get("not_recentered", 1)) > 1e-3
    sane = 1e-9 < figures["float32_before"] < 1e-4  # float32's own error and nothing else
    return same and controls and sane and figures["float32_after"] < 2 * figures["float32_before"]


def main() -> None:
    """All of them, as they are and folded; exit status 1 where one does not hold."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()
    table: dict[str, dict] = {}
    for name in MODELS:
        for key, fold in (("plain", False), ("folded", True)):
            with tempfile.TemporaryDirectory() as folder:
                figures = measure(name, pathlib.Path(folder), fold=fold)
            table.setdefault(name, {})[key] = {**figures, "holds": holds(figures)}
            print(name, key, json.dumps(table[name][key]), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(table, indent=2) + "\n")
    sys.exit(not all(row["holds"] for pair in table.values() for row in pair.values()))


if __name__ == "__main__":
    main()
