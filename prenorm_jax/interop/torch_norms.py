"""RMSNorm in the place of LayerNorm, in a torch model whose checkpoint `prenorm convert` wrote. Needs torch alone: copy this file.

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    swap_norms(model, folder)       # reads folder/prenorm.json; the function stays the same, the means are gone

prenorm.json names the norms as the checkpoint's files do. transformers 5 calls some modules otherwise; it is then asked for the names.
"""

import json
import pathlib

import torch
from torch import nn


class RMSNorm(nn.Module):
    """LayerNorm without the mean, with the LayerNorm's own weight, bias and eps; statistics in float32 or wider."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)


def swap_norms(model: nn.Module, manifest: dict | str | pathlib.Path) -> dict[str, nn.Module]:
    """Swaps, in place, the LayerNorms that the manifest says are converted, and recenters the inputs of the modules that it lists.

    Args:
      model: of the converted checkpoint.
      manifest: prenorm.json's contents, the file, or the folder that it is in.

    Returns: the new RMSNorms, by the name in the manifest.
    Raises: ValueError for a norm that the model lacks, or that is no LayerNorm of the manifest's eps; the model is then unchanged.
    """
    manifest = read_manifest(manifest)
    norms = {name: found for name, found in manifest["norms"].items() if found["converted"]}
    modules = find_modules(model, [*norms, *(entry["module"] for entry in manifest["recenter"])])
    for name, found in norms.items():
        if not is_layer_norm(modules[name]) or modules[name].eps != found["eps"]:
            raise ValueError(f"{name}: got {modules[name]}; expected a LayerNorm with eps={found['eps']}")
    swapped: dict[str, nn.Module] = {name: RMSNorm(modules[name]) for name in norms}
    new = {id(modules[name]): norm for name, norm in swapped.items()}
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if id(child) in new:
                setattr(parent, key, new[id(child)])
    for entry in manifest["recenter"]:
        modules[entry["module"]].register_forward_pre_hook(_recenter)
    return swapped


def read_manifest(manifest: dict | str | pathlib.Path) -> dict:
    """prenorm.json, from itself, its path or its folder."""
    if isinstance(manifest, dict):
        return manifest
    path = pathlib.Path(manifest)
    return json.loads((path / "prenorm.json" if path.is_dir() else path).read_text())


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module computes what nn.LayerNorm does: one itself, or a subclass that only changes its dtype or its bias."""
    return isinstance(module, nn.LayerNorm) or (type(module).__name__.endswith("LayerNorm") and hasattr(module, "eps"))


def find_modules(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The modules of these names in the checkpoint's files. Raises: ValueError for one that the model lacks."""
    known = dict(model.named_modules())
    known.update(_as_saved(model, known))
    base = getattr(model, "base_model_prefix", "")
    found = {}
    for name in names:
        # A bare model's file lacks the base model's prefix, a bare model (a tower by itself) lacks that of its file.
        spellings = [name, f"{base}.{name}", name.removeprefix(f"{base}."), name.partition(".")[2]]
        match = next((known[spelling] for spelling in spellings if spelling in known), None)
        if match is None:
            raise ValueError(f"{name}: the model has no such module; is it the model of this checkpoint?")
        found[name] = match
    return found


def _as_saved(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules under the names of their parameters in the checkpoint's files, where transformers renames them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    owners = {
        f"{path}.{name}": module
        for path, module in modules.items()
        for name, _ in module.named_parameters(recurse=False)
    }
    # Stand-ins of one element, told apart by identity.
    tokens = {name: torch.empty(1) for name in owners}
    try:
        saved = revert_weight_conversion(model, dict(tokens))
    except Exception:  # it may want to join tensors: not those of norms
        return {}
    by_token = {id(token): owners[name] for name, token in tokens.items()}
    return {name.rpartition(".")[0]: by_token[id(token)] for name, token in saved.items() if id(token) in by_token}


def _recenter(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    x, *others = inputs
    return (x - x.mean(-1, keepdim=True), *others)
