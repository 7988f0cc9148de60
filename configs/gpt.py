"""The paper's GPT sizes, 1024 tokens of a vocabulary of 50257, on synthetic tokens: for timing, not for learning.

Command:  python train.py --config=configs/gpt.py:size=small,norm=pre_rmsnorm
Hardware: one H200 (JAX 0.11.2, bfloat16).
Time:     66 s without the comparison of the variants; 28 to 30 ms a step of 16 x 1024 tokens (docs/performance.md).
Result:   none to expect; the loss stays near ln 50257 = 10.8.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import options
from prenorm_jax.models.config import gpt_config


def get_config(arg: str = "") -> ConfigDict:
    """arg: size=small (default), medium, large, xl, 2.7b, 6.7b or 13b; norm=pre_ln (default), pre_rmsnorm or pre_crmsnorm."""
    chosen = options.read_arg(arg, size="small", norm="pre_ln")
    config = options.every_option("language_modelling")
    config.model.update(dataclasses.asdict(gpt_config(chosen["size"], norm=chosen["norm"], dtype="bfloat16")))
    config.model.update({"scan_layers": True, "unroll": True})  # the fastest step; unroll=False for the largest sizes
    config.data.update({"name": "synthetic", "examples": 4096, "threads": 4})
    config.optimizer.update({"learning_rate": 6e-4, "final_fraction": 0.1, "warmup_steps": 20})
    config.train.update({"steps": 100, "batch_size": 16, "eval_batch_size": 16})
    config.train.update({"log_every": 10, "eval_every": 0, "checkpoint_every": 0})
    return config
