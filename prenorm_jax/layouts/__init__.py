"""The main branches of the models that we know: data, in the words of `main_branch`."""

from prenorm_jax.layouts.ours import GPT, GPT_TIED, VIT

__all__ = ["GPT", "GPT_TIED", "VIT"]
