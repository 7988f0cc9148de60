"""ViTs on ImageNet-1k from scratch with DeiT III's recipe (Touvron et al., 2022), which the paper trains S/16 with.

Command:  python train.py --config=configs/deit3.py:variant=S/16,norm=pre_crmsnorm --config.data.root=IMAGENET
          IMAGENET has train/n01440764/*.JPEG and val/n01440764/*.JPEG; with data=array_record the files that TensorFlow Datasets
          prepares (imagenet2012-train.array_record-*), with data=hugging_face a folder that datasets' save_to_disk wrote.
Hardware: eight GPUs, as DeiT III used: 256 images each, mixed precision. Not run here. docs/data.md has what the loader needs of CPUs.
Time:     at the S/16 step time of docs/performance.md (one H200) the 1.0e9 images of 800 epochs take some 26 GPU hours; not run here.
Result:   not run here. The paper: the curves of the three variants overlap. DeiT III's README: S/16 81.4 % top-1 at 224 pixels;
          B/16 83.8 %, L/16 84.9 %, H/14 85.2 %, which it trains at 192, 192 and 160 pixels and finetunes at 224: here all train at 224.

From DeiT III's training command: LAMB, binary cross entropy, batches of 2048 in which each image is three times, 800 epochs with 5 of
warm-up, weight decay 0.05, Mixup 0.8, CutMix 1.0, 3-Augment, colour jitter 0.3, LayerScale from 1e-4, stochastic depth and learning rate
by size; evaluation of the whole picture (crop ratio 1). It has no Ti and no G: these take S's values without stochastic depth, and H's.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import options
from prenorm_jax.models.config import vit_config

IMAGES, BATCH = 1_281_167, 2048
LEARNING_RATE = {"Ti": 4e-3, "S": 4e-3, "B": 3e-3, "L": 3e-3, "H": 3e-3, "G": 3e-3}
STOCHASTIC_DEPTH = {"Ti": 0.0, "S": 0.05, "B": 0.2, "L": 0.45, "H": 0.6, "G": 0.6}


def get_config(arg: str = "") -> ConfigDict:
    """arg: variant=S/16 (default; Ti, S, B, L, H or G, and the patch size), norm=pre_ln (default), pre_rmsnorm or pre_crmsnorm,
    data=image_folder (default), array_record or hugging_face, epochs=800 (default)."""
    chosen = options.read_arg(arg, variant="S/16", norm="pre_ln", data="image_folder", epochs="800")
    size = chosen["variant"].partition("/")[0]
    epochs = options.read_count("epochs", chosen["epochs"])
    config = options.every_option("image_classification")
    model = vit_config(chosen["variant"], norm=chosen["norm"], dtype="bfloat16", gelu="erf", positioned="patches")
    model = dataclasses.replace(model, layer_scale=True, layer_scale_init=1e-4, remat=size in ("H", "G"))
    config.model.update(dataclasses.asdict(model))
    config.data.update({"name": chosen["data"], "threads": 1, "workers": 14, "repeats": 3, "eval_crop": 1.0})
    config.data.update({"crop": "resized", "three_augment": True, "colour_jitter": 0.3, "mixup": 0.8, "cutmix": 1.0})
    per_epoch = IMAGES // BATCH  # as DeiT III counts, whose epochs see a third of all images three times
    config.optimizer.update({"name": "lamb", "learning_rate": LEARNING_RATE[size], "final_fraction": 2.5e-3})
    config.optimizer.update({"warmup_steps": 5 * per_epoch, "weight_decay": 0.05, "b2": 0.999, "eps": 1e-6})
    config.train.update({"steps": max(epochs, 6) * per_epoch, "batch_size": BATCH, "loss": "sigmoid"})
    config.train.update({"stochastic_depth": STOCHASTIC_DEPTH[size], "eval_batch_size": 1024})
    config.train.update({"log_every": 50, "eval_every": 10 * per_epoch, "checkpoint_every": 2 * per_epoch, "keep": 3})
    config.compare.enabled = False
    return config
