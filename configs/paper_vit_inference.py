"""The paper's table 3: ViT inference by size and batch, every form and both controls, bfloat16.

Command:  python -m prenorm_jax.measure time configs/paper_vit_inference.py --out results/speed/paper_vit_inference.json
          again until it says that nothing is left; --only=B/16 for one size
"""

from prenorm_jax.measure.study import Study
from prenorm_jax.measure.works import work

SIZES = ("Ti/16", "S/16", "B/16", "L/16", "H/14", "G/14")
BATCHES = (1, 4, 16, 64, 256, 1024)


def get_study(arg: str = "") -> Study:
    """arg: none."""
    works = [work("vit", size, batch, "inference") for size in SIZES for batch in BATCHES]
    return Study("ViT inference", tuple(works), window_seconds=0.4)
