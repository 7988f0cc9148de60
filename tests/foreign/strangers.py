"""Models that a stranger may bring, as data: each a body for `programs`, with the description that one would write of it.

`EXACT` ones convert; `REFUSED` ones are no Pre-LN models, or no description fits them, and whoever describes them the natural way is told
what is wrong, where and why. `MISDESCRIBED`: a model that converts, and the ways of describing it wrongly.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax import MainBranch, Norm, Reader, Writer

CLASSES = 5
ALL = ("rms", "reflect", "drop", "packed")


@dataclasses.dataclass(frozen=True)
class Stranger:
    """A body, its description and what becomes of it: `forms` that are exact, or (`says`) what a refusal says.

    `decided`: whether fn alone can't show that the description is right, so that `check` asks for a converted function.
    `by`: what refuses it: the description itself, `check`, or `converted` (check, where it is given that).
    """

    body: Callable
    spec: MainBranch
    forms: tuple[str, ...] = ALL
    decided: bool = False
    says: str = ""
    by: str = "check"


# Words of the descriptions.


def linear(path, **fields):
    return [Writer(f"{path}/kernel", **fields), Writer(f"{path}/bias", **fields)]


def dense(path):
    return Reader(f"{path}/kernel", bias=f"{path}/bias")


def norm(path, *readers, keep=None, **fields):
    readers = [reader if isinstance(reader, Reader) else dense(reader) for reader in readers]
    return Norm(readers, f"{path}/scale", f"{path}/bias", keep=keep, module=path, **fields)


def mlp_spec(*writers, norms=(), layers=("0", "1"), **fields):
    """The description of `transformer`."""
    blocks = [norm(f"norm{k}", f"up{k}") for k in layers]
    down = [writer for k in layers for writer in linear(f"down{k}")]
    return MainBranch([Writer("embed/embedding"), *down, *writers], [*blocks, *norms, norm("norm", "head")], **fields)


# Words of the bodies.


def mlp(net, x, name, **affine):
    return net.linear(
        f"down{name}", jnp.tanh(net.linear(f"up{name}", net.norm(f"norm{name}", x, **affine), 10)), net.width
    )


def head(net, x):
    return net.linear("head", net.norm("norm", x), CLASSES)


def transformer(net, ids, change=lambda net, x: x):
    x = net.embed("embed", ids)
    x = x + mlp(net, x, "0")
    x = change(net, x)
    return head(net, x + mlp(net, x, "1"))


EXACT, REFUSED = {}, {}


def exact(name, spec, **fields):
    def register(body):
        EXACT[name] = Stranger(body, spec, **fields)
        return body

    return register


def refused(name, says, spec, **fields):
    def register(body):
        REFUSED[name] = Stranger(body, spec, says=says, **fields)
        return body

    return register


# Exact.


@exact("one norm, used at two places", mlp_spec(norms=[norm("norm2", "up2", "up3")]))
def _(net, ids):
    def twice(net, x):
        for up in ("up2", "up3"):
            x = x + net.linear("down0", jnp.tanh(net.linear(up, net.norm("norm2", x), 10)), net.width)
        return x

    return transformer(net, ids, twice)


@exact(
    "one norm, shared by two streams",
    MainBranch(
        [Writer("embed/embedding"), Writer("image/embedding"), *linear("down0"), *linear("down1")],
        [norm("norm0", "up0", "up1"), norm("norm", "head")],
    ),
)
def _(net, ids):
    streams = net.embed("embed", ids), net.embed("image", ids)
    written = [
        x + net.linear(f"down{k}", jnp.tanh(net.linear(f"up{k}", net.norm("norm0", x), 10)), net.width)
        for k, x in enumerate(streams)
    ]
    return [head(net, x) for x in written]


@exact(
    "one table, two streams",
    MainBranch(
        [Writer("embed/embedding"), *linear("down0")],
        [norm("norm0", "up0"), norm("norm", "head"), norm("norm_too", "head_too")],
    ),
)
def _(net, ids):
    x, y = net.embed("embed", ids), 0.5 * net.embed("embed", (ids + 1) % 7)
    return head(net, x + mlp(net, x, "0")), net.linear("head_too", net.norm("norm_too", y), CLASSES)


@exact(
    "gated attention outputs",
    mlp_spec(
        Writer("out"),
        norms=[norm("norm2", "value", "gate", "gate_of_all")],
    ),
)
def _(net, ids):
    def attention(net, x):
        n = net.norm("norm2", x)
        value = net.linear("value", n, 6) * jax.nn.sigmoid(net.linear("gate", n, 6))
        return x + jax.nn.sigmoid(net.linear("gate_of_all", n, 1)) * (value @ net.leaf("out", 6, net.width))

    return transformer(net, ids, attention)


@exact("a writer used twice", mlp_spec(norms=[norm("norm2", "up2")]))
def _(net, ids):
    def again(net, x):
        return x + net.linear("down0", jnp.sin(net.linear("up2", net.norm("norm2", x), 10)), net.width)

    return transformer(net, ids, again)


@exact("one block, used at every depth", mlp_spec(layers=["0"]))
def _(net, ids):
    x = net.embed("embed", ids)
    for _ in range(3):
        x = x + mlp(net, x, "0")
    return head(net, x)


MIDDLE = Reader("query", axis=-2, bias="query_bias"), Reader("value", axis=-2, bias="value_bias")


@exact(
    "kernels with the main branch's axis in the middle",
    mlp_spec(Writer("out", axis=-2), norms=[norm("norm2", *MIDDLE)]),
)
def _(net, ids):
    def attention(net, x):
        n = net.norm("norm2", x)
        q, v = (
            jnp.einsum("bld,hdk->blhk", n, net.leaf(name, 2, net.width, 3)) + net.leaf(f"{name}_bias", 2, 3)[None, None]
            for name in ("query", "value")
        )
        return x + jnp.einsum("blhk,hdk->bld", jnp.tanh(q) * v, net.leaf("out", 2, net.width, 3))

    # packed, the biases are a row of their kernels, and a model that declares them itself has to know
    return transformer(net, ids, attention)


EXACT["kernels with the main branch's axis in the middle"] = dataclasses.replace(
    EXACT["kernels with the main branch's axis in the middle"], forms=ALL[:3]
)


@exact(
    "a bias of the output for each head",
    mlp_spec(Writer("out"), Writer("out_bias"), norms=[norm("norm2", "value")]),
)
def _(net, ids):
    def attention(net, x):
        v = net.linear("value", net.norm("norm2", x), 6)
        heads = jnp.einsum("blhk,hkd->blhd", jnp.tanh(v).reshape(*v.shape[:2], 2, 3), net.leaf("out", 2, 3, net.width))
        return x + (heads + net.leaf("out_bias", 2, net.width)[None, None]).sum(axis=2)

    return transformer(net, ids, attention)


@exact(
    "a norm at the end of a branch",
    mlp_spec(
        norms=[norm("norm2", "up2")],
        others=[MainBranch(linear("down2"), [norm("after", keep="its output is recentered")])],
        recentered=["after"],
    ),
    decided=True,
)
def _(net, ids):
    def sandwich(net, x):
        y = net.linear("down2", jnp.tanh(net.linear("up2", net.norm("norm2", x), 10)), net.nominal)
        return x + net.norm("after", y)

    return transformer(net, ids, sandwich)


@exact(
    "a linear map from a norm to the main branch",
    mlp_spec(*linear("straight"), norms=[norm("norm2", "straight")]),
    forms=ALL[:3],
)
def _(net, ids):
    return transformer(net, ids, lambda net, x: x + net.linear("straight", net.norm("norm2", x), net.width))


@exact(
    "a projection from a narrower table, scaled",
    MainBranch(
        [*linear("project"), *linear("down0")],
        [norm("norm0", "up0"), norm("norm", "head")],
        others=["embed/embedding"],
    ),
)
def _(net, ids):
    x = net.linear("project", net.embed("embed", ids, width=4), net.width) * 3
    return head(net, 0.5 * x + mlp(net, x, "0"))


@exact("tokens as one-hot rows", mlp_spec(Writer("table"), layers=["0"], others=[]))
def _(net, ids):
    x = net.embed("embed", ids) + jax.nn.one_hot(ids, 7, dtype=float) @ net.leaf("table", 7, net.width)
    return head(net, x + mlp(net, x, "0"))


@exact(
    "a norm whose output is returned",
    MainBranch(
        [Writer("embed/embedding"), *linear("down0")],
        [norm("norm0", "up0"), norm("norm", keep="its output is returned")],
    ),
    decided=True,
)
def _(net, ids):
    x = net.embed("embed", ids)
    return net.norm("norm", x + mlp(net, x, "0"))


@exact(
    "similarities of normalised tokens",
    mlp_spec(norms=[norm("norm2", keep="read by itself")]),
    decided=True,
)
def _(net, ids):
    def similar(net, x):
        n = net.norm("norm2", x)
        return x + jax.nn.softmax(jnp.einsum("bld,bmd->blm", n, n)) @ x

    return transformer(net, ids, similar)


@exact("tokens that are mixed, masked and routed", mlp_spec(Writer("mask")))
def _(net, ids):
    def change(net, x):
        x = jnp.where((ids % 2 == 0)[..., None], x, net.leaf("mask", net.width).reshape(1, 1, -1))
        mixed = jnp.concatenate([x[:, :1].mean(axis=1, keepdims=True), x[:, 1:][:, ::-1]], axis=1)
        return mixed + jnp.roll(x, 1, axis=1)

    return transformer(net, ids, change)


@exact(
    "channels mixed with those of another token, in front of a reader",
    mlp_spec(norms=[norm("norm2", "up2")], others=["mix"]),
    forms=("rms",),
    decided=True,
)
def _(net, ids):
    def shift(net, x):
        n, mix = net.norm("norm2", x), net.leaf("mix", net.nominal).reshape(1, 1, -1)
        read = net.linear("up2", n * mix + jnp.roll(n, 1, axis=1) * (1 - mix), 10)
        return x + net.linear("down0", jnp.tanh(read), net.width)

    return transformer(net, ids, shift)


# Refused.


@refused("Post-LN with affine", r"norm0/scale: .*goes back to the main branch \(Post-LN\)", mlp_spec())
def _(net, ids):
    x = net.norm("norm0", net.embed("embed", ids))
    x = net.norm("norm1", x + net.linear("down0", jnp.tanh(net.linear("up0", x, 10)), net.width))
    x = net.norm("norm", x + net.linear("down1", jnp.tanh(net.linear("up1", x, 10)), net.width))
    return net.linear("head", x, CLASSES)


@refused("residual taken behind the norm", r"norm0/scale: .*\(Post-LN\)", mlp_spec())
def _(net, ids):
    x = net.embed("embed", ids)
    for k in "01":
        n = net.norm(f"norm{k}", x)
        x = n + net.linear(f"down{k}", jnp.tanh(net.linear(f"up{k}", n, 10)), net.width)
    return head(net, x)


@refused(
    "a norm at the end of a branch, taken for one in front of it",
    r"up0/kernel \(axis -2\) .*: reads the main branch raw",
    mlp_spec(),
)
def _(net, ids):
    x = net.embed("embed", ids)
    for k in "01":
        x = x + net.norm(f"norm{k}", net.linear(f"down{k}", jnp.tanh(net.linear(f"up{k}", x, 10)), net.width))
    return head(net, x)


@refused(
    "Post-LN without affine",
    r"more than the described writers and readers touches the main branch: a constant or a norm's output",
    MainBranch(
        [Writer("embed/embedding"), *linear("down0")],
        [Norm([dense("up0"), dense("up1")], module="norm0"), Norm([dense("head")], module="norm")],
        others=["down1/*"],
    ),
)
def _(net, ids):
    n = net.norm("norm0", net.embed("embed", ids), scale=False, bias=False)
    x = n * jnp.arange(net.nominal).reshape(1, 1, -1)  # what has no leaf can't be named
    x = x + net.linear("down0", jnp.tanh(net.linear("up0", n, 10)), net.width)
    y = net.linear("down1", jnp.tanh(net.linear("up1", n, 10)), 1)
    return net.linear("head", net.norm("norm", x, scale=False, bias=False), CLASSES), y


@refused(
    "a gate for each channel of the main branch",
    r"gate \(axis -1\): a gate or a scale for each channel, between what embed/embedding writes and a norm",
    mlp_spec(others=["gate"]),
)
def _(net, ids):
    return transformer(net, ids, lambda net, x: x * net.leaf("gate", net.width).reshape(1, 1, -1))


@refused(
    "a gate for each channel, made of the data",
    r"gate/bias \(axis -1\) and gate/kernel \(axis -1\): a gate or a scale for each channel, between what down2/kernel",
    mlp_spec(*linear("down2"), norms=[norm("norm2", "up2", "gate")]),
)
def _(net, ids):
    def gated(net, x):
        n = net.norm("norm2", x)
        y = net.linear("down2", jnp.tanh(net.linear("up2", n, 10)), net.width)
        return x + jax.nn.sigmoid(net.linear("gate", n, net.width)) * y

    return transformer(net, ids, gated)


@refused(
    "a non-linear function between writer and norm",
    r"embed/embedding .*described as a writer.*a non-linear function",
    mlp_spec(),
)
def _(net, ids):
    return transformer(net, ids, lambda net, x: jnp.sin(x))


@refused(
    "a branch that ends with a non-linear function",
    r"down2/kernel .*described as a writer.*a non-linear function",
    mlp_spec(*linear("down2"), norms=[norm("norm2", "up2")]),
)
def _(net, ids):
    def branch(net, x):
        return x + jnp.tanh(net.linear("down2", net.linear("up2", net.norm("norm2", x), 10), net.width))

    return transformer(net, ids, branch)


@refused("a raw reader", r"probe/kernel \(axis -2\): reads the main branch raw", mlp_spec(others=["probe/*"]))
def _(net, ids):
    x = net.embed("embed", ids)
    x = x + mlp(net, x, "0") + mlp(net, x, "1")
    return head(net, x), net.linear("probe", x, 3)


@refused(
    "a raw reader that writes: a convolution of positions",
    r"mix \(axis -2\): reads the main branch raw",
    mlp_spec(Writer("mix")),
)
def _(net, ids):
    return transformer(net, ids, lambda net, x: x + jnp.roll(x, 1, axis=1) @ net.leaf("mix", net.width, net.width))


@refused("hidden states that are returned", r"embed/embedding .*: 1 of 2 outputs do .*returned un-normed", mlp_spec())
def _(net, ids):
    seen = []

    def keep(net, x):
        seen.append(x)
        return x

    return transformer(net, ids, keep), seen[0]


@refused(
    "an RMSNorm model",
    r"embed/embedding .*is it an RMSNorm model already",
    MainBranch([Writer("embed/embedding")], [Norm([dense("head")], scale="norm/scale", module="norm")]),
)
def _(net, ids):
    return net.linear("head", net.rms_norm("norm", net.embed("embed", ids)), CLASSES)


@refused(
    "a norm over tokens that are joined",
    r"found several: 8 in embed/embedding .*; 16 in merge/kernel",
    MainBranch(
        [Writer("embed/embedding"), *linear("down0")],
        [norm("norm0", "up0"), norm("joint", "merge")],
    ),
    by="description",
)
def _(net, ids):
    x = net.embed("embed", ids)
    x = x + mlp(net, x, "0")
    return net.linear("merge", net.norm("joint", x.reshape(x.shape[0], -1, 2 * x.shape[-1])), CLASSES)


@refused(
    "a norm over tokens that are joined, passed over in silence",
    r"merge/kernel \(axis -2\)|joint/scale|embed/embedding .*described as a writer",
    MainBranch(
        [Writer("embed/embedding"), *linear("down0")],
        [norm("norm0", "up0")],
        others=["joint/*", "merge/*"],
    ),
)
def _(net, ids):
    x = net.embed("embed", ids)
    x = x + mlp(net, x, "0")
    return net.linear("merge", net.norm("joint", x.reshape(x.shape[0], -1, 2 * x.shape[-1])), CLASSES)


@refused(
    "tokens mixed behind a norm, channel by channel",
    r"norm2/scale: is kept, and what is behind it",
    mlp_spec(norms=[norm("norm2", keep="read across tokens")], others=["across"]),
)
def _(net, ids):
    def mix(net, x):
        return x + jnp.tanh(jnp.einsum("bld,lm->bmd", net.norm("norm2", x), net.leaf("across", 4, 4)))

    return transformer(net, ids, mix)


@refused(
    "the same, with a converted function",
    r"converted: differs from fn by .*something that is no leaf writes a mean",
    mlp_spec(norms=[norm("norm2", keep="read across tokens")], others=["across"]),
    by="converted",
)
def _(net, ids):
    def mix(net, x):
        return x + jnp.tanh(jnp.einsum("bld,lm->bmd", net.norm("norm2", x), net.leaf("across", 4, 4)))

    return transformer(net, ids, mix)


@refused(
    "the same number, written to every channel",
    r"converted: differs from fn by .*something that is no leaf writes a mean",
    mlp_spec(),
    by="converted",
)
def _(net, ids):
    return transformer(net, ids, lambda net, x: x + jnp.tanh(x[..., :1] - x[..., 1:2]))


@refused(
    "a constant that writes",
    r"more than the described writers and readers touches the main branch: a constant",
    mlp_spec(),
)
def _(net, ids):
    return transformer(net, ids, lambda net, x: x + np.sin(np.arange(net.width)).reshape(1, 1, -1))


@refused(
    "two halves of a main branch",
    r"found several: 4 in embed/embedding .*; 8 in head/kernel",
    MainBranch([Writer("embed/embedding"), Writer("place")], [norm("norm", "head")]),
    by="description",
)
def _(net, ids):
    halves = net.embed("embed", ids, width=4), jnp.broadcast_to(net.leaf("place", 4).reshape(1, 1, -1), (*ids.shape, 4))
    return net.linear("head", net.norm("norm", jnp.concatenate(halves, axis=-1)), CLASSES)


@refused(
    "a tied table behind a norm without affine, described as a writer alone",
    r"table \(11, 8\): described as a writer, and outputs see more of it than it writes: is it a reader \(axis -1\)",
    MainBranch(
        [Writer("table"), *linear("down0")], [norm("norm0", "up0"), Norm(module="norm", keep="a tied table reads it")]
    ),
)
def _(net, ids):
    table = net.leaf("table", 11, net.width)
    x = table[ids]
    return net.norm("norm", x + mlp(net, x, "0"), scale=False, bias=False) @ table.T


@refused(
    "a scale that is stored less 1",
    r"gain: moving the norm's affine into up2/kernel changes the function: .*the leaf holds gamma - 1: add 1",
    mlp_spec(*linear("down2"), norms=[Norm([dense("up2")], scale="gain", module="norm2")]),
)
def _(net, ids):
    def less_1(net, x):
        n = net.norm("norm2", x, scale=False, bias=False) * (1 + net.leaf("gain", net.width)).reshape(1, 1, -1)
        return x + net.linear("down2", jnp.tanh(net.linear("up2", n, 10)), net.width)

    return transformer(net, ids, less_1)


@refused(
    "a kernel with the affine of two norms",
    r"up0/kernel .*: covered by .*one kernel can't take the affine of several norms: keep them",
    MainBranch(
        [Writer("embed/embedding"), *linear("down0"), *linear("down1")],
        [norm("norm0", "up0"), norm("norm1", "up0"), norm("norm", "head")],
    ),
    by="description",
)
def _(net, ids):
    x = net.embed("embed", ids)
    for k in "01":
        x = x + net.linear(f"down{k}", jnp.tanh(net.linear("up0", net.norm(f"norm{k}", x), 10)), net.width)
    return head(net, x)


@refused(
    "a reader's bias of another shape",
    r"value_bias \(2, 1, 3\): expected \(2, 3\), the shape of value without its axis -2",
    mlp_spec(norms=[norm("norm2", Reader("value", axis=-2, bias="value_bias"))]),
    by="transform",
)
def _(net, ids):
    def attention(net, x):
        v = jnp.einsum("bld,hdk->bhlk", net.norm("norm2", x), net.leaf("value", 2, net.width, 3))
        v = v + net.leaf("value_bias", 2, 1, 3)[None]
        return x + jnp.tanh(v).mean(axis=(1, 3))[..., None]

    return transformer(net, ids, attention)


# Described wrongly.


def well_described(net, ids):
    x = net.embed("embed", ids) + net.leaf("place", net.width).reshape(1, 1, -1)
    hidden = jnp.tanh(net.linear("up0", net.norm("norm0", x), net.nominal))
    x = x + net.leaf("scale", net.width).reshape(1, 1, -1) * (hidden @ net.leaf("out", net.nominal, net.width))
    n = net.norm("bare", x, scale=False, bias=False)
    x = x + net.linear(
        "down1", jnp.tanh(net.linear("up1", n, net.nominal)) * net.linear("gate", n, net.nominal), net.width
    )
    n = net.norm("norm", x)
    return net.linear("head", n, CLASSES), net.linear("head_too", n, CLASSES)


WRITERS = [Writer("embed/embedding"), Writer("place"), Writer("out", scale="scale"), *linear("down1")]
NORMS = [norm("norm0", "up0"), Norm([dense("up1"), dense("gate")], module="bare"), norm("norm", "head", "head_too")]
WELL = MainBranch(WRITERS, NORMS)


def described(*writers, norms=NORMS, without=(), **fields):
    """The description, with other writers for those of the same leaves."""
    others = {*without, *(writer.leaf for writer in writers)}
    return MainBranch([*(writer for writer in WRITERS if writer.leaf not in others), *writers], norms, **fields)


MISDESCRIBED = {
    "a writer is missed": (
        r"place \(8,\): described as no writer, yet no output sees a constant along its axis -1: a writer that was missed",
        described(without=["place"], others=["place"]),
    ),
    "a bias that writes is missed": (
        r"down1/bias \(8,\): described as no writer",
        described(without=["down1/bias"], others=["down1/bias"]),
    ),
    "a LayerScale is missed": (
        r"out \(8, 8\): described as a writer along axis -1, but .*: scale \(8,\) multiplies what it writes; give Writer\(scale=...\)",
        described(Writer("out"), others=["scale"]),
    ),
    "a LayerScale of another writer": (
        r"scale: described as the LayerScale of its writers, and moving it into them changes the function",
        described(Writer("out"), Writer("place", scale="scale")),
    ),
    "a writer's axis": (
        r"down1/kernel \(8, 8\): described as a writer along axis -2, but outputs see a constant along it; they don't along axis -1",
        described(Writer("down1/kernel", -2)),
    ),
    "a reader's axis": (
        r"norm0/scale: moving the norm's affine into up0/kernel changes the function; up0/kernel \(8, 8\) reads along its axis -2",
        described(norms=[norm("norm0", Reader("up0/kernel", -1, "up0/bias")), *NORMS[1:]]),
    ),
    "a reader is taken for a writer": (
        r"up0/kernel \(8, 8\): described as a writer along axis -1, but outputs see a constant along it",
        described(Writer("up0/kernel")),
    ),
    "a reader is missed": (
        r"norm/scale: moving the norm's affine into head/kernel changes the function, unless head_too/kernel \(axis -2\) is a reader",
        described(norms=[*NORMS[:2], norm("norm", "head")], others=["head_too/*"]),
    ),
    "a reader behind a norm without affine is missed": (
        r"gate/kernel \(8, 8\): described as no writer, yet no output sees a constant along its axis -2: .*a reader behind a norm without",
        described(norms=[NORMS[0], Norm([dense("up1")], module="bare"), NORMS[2]], others=["gate/*"]),
    ),
    "a reader of another norm": (
        r"norm0/scale: moving the norm's affine into head/kernel changes the function",
        described(norms=[norm("norm0", "head"), NORMS[1], norm("norm", "up0", "head_too")]),
    ),
}
