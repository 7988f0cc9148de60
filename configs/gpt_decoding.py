"""Text one token at a time: GPT decoding behind a full cache, by size and batch, every form and both controls, bfloat16.

Command:  python -m prenorm_jax.measure time configs/gpt_decoding.py --out results/speed/gpt_decoding.json
"""

from prenorm_jax.measure.study import Study
from prenorm_jax.measure.works import work

SIZES = ("small", "medium", "xl")
BATCHES = (1, 64)  # sequences, each with a cache of its context


def get_study(arg: str = "") -> Study:
    """arg: none."""
    works = [work("gpt", size, batch, "decoding", context=1024) for size in SIZES for batch in BATCHES]
    return Study("GPT decoding", tuple(works), window_seconds=0.4)
