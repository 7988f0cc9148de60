"""One Transformer, as somebody else would write it, with every choice that matters here as a field; and its description.

`foreign_linen` and `foreign_nnx` build it, with the same leaves, in their library's own modules.
"""

import dataclasses

import numpy as np

from prenorm_jax import MainBranch, Norm, Reader, Writer

VOCABULARY = 11
CLASSES = 5
EXPERTS = 3
SIDE = 4  # of an image, in pixels
EMBED_EPS, BLOCK_EPS, FINAL_EPS = 1e-1, 3e-2, 1e-2  # far apart, and large enough that a wrong one shows


@dataclasses.dataclass(frozen=True)
class Config:
    """A Transformer. `width` is the lanes of its main branch as built, `nominal` their number before any compression."""

    width: int = 8
    nominal: int = 8
    depth: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 3
    mlp_width: int = 10
    scan: bool = False  # layers stacked
    remat: bool = False
    norm_scale: bool = True
    norm_bias: bool = True
    reader_bias: bool = True
    parallel: bool = False  # attention and mlp behind one norm
    qkv: str = "heads"  # "heads": (d, heads, head_dim) kernels; "fused": (d, 3, heads, head_dim); "flat": (d, heads * head_dim)
    qk_norm: bool = False
    mlp: str = "plain"  # "plain", "gated", "experts"
    patches: bool = False  # images through a convolution, instead of tokens
    extra: tuple[str, ...] = ()  # of "class", "distillation", "register"
    positions: str = "none"  # "none", "learned", "constant"
    positions_last: bool = False  # added after the extra tokens have joined
    segments: bool = False
    layer_scale: bool = False
    drop_path: float = 0.0
    dropout: float = 0.0
    lora: int = 0  # rank of the writers' adapters
    tied: bool = False
    embed_norm: bool = False
    pool: str = "none"  # "none": logits of each token; "first"; "mean": before the final norm; "mean after"
    heads_read: int = 1  # how many heads read the final norm
    final_norms: int = 1  # 2: one for the first token, one for the mean, one head behind both
    cross: bool = False  # a decoder, reading an encoder's output
    headless: bool = False  # an encoder: its output is that of its final norm

    @property
    def written(self) -> int:
        """Width of what a residual branch writes: not that of the main branch, where it is recentered afterwards."""
        return self.nominal if self.dropout else self.width

    @property
    def embedded(self) -> int:
        return self.nominal if self.embed_norm else self.width

    @property
    def inputs(self) -> int:
        """Tokens that come from outside."""
        return (SIDE // 2) ** 2 if self.patches else 4

    @property
    def tokens(self) -> int:
        return self.inputs + len(self.extra)


def sincos(length: int, width: int) -> np.ndarray:
    """Fixed positions: a constant with a mean."""
    angle = np.arange(length)[:, None] / 7.0 ** (np.arange(width) / width)[None]
    return np.where(np.arange(width)[None] % 2 == 0, np.sin(angle), np.cos(angle))


def describe(c: Config, *, bias: bool = True, prefix: str = "", readers: tuple[Reader, ...] = ()) -> MainBranch:
    """The main branch of a config's parameters.

    Args:
      bias: whether readers may gain a bias; else a norm with a beta keeps its affine.
      prefix: of all paths.
      readers: further readers of the final norm.
    """
    block = f"{prefix}blocks/{{i...}}/"
    scales = {f"{block}attn": f"{block}scale1", f"{block}mlp": f"{block}scale2"} if c.layer_scale else {}

    def reader(path, axis=-2, kernel="/kernel", bias_name="/bias"):
        return Reader(path + kernel, axis, path + bias_name if bias else None)

    def norm(path, *readers, keep=None):
        return Norm(readers, f"{path}/scale", f"{path}/bias", keep=keep, module=path)

    def linear(path, scale=None):
        leaves = ["kernel", "bias", *["lora_b"] * bool(c.lora)]
        return [Writer(f"{path}/{leaf}", scale=scale) for leaf in leaves]

    def attention_readers(name):
        if c.qkv == "fused":
            return [reader(f"{block}{name}/qkv", -4)]
        axis = -2 if c.qkv == "flat" else -3
        return [reader(f"{block}{name}/{part}", axis) for part in ("query", "key", "value")]

    mlp_reads = {
        "plain": [reader(f"{block}mlp/up")],
        "gated": [reader(f"{block}mlp/gate"), reader(f"{block}mlp/up")],
        "experts": [reader(f"{block}mlp/router"), reader(f"{block}mlp/", kernel="up", bias_name="up_bias")],
    }[c.mlp]
    mlp_writes = {
        "plain": linear(f"{block}mlp/down", scales.get(f"{block}mlp")),
        "gated": linear(f"{block}mlp/down", scales.get(f"{block}mlp")),
        "experts": [Writer(f"{block}mlp/{leaf}", scale=scales.get(f"{block}mlp")) for leaf in ("down", "down_bias")],
    }[c.mlp]
    block_writes = linear(f"{block}attn/out", scales.get(f"{block}attn")) + mlp_writes
    attention = attention_readers("attn")
    norms = [norm(f"{block}norm1", *attention, *mlp_reads if c.parallel else ())]
    norms += [] if c.parallel else [norm(f"{block}norm2", *mlp_reads)]
    others = [f"{block}{name}/lora_a" for name in ("attn/out", "mlp/down")] if c.lora else []
    others += [f"{block}attn/{name}_norm/scale" for name in ("query", "key")] if c.qk_norm else []
    recentered = []
    if c.cross:
        block_writes += linear(f"{block}cross/out")
        norms += [norm(f"{block}norm3", attention_readers("cross")[0])]
    if c.dropout:
        others += [writer.leaf for writer in block_writes]
        block_writes = []
        recentered += [f"{block}drop1", f"{block}drop2"]

    start = [f"{prefix}patch/kernel", f"{prefix}patch/bias"] if c.patches else [f"{prefix}embed/embedding"]
    start += [f"{prefix}{name}" for name in c.extra]
    start += [f"{prefix}position"] if c.positions == "learned" else []
    start += [f"{prefix}segment/embedding"] if c.segments else []
    if c.embed_norm:
        others += [*start, f"{prefix}embed_norm/scale", f"{prefix}embed_norm/bias"]
        start, recentered = [], [*recentered, f"{prefix}embed_norm"]
    elif c.positions == "constant":
        recentered += [f"{prefix}sincos"]
    if c.tied:
        others += [f"{prefix}embed/embedding"]
        start, recentered = [leaf for leaf in start if "embed/" not in leaf], [*recentered, f"{prefix}embed"]
        norms += [norm(f"{prefix}norm", keep="tied table: its rows are read behind this affine")]
    elif c.final_norms == 2:
        keep = "one head behind two norms" if c.norm_scale or c.norm_bias else None
        norms += [norm(f"{prefix}{name}", reader(f"{prefix}head"), keep=keep) for name in ("norm", "norm_too")]
    else:
        heads = [] if c.headless else [reader(f"{prefix}head{k or ''}") for k in range(c.heads_read)]
        norms += [norm(f"{prefix}norm", *heads, *readers)]
    return MainBranch([*map(Writer, start), *block_writes], norms, others, c.nominal, recentered)


def cross_readers(c: Config, prefix: str, *, bias: bool = True) -> tuple[Reader, ...]:
    """What reads an encoder's output in a decoder: keys and values of every layer's cross attention."""
    path, axis = f"{prefix}blocks/{{i...}}/cross/", -2 if c.qkv == "flat" else -3
    return tuple(
        Reader(f"{path}{name}/kernel", axis, f"{path}{name}/bias" if bias else None) for name in ("key", "value")
    )
