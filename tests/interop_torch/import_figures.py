"""The errors of every import, against the reference library in float64, and whether the export is what was imported."""

import dataclasses
import functools
import pathlib
import sys

import jax
import numpy as np
import torch
from checkpoints import CASES, inputs, logits, perturbed

import prenorm_jax as pn
from prenorm_jax import models
from prenorm_jax.interop.exporting import exported
from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.importing import Imported, import_checkpoint

sys.path.append(str(pathlib.Path(__file__).parents[1] / "interop_models"))
import originals

VARIANTS = {
    "pre_rmsnorm": {"norm": "pre_rmsnorm"},
    "pre_crmsnorm": {"norm": "pre_crmsnorm"},
}


def ours(imported: Imported, x: np.ndarray, dtype: str, **variant: str) -> np.ndarray:
    """Our model's logits, in float64, of images (B, H, W, C) or tokens (B, L)."""
    config = dataclasses.replace(imported.config, dtype=dtype, param_dtype=dtype, **variant)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), imported.params)
    found = run(config)(models.running(models.native(params, config), config, "native"), x)
    return np.asarray(found, np.float64)


@functools.cache
def run(config):
    return jax.jit(lambda params, x: models.apply(config, params, x)[0])


def control(imported: Imported, x: np.ndarray) -> np.ndarray:
    """RMSNorm on weights that are not recentered: another function."""
    config = dataclasses.replace(imported.config, dtype="float64", param_dtype="float64", norm="pre_rmsnorm")
    spec = models.main_branch(config)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), imported.params)
    folded = pn.strip_affine(pn.fold_affine(params, spec), spec, layer_scales=True)
    return np.asarray(run(config)(folded, x), np.float64)


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def typical(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(found - expected)) / np.mean(np.square(expected))))


def same_bits(imported: Imported, file: pathlib.Path) -> bool:
    """Whether export(import(x)) == x: names, dtypes, shapes and every bit."""
    back, there = exported(imported), open_checkpoint(file).read()
    return back.keys() == there.keys() and all(
        back[name].dtype == value.dtype and back[name].shape == value.shape and back[name].tobytes() == value.tobytes()
        for name, value in there.items()
    )


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference model: `save(dtype, folder)` writes it, `logits(dtype)` are its own, in float64."""

    family: str
    x: np.ndarray
    save: object
    logits: object


def of_torch(name: str) -> Reference:
    case = CASES[name]
    model, x = perturbed(case), inputs(case)

    def save(dtype, folder):
        case.save(model.to(getattr(torch, dtype)), folder)

    images = x if case.tokens else x.transpose(0, 2, 3, 1)
    return Reference(case.family, images, save, lambda dtype: logits(case, model, x, getattr(torch, dtype)))


def of_google(name: str) -> Reference:
    model = originals.MODELS[name]
    params = originals.perturbed(model)
    x = (
        np.random.default_rng(1)
        .normal(size=(16, originals.IMAGE, originals.IMAGE, 3))
        .astype(np.float32)
        .astype(np.float64)
    )
    rounded = {}

    def save(dtype, folder):
        folder.mkdir()
        rounded.update(params=jax.tree.map(lambda leaf: leaf.astype(dtype), params))
        originals.save(rounded["params"], folder / "vit.npz")

    def own(dtype):
        leaves = jax.tree.map(lambda leaf: leaf.astype(dtype), rounded["params"])
        return np.asarray(jax.jit(model.apply)({"params": leaves}, x.astype(dtype)), np.float64)

    return Reference(name.partition(",")[0], x, save, own)


REFERENCES = {
    **{name: functools.partial(of_torch, name) for name in CASES},
    **{name: functools.partial(of_google, name) for name in originals.MODELS},
}


def checkpoint_in(folder: pathlib.Path) -> pathlib.Path:
    """The file to open where a folder has no name that is known, else the folder."""
    return next((path for path in folder.iterdir() if path.suffix in (".npz", ".pt")), folder)


def given(name: str) -> dict:
    """What a file does not say, and the user has to."""
    return {"heads": 2} if name == "timm, features" else {}


def measure(name: str, folder: pathlib.Path, *, variants: bool = True) -> dict:
    """One checkpoint: largest differences in float64, relative to the largest logit; float32's errors, of the reference and ours."""
    folder.mkdir(exist_ok=True)
    reference = REFERENCES[name]()
    reference.save("float64", folder / "double")
    file = checkpoint_in(folder / "double")
    imported = import_checkpoint(file, **given(name))
    assert imported.names.family.name == reference.family
    x, oracle = reference.x, reference.logits("float64")
    figures = {"family": imported.names.family.name, "bit for bit": same_bits(imported, file)}
    figures["float64"] = largest(ours(imported, x, "float64"), oracle)
    if variants:
        figures |= {key: largest(ours(imported, x, "float64", **fields), oracle) for key, fields in VARIANTS.items()}
        figures["control"] = largest(control(imported, x), oracle)
    # The same in float32: its weights are rounded once more, so the oracle is that of the rounded ones.
    reference.save("float32", folder / "single")
    file = checkpoint_in(folder / "single")
    imported = import_checkpoint(file, **given(name))
    single = x if x.dtype.kind == "i" else x.astype(np.float32)
    own = reference.logits("float32")
    oracle = reference.logits("float64")
    figures["float32, reference"] = typical(own, oracle)
    figures["float32, ours"] = typical(ours(imported, single, "float32"), oracle)
    figures["bit for bit"] &= same_bits(imported, file)
    return figures
