"""The paper's figure 5: GPT inference of 512 tokens by size, and training of Small and Medium in both coordinates, bfloat16.

Command:  python -m prenorm_jax.measure time configs/paper_gpt.py --out results/speed/paper_gpt.json
          again until it says that nothing is left; --only=training or --only=Small for a part
"""

from prenorm_jax.measure.study import Study
from prenorm_jax.measure.works import work

TRAINING = {"small": 16, "medium": 8}  # size -> sequences of 1024 tokens
INFERENCE = ("small", "medium", "large", "xl", "2.7b", "6.7b", "13b")


def get_study(arg: str = "") -> Study:
    """arg: none."""
    training = [
        work("gpt", size, batch, "training", coordinates)
        for size, batch in TRAINING.items()
        for coordinates in ("native", "pre_ln")
    ]
    inference = [work("gpt", size, 1, "inference", context=512) for size in INFERENCE]
    return Study("GPT", tuple(training + inference))
