"""A byte-level GPT of 25.6 million parameters on the source of the Python standard library.

Command:  python train.py --config=configs/stdlib.py:norm=pre_rmsnorm
Hardware: one GPU, bfloat16.
Time:     3 minutes on one H200 that six such runs share, with evaluations and checkpoints (JAX 0.11.2).
Result:   1.033 bits per byte on held-out files (Python 3.12's library), 1.035 with another seed; docs/learning.md has the variants.
          Twice as many steps overfit.
"""

from ml_collections import ConfigDict

from configs import options


def get_config(arg: str = "") -> ConfigDict:
    """arg: norm=pre_ln (default), pre_rmsnorm or pre_crmsnorm: the variant that is trained."""
    config = options.every_option("language_modelling")
    config.data.name = "stdlib"
    config.model.norm = options.read_arg(arg, norm="pre_ln")["norm"]
    config.model.update({"context": 512, "vocab_size": 256, "dtype": "bfloat16"})
    config.model.update({"width": 512, "depth": 8, "heads": 8, "mlp_width": 2048, "scan_layers": True, "unroll": True})
    config.optimizer.update({"learning_rate": 1e-3, "final_fraction": 0.1, "warmup_steps": 200})
    config.train.update({"steps": 3000, "batch_size": 32, "eval_batch_size": 64, "eval_examples": 512})
    config.train.update({"log_every": 20, "eval_every": 200, "checkpoint_every": 500})
    return config
