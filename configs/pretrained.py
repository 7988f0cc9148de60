"""A checkpoint that `prenorm import` read: to evaluate it in every variant, or to train it further.

Command:  prenorm import SRC IMPORT
          python eval.py --config=configs/pretrained.py:IMPORT --config.data.root=DATA
          python train.py --config=configs/pretrained.py:IMPORT,norm=pre_rmsnorm --config.data.root=DATA
DATA:     for a ViT a folder with a folder of pictures for each class; for a GPT a text (read with the checkpoint's tokenizer.json), or
          token ids in a .npy or .bin file. To train: a folder with train and val of these.
Hardware, time, result: those of the checkpoint and the data.
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from configs import options
from prenorm_jax.interop import stored
from prenorm_jax.interop.tensors import FormatError
from prenorm_jax.models.config import ConfigError, ViTConfig


def get_config(arg: str = "") -> ConfigDict:
    """arg: the folder of the import, then norm=pre_ln (default), pre_rmsnorm or pre_crmsnorm, dtype=float32 (default) or bfloat16."""
    folder, _, rest = arg.partition(",")
    chosen = options.read_arg(rest, norm="pre_ln", dtype="float32")
    try:
        model = stored.describe(pathlib.Path(folder))
    except FormatError as error:
        raise ConfigError(f"config arg: {error}") from None
    is_vit = isinstance(model, ViTConfig)
    config = options.every_option("image_classification" if is_vit else "language_modelling")
    config.model.update({**dataclasses.asdict(model), **chosen, "param_dtype": "float32"})
    config.data.update({"name": "image_folder" if is_vit else "text", "processor": str(pathlib.Path(folder, "source"))})
    config.optimizer.update({"learning_rate": 3e-5, "warmup_steps": 100})
    config.train.update({"init_from": folder, "steps": 1000, "batch_size": 32, "eval_batch_size": 32 if is_vit else 4})
    return config
