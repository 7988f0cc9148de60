"""A converted model with RMSNorm in place of the LayerNorms that its prenorm.json lists."""

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) + bias."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        x = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))
        return x if self.bias is None else x + self.bias


def with_rms_norm(model: nn.Module, manifest: dict, recenter: bool = True) -> nn.Module:
    """The same model, changed. Raises where the manifest speaks of a norm that the model does not have, or with another eps."""
    base = f"{model.base_model_prefix}."  # a model without its head lacks it
    saved = revert_weight_conversion(model, dict(model.state_dict()))
    name_of = {leaf.data_ptr(): name.removesuffix(".weight").removeprefix(base) for name, leaf in saved.items()}
    found = {path.removeprefix(base): path for path, _ in model.named_modules()} | {
        name_of[module.weight.data_ptr()]: path
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.weight.data_ptr() in name_of
    }
    for name, norm in manifest["norms"].items():
        path = found[name.removeprefix(base)]
        module = model.get_submodule(path)
        assert module.eps == norm["eps"], name
        if norm["converted"]:
            model.set_submodule(path, RMSNorm(module))
    for entry in manifest["recenter"] if recenter else ():
        model.get_submodule(found[entry["module"].removeprefix(base)]).register_forward_pre_hook(
            lambda module, args: (args[0] - args[0].mean(-1, keepdim=True), *args[1:])
        )
    return model
