"""The paper's ViTs at ImageNet's shapes, 224 x 224 pixels and 1000 classes, on synthetic images: for timing, not for learning.

Command:  python train.py --config=configs/vit_i1k.py:variant=B/16,norm=pre_crmsnorm
Hardware: one H200 (JAX 0.11.2, bfloat16), 16 CPU cores.
Time:     68 s without the comparison of the variants; 56 to 60 ms a step of 256 images (docs/performance.md).
Result:   none to expect; the loss stays near ln 1000 = 6.9.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import options
from prenorm_jax.models.config import vit_config


def get_config(arg: str = "") -> ConfigDict:
    """arg: variant=S/16 (default; Ti, S, B, L, H or G, and the patch size), norm=pre_ln (default), pre_rmsnorm or pre_crmsnorm."""
    chosen = options.read_arg(arg, variant="S/16", norm="pre_ln")
    config = options.every_option("image_classification")
    config.model.update(dataclasses.asdict(vit_config(chosen["variant"], norm=chosen["norm"], dtype="bfloat16")))
    config.model.update({"scan_layers": True, "unroll": True})  # the fastest step; unroll=False for the largest sizes
    config.data.update({"name": "synthetic", "examples": 4096, "threads": 16})
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 20})
    config.train.update({"steps": 100, "batch_size": 256, "eval_batch_size": 256, "label_smoothing": 0.1})
    config.train.update({"log_every": 10, "eval_every": 0, "checkpoint_every": 0})
    return config
