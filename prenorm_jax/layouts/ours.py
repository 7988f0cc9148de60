"""The main branches of `prenorm_jax.models`."""

from prenorm_jax.main_branch import MainBranch, Norm, Reader, Writer

_BLOCKS_WRITE = [
    Writer("blocks/{i...}/attn/out/kernel", scale="blocks/{i...}/scale1/scale", scale_optional=True),
    Writer("blocks/{i...}/attn/out/bias", scale="blocks/{i...}/scale1/scale", scale_optional=True, optional=True),
    Writer("blocks/{i...}/mlp/down/kernel", scale="blocks/{i...}/scale2/scale", scale_optional=True),
    Writer("blocks/{i...}/mlp/down/bias", scale="blocks/{i...}/scale2/scale", scale_optional=True, optional=True),
]
_BLOCKS_READ = [
    Norm(
        [
            Reader(f"blocks/{{i...}}/attn/{name}/kernel", bias=f"blocks/{{i...}}/attn/{name}/bias")
            for name in ("query", "key", "value")
        ],
        scale="blocks/{i...}/norm1/scale",
        bias="blocks/{i...}/norm1/bias",
    ),
    Norm(
        [Reader("blocks/{i...}/mlp/up/kernel", bias="blocks/{i...}/mlp/up/bias")],
        scale="blocks/{i...}/norm2/scale",
        bias="blocks/{i...}/norm2/bias",
    ),
]
_HEAD_READS = Norm([Reader("head/kernel", bias="head/bias")], scale="norm/scale", bias="norm/bias")
# The heads together are as wide as the main branch, in all charts: that is where its nominal width can be read.
_WIDTH = ("blocks/{i...}/attn/out/kernel", -2)

VIT = MainBranch(
    writers=[
        Writer("patch/kernel"),
        Writer("patch/bias"),
        Writer("class/token", optional=True),
        Writer("distilled/token", optional=True),
        Writer("registers/table", optional=True),
        Writer("position/table", optional=True),
        *_BLOCKS_WRITE,
    ],
    norms=[*_BLOCKS_READ, _HEAD_READS],
    width=_WIDTH,
)
"""`prenorm_jax.models.vit`, looped or stacked; also the ViT of anybody who names the leaves so."""

GPT = MainBranch(
    writers=[Writer("embed/table"), Writer("position/table"), *_BLOCKS_WRITE],
    norms=[*_BLOCKS_READ, _HEAD_READS],
    width=_WIDTH,
)
"""`prenorm_jax.models.gpt` with a head of its own."""

GPT_TIED = MainBranch(
    writers=[Writer("position/table"), *_BLOCKS_WRITE],
    norms=[
        *_BLOCKS_READ,
        Norm(scale="norm/scale", bias="norm/bias", keep="tied table: its rows are read behind this affine"),
    ],
    others=["embed/table"],
    width=_WIDTH,
)
"""`prenorm_jax.models.gpt` whose head is its embedding table: the table stays, and the model recenters (or compresses) what it looks up."""
