"""Main branches of Haiku models: flat dicts of modules, "transformer/h0_attn/linear" to {"w", "b"}; every eps is hk.LayerNorm's default.

HAIKU_GPT       dm-haiku's examples/transformer as it was for years: blocks of h0_ln_1, h0_attn, h0_ln_2, h0_mlp, then ln_f.
HAIKU_VIT       a ViT of those blocks: a patch convolution, "cls" and "pos_embs".
haiku_gpt(n)    that example as it is now: modules without names of their own, told apart by Haiku's counters (layer_norm_5,
                linear_4), which no pattern follows from layer to layer; so each layer has its own rules.
"""

from prenorm_jax.layouts.words import HAIKU
from prenorm_jax.main_branch import MainBranch, Reader, Writer

EPS = 1e-5


def _heads(path: str) -> list[Reader]:
    """hk.MultiHeadAttention's maps of what it attends from and to; its output map is called linear."""
    return [HAIKU.reader(f"{path}/{name}") for name in ("query", "key", "value")]


_BLOCK = "transformer/h{i}"
_BLOCKS_WRITE = [*HAIKU.writer(f"{_BLOCK}_attn/linear"), *HAIKU.writer(f"{_BLOCK}_mlp/linear_1")]
_READ = [
    HAIKU.norm(f"{_BLOCK}_ln_1", _heads(f"{_BLOCK}_attn"), EPS),
    HAIKU.norm(f"{_BLOCK}_ln_2", [HAIKU.reader(f"{_BLOCK}_mlp/linear")], EPS),
    HAIKU.norm("transformer/ln_f", [HAIKU.reader("linear")], EPS),
]
HAIKU_GPT = MainBranch([Writer("embed/embeddings"), Writer("~/pos_embs"), *_BLOCKS_WRITE], _READ)
HAIKU_VIT = MainBranch(
    [*HAIKU.writer("conv2_d"), Writer("~/cls", optional=True), Writer("~/pos_embs"), *_BLOCKS_WRITE], _READ
)


def haiku_gpt(layers: int) -> MainBranch:
    """The main branch of dm-haiku's examples/transformer/model.py with so many layers.

    >>> [norm.scale for norm in haiku_gpt(1).norms]
    ['transformer/layer_norm/scale', 'transformer/layer_norm_1/scale', 'transformer/layer_norm_2/scale']
    """

    def module(name: str, count: int) -> str:
        return f"transformer/{name}" + (f"_{count}" if count else "")

    writers = [Writer("language_model/embed/embeddings"), Writer("language_model/positional_embeddings")]
    norms = []
    for i in range(layers):
        attention = module("multi_head_attention", i)
        writers += [*HAIKU.writer(f"{attention}/linear"), *HAIKU.writer(module("linear", 2 * i + 1))]
        norms += [
            HAIKU.norm(module("layer_norm", 2 * i), _heads(attention), EPS),
            HAIKU.norm(module("layer_norm", 2 * i + 1), [HAIKU.reader(module("linear", 2 * i))], EPS),
        ]
    norms.append(HAIKU.norm(module("layer_norm", 2 * layers), [HAIKU.reader("language_model/linear")], EPS))
    return MainBranch(writers, norms)
