"""Main branches of plain state dicts of HF transformers, {"transformer.h.0.ln_1.weight": array}: the usual members of families in `torch`.

    HF_TORCH_GPT2   GPT2LMHeadModel with a head of its own (`untie` makes one); the head gains a bias.
    HF_TORCH_VIT    ViTForImageClassification.

eps are the families' defaults. `prenorm convert` reads a checkpoint's config.json instead, and knows all of them.
"""

import dataclasses

from prenorm_jax.layouts import torch
from prenorm_jax.main_branch import MainBranch


def _plain(branch: MainBranch, eps: float, lacks: tuple[str, ...]) -> MainBranch:
    """The branch with this eps, less the rules whose patterns hold one of these words."""

    def there(pattern: str) -> bool:
        return not any(word in pattern for word in lacks)

    norms = [
        dataclasses.replace(norm, readers=[r for r in norm.readers if there(r.kernel)], eps=eps)
        for norm in branch.norms
        if there(norm.scale or "")
    ]
    return dataclasses.replace(branch, writers=[w for w in branch.writers if there(w.leaf)], norms=norms)


HF_TORCH_GPT2 = _plain(torch.HF_GPT2, 1e-5, ("cross", "score", "classifier", "qa_outputs"))
HF_TORCH_VIT = _plain(torch.HF_VIT, 1e-12, ("pooler", "mask_token"))
