"""timm brings torchvision, and transformers imports it where it is there. None of its compiled operators is needed here; where they are
of another build than torch and so don't load, their names do."""

import torch

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _OPERATORS.define(f"{_name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
