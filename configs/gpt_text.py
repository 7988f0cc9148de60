"""GPTs of the paper's sizes on tokens: a text such as wikitext-103, which the paper trains Small on, or nanoGPT's OpenWebText.

Data:     python -m prenorm_jax.training.prepare wiki.train.raw --val wiki.valid.raw --tokenizer tokenizer.json --out WIKITEXT
          with GPT-2's tokenizer.json, or a folder with train.bin and val.bin as nanoGPT's data/openwebtext/prepare.py writes them.
Command:  python train.py --config=configs/gpt_text.py:corpus=wikitext,size=small,norm=pre_rmsnorm --config.data.root=WIKITEXT
          python train.py --config=configs/gpt_text.py:corpus=openwebtext,size=small --config.data.root=OPENWEBTEXT
Hardware: wikitext: one GPU of 80 GB. openwebtext: eight of them, as nanoGPT used. Not run here.
Time:     at the step time of docs/performance.md (GPT Small, one H200): wikitext 0.4 hours, openwebtext 168 GPU hours; not run here.
Result:   not run here. The paper: the curves of the three variants overlap. nanoGPT's README reports a validation loss of 2.85 for
          GPT Small on OpenWebText after these 600,000 steps of half a million tokens (4 days on eight A100 of 40 GB).

openwebtext is nanoGPT's schedule (config/train_gpt2.py): 480 x 1024 tokens a step, 6e-4 down to 6e-5, 2,000 steps of warm-up. wikitext is
ours: five and a half epochs. Larger sizes take GPT-3's learning rates (Brown et al., 2020, table 2.1).
"""

import dataclasses

from ml_collections import ConfigDict

from configs import options
from prenorm_jax.models.config import gpt_config

LEARNING_RATE = {
    "small": 6e-4,
    "medium": 3e-4,
    "large": 2.5e-4,
    "xl": 2e-4,
    "2.7b": 1.6e-4,
    "6.7b": 1.2e-4,
    "13b": 1e-4,
}
CORPORA = {
    "wikitext": ({"steps": 20_000, "batch_size": 32, "eval_every": 1000, "checkpoint_every": 1000}, 1000),
    "openwebtext": (
        {"steps": 600_000, "batch_size": 480, "accumulate": 6, "eval_every": 2000, "checkpoint_every": 2000},
        2000,
    ),
}


def get_config(arg: str = "") -> ConfigDict:
    """arg: corpus=wikitext (default) or openwebtext, size=small (default), medium, large, xl, 2.7b, 6.7b or 13b, norm=pre_ln (default),
    pre_rmsnorm or pre_crmsnorm."""
    chosen = options.read_arg(arg, corpus="wikitext", size="small", norm="pre_ln")
    schedule, warmup_steps = CORPORA[options.read_word(chosen["corpus"], *CORPORA)]
    config = options.every_option("language_modelling")
    model = gpt_config(chosen["size"], norm=chosen["norm"], dtype="bfloat16")
    # Beyond Large, recomputing a block costs less than what it would keep.
    model = dataclasses.replace(model, remat=model.depth > 24 or model.width > 1536)
    config.model.update(dataclasses.asdict(model))
    config.data.update({"name": "text", "threads": 4})
    config.optimizer.update({"learning_rate": LEARNING_RATE[chosen["size"]], "final_fraction": 0.1})
    config.optimizer.update({"warmup_steps": warmup_steps, "b2": 0.95, "weight_decay": 0.1})
    config.train.update({**schedule, "eval_batch_size": 16, "eval_examples": 512, "log_every": 20})
    config.compare.enabled = False
    return config
