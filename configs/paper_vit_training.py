"""The paper's figure 4: ViT training by size, in both coordinates, every form and both controls, bfloat16, AdamW.

Command:  python -m prenorm_jax.measure time configs/paper_vit_training.py --out results/speed/paper_vit_training.json
          again until it says that nothing is left; --only=B/16 for one size
"""

from prenorm_jax.measure.study import Study
from prenorm_jax.measure.works import work

BATCHES = {"B/16": 256, "S/16": 512, "Ti/16": 512, "L/16": 128, "H/14": 64}


def get_study(arg: str = "") -> Study:
    """arg: none."""
    works = [
        work("vit", size, batch, "training", coordinates)
        for size, batch in BATCHES.items()
        for coordinates in ("native", "pre_ln")
    ]
    return Study("ViT training", tuple(works))
