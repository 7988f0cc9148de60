"""Programs in the manner of many architectures, each with what has to become of its norms: a table, run by test_program_table.py.

They are written as their authors would write them, with implicit broadcasting, and small. `kept` counts norms that stay, `reason` is
what the report says of the first of those; `added` counts recentered activations.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

D, F, V, H, B, N = 8, 12, 11, 2, 2, 4
TOKENS = (jnp.arange(B * N).reshape(B, N) * 5 + 1) % V


@dataclasses.dataclass(frozen=True)
class Case:
    """fn(params, *inputs) and what converting it gives."""

    fn: object
    params: object
    inputs: tuple
    sites: int
    kept: int = 0
    added: int = 0
    reason: str = ""
    grads: bool = False
    options: dict = dataclasses.field(default_factory=dict)


CASES = {}


def case(name, params, *inputs, **expected):
    """Put a function into the table."""

    def put(fn):
        CASES[name] = Case(fn, params, inputs, **expected)
        return fn

    return put


DRAWS = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(DRAWS.normal(size=shape))


def norm(x, p, axis=-1):
    centered = x - x.mean(axis, keepdims=True)
    y = centered / jnp.sqrt((centered**2).mean(axis, keepdims=True) + 1e-5)
    return y * p["g"] + p["b"]


def ln(*shape):
    return {"g": normal(*(shape or (D,))), "b": normal(*(shape or (D,)))}


def linear(i, o):
    return {"w": normal(i, o), "b": normal(o)}


def dense(p, x):
    return x @ p["w"] + p["b"]


def heads(x):
    return x.reshape(*x.shape[:-1], H, -1)


def attend(q, k, v, bias=0.0):
    q, k, v = heads(q), heads(k), heads(v)
    s = jax.nn.softmax(jnp.einsum("...qhd,...khd->...hqk", q, k) / np.sqrt(q.shape[-1]) + bias, -1)
    out = jnp.einsum("...hqk,...khd->...qhd", s, v)
    return out.reshape(*out.shape[:-2], -1)


def attention(p, x, y=None, bias=0.0):
    y = x if y is None else y
    return dense(p["o"], attend(dense(p["q"], x), dense(p["k"], y), dense(p["v"], y), bias))


def attention_params(d=D):
    return {name: linear(d, d) for name in "qkvo"}


def mlp(p, x):
    return dense(p["down"], jax.nn.gelu(dense(p["up"], x)))


def mlp_params(d=D):
    return {"up": linear(d, F), "down": linear(F, d)}


def block(p, x, bias=0.0):
    x = x + attention(p["a"], norm(x, p["n1"]), bias=bias)
    return x + mlp(p["m"], norm(x, p["n2"]))


def block_params(**more):
    return {"a": attention_params(), "n1": ln(), "m": mlp_params(), "n2": ln(), **more}


def gpt_params(layers=2, **more):
    blocks = [block_params() for _ in range(layers)]
    return {"e": normal(V, D), "b": blocks, "n": ln(), "h": normal(D, V), **more}


def stack(n):
    return jax.tree.map(lambda *a: jnp.stack(a), *(block_params() for _ in range(n)))


def sublayers(b):
    return ((attention, b["a"], b["n1"], 0), (mlp, b["m"], b["n2"], 1))


# --- what becomes of the stream between blocks ---


def _mix():
    return {"read": normal(3), "mix": normal(3, 3), "write": normal(3)}


@case("hyper-connections", gpt_params(hc=[[_mix(), _mix()] for _ in range(2)]), TOKENS, sites=5, grads=True)
def hyper_connections(p, t):
    h = jnp.repeat(p["e"][t][..., None, :], 3, -2)
    for b, mixes in zip(p["b"], p["hc"], strict=True):
        for f, own, n, k in sublayers(b):
            mix = mixes[k]
            y = f(own, norm(jnp.einsum("s,...sd->...d", mix["read"], h), n))
            h = jnp.einsum("st,...td->...sd", mix["mix"], h) + mix["write"][:, None] * y[..., None, :]
    return norm(h.sum(-2), p["n"]) @ p["h"]


@case(
    "hyper-connections that depend on the tokens",
    gpt_params(hc=[[{**_mix(), "n": ln(), "w": normal(D, 3)} for _ in range(2)] for _ in range(2)]),
    TOKENS,
    sites=9,
)
def dynamic_hyper_connections(p, t):
    h = jnp.stack([p["e"][t]] * 3, -2)
    for b, mixes in zip(p["b"], p["hc"], strict=True):
        for f, own, n, k in sublayers(b):
            mix = mixes[k]
            moving = jnp.tanh(norm(h, mix["n"]) @ mix["w"])
            y = f(own, norm(jnp.einsum("...s,...sd->...d", mix["read"] + moving[..., 0], h), n))
            h = jnp.einsum("...st,...td->...sd", mix["mix"] + moving, h) + mix["write"][:, None] * y[..., None, :]
    return norm(h.sum(-2), p["n"]) @ p["h"]


@case("averages over depth", gpt_params(w=[normal(2), normal(3)]), TOKENS, sites=5)
def depth_weighted(p, t):
    past = [p["e"][t]]
    for b, w in zip(p["b"], p["w"], strict=True):
        past.append(block(b, past[-1]))
        past[-1] = sum(w[i] * x for i, x in enumerate(past))
    return norm(past[-1], p["n"]) @ p["h"]


@case("reversible, halves summed", gpt_params(), TOKENS, sites=5)
def reversible_sum(p, t):
    a = b = p["e"][t]
    for q in p["b"]:
        a = a + attention(q["a"], norm(b, q["n1"]))
        b = b + mlp(q["m"], norm(a, q["n2"]))
    return norm(a + b, p["n"]) @ p["h"]


@case(
    "reversible, halves joined",
    gpt_params(e=normal(V, 2 * D), n=ln(2 * D), h=normal(2 * D, V)),
    TOKENS,
    sites=0,
    kept=5,
    reason="joined with others by concatenate",
    options={"partial": True},
)
def reversible_joined(p, t):
    a, b = jnp.split(p["e"][t], 2, -1)
    for q in p["b"]:
        a = a + attention(q["a"], norm(b, q["n1"]))
        b = b + mlp(q["m"], norm(a, q["n2"]))
    return norm(jnp.concatenate([a, b], -1), p["n"]) @ p["h"]


@case(
    "long skips through a linear map",
    gpt_params(3, skip=linear(2 * D, D)),
    TOKENS,
    sites=3,
    kept=4,
    reason="joined with others by concatenate",
)
def long_skips(p, t):
    x = block(p["b"][0], p["e"][t])
    y = block(p["b"][1], x)
    y = dense(p["skip"], jnp.concatenate([x, y], -1))
    return norm(block(p["b"][2], y), p["n"]) @ p["h"]


@case(
    "a gate for each channel of the stream",
    gpt_params(1, g=linear(D, D)),
    TOKENS,
    sites=1,
    kept=2,
    added=1,
    reason="a product of it with what varies over its features",
    options={"activations": "always"},
)
def vector_gate(p, t):
    x, b = p["e"][t], p["b"][0]
    x = x + attention(b["a"], norm(x, b["n1"]))
    y = norm(x, b["n2"])
    g = jax.nn.sigmoid(dense(p["g"], y))
    return norm((1 - g) * x + g * mlp(b["m"], y), p["n"]) @ p["h"]


@case("a gate for each token", gpt_params(g=linear(D, 1)), TOKENS, sites=5)
def highway(p, t):
    x = p["e"][t]
    for b in p["b"]:
        y = norm(x, b["n1"])
        g = jax.nn.sigmoid(dense(p["g"], y))
        x = (1 - g) * x + g * attention(b["a"], y)
        x = x + mlp(b["m"], norm(x, b["n2"]))
    return norm(x, p["n"]) @ p["h"]


@case("mixture of depths", gpt_params(r=normal(D, 1)), TOKENS, sites=5, grads=True)
def mixture_of_depths(p, t):
    x = p["e"][t]
    for b in p["b"]:
        weight, chosen = jax.lax.top_k(jnp.squeeze(norm(x, b["n1"]) @ p["r"], -1), 2)
        some = jnp.take_along_axis(x, chosen[..., None], 1)
        y = attention(b["a"], norm(some, b["n2"])) * jax.nn.sigmoid(weight)[..., None]
        x = x.at[jnp.arange(B)[:, None], chosen].add(y)
    return norm(x, p["n"]) @ p["h"]


@case("adapters behind a branch", gpt_params(ad=mlp_params()), TOKENS, sites=5, grads=True, added=4)
def adapters(p, t):
    """They read the branch with its mean; recentered behind them, the stream still gains."""
    x = p["e"][t]
    for b in p["b"]:
        for f, own, n, _ in sublayers(b):
            y = f(own, norm(x, n))
            x = x + (y + mlp(p["ad"], y))
    return norm(x, p["n"]) @ p["h"]


# --- loops ---


@case(
    "one block until every token halts",
    {
        "e": normal(V, D),
        "b": block_params(),
        "s": normal(4, D),
        "hn": ln(),
        "hw": normal(D),
        "n": ln(),
        "h": normal(D, V),
    },
    TOKENS,
    sites=4,
)
def halting(p, t):
    def step(c):
        i, x, total, halt = c
        more = jax.nn.sigmoid(norm(x, p["hn"]) @ p["hw"])
        x = block(p["b"], x + p["s"][i])
        return i + 1, x, total + jnp.where(halt < 1, more, 0.0)[..., None] * x, halt + more

    x = p["e"][t]
    start = (0, x, jnp.zeros_like(x), jnp.zeros(x.shape[:-1], x.dtype))
    total = jax.lax.while_loop(lambda c: (c[0] < 4) & jnp.any(c[3] < 1), step, start)[2]
    return norm(total, p["n"]) @ p["h"]


@case("fori_loop over a stack", {**gpt_params(0), "b": stack(3)}, TOKENS, sites=3)
def indexed(p, t):
    def step(i, x):
        return block(jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), p["b"]), x)

    return norm(jax.lax.fori_loop(0, 3, step, p["e"][t]), p["n"]) @ p["h"]


@case("stages in a pipeline", {**gpt_params(0), "b": stack(2)}, TOKENS, sites=7)
def pipeline(p, t):
    x = p["e"][t]
    held = jnp.zeros((2, *x.shape), x.dtype)
    for i in range(3):
        held = jax.vmap(block)(p["b"], jnp.roll(held, 1, 0).at[0].set(x * (i == 0)))
    return norm(held[1], p["n"]) @ p["h"]


def decode(p, cache, token, i):
    x = p["e"][token][:, None] + jax.lax.dynamic_slice_in_dim(p["pos"], i, 1, 0)
    new = []
    for b, (keys, values) in zip(p["b"], cache, strict=True):
        y = norm(x, b["n1"])
        keys = jax.lax.dynamic_update_slice_in_dim(keys, dense(b["a"]["k"], y), i, 1)
        values = jax.lax.dynamic_update_slice_in_dim(values, dense(b["a"]["v"], y), i, 1)
        seen = jnp.where(jnp.arange(keys.shape[1]) <= i, 0.0, -1e9)
        x = x + dense(b["a"]["o"], attend(dense(b["a"]["q"], y), keys, values, seen))
        x = x + mlp(b["m"], norm(x, b["n2"]))
        new.append((keys, values))
    return (norm(x, p["n"]) @ p["h"])[:, 0], new


@case("beam search", gpt_params(pos=normal(5, D)), jnp.asarray(3), sites=5)
def beam_search(p, start):
    def step(s):
        i, tokens, score, cache = s
        logits, cache = decode(p, cache, tokens[:, i], i)
        score, best = jax.lax.top_k((score[:, None] + jax.nn.log_softmax(logits)).reshape(-1), 2)
        parent, token = best // V, best % V
        tokens = tokens[parent].at[:, i + 1].set(token.astype(tokens.dtype))
        return i + 1, tokens, score, jax.tree.map(lambda a: a[parent], cache)

    cache = [(jnp.zeros((2, 5, D)), jnp.zeros((2, 5, D))) for _ in p["b"]]
    tokens = jnp.zeros((2, 5), jnp.int32).at[:, 0].set(start)
    return jax.lax.while_loop(lambda s: s[0] < 4, step, (0, tokens, jnp.asarray([0.0, -1e9]), cache))[1:3]


# --- tokens of other kinds ---


@case("prefixes for keys and values, soft prompts", gpt_params(soft=normal(3, D), pre=normal(2, 2, D)), TOKENS, sites=5)
def prompts(p, t):
    x = jnp.concatenate([jnp.broadcast_to(p["soft"], (B, 3, D)), p["e"][t]], 1)
    k0, v0 = jnp.broadcast_to(p["pre"][:, None], (2, B, 2, D))
    for b in p["b"]:
        y, a = norm(x, b["n1"]), b["a"]
        k, v = jnp.concatenate([k0, dense(a["k"], y)], 1), jnp.concatenate([v0, dense(a["v"], y)], 1)
        x = x + dense(a["o"], attend(dense(a["q"], y), k, v))
        x = x + mlp(b["m"], norm(x, b["n2"]))
    return norm(x[:, 3:], p["n"]) @ p["h"]


@case("sequences packed in one row, pooled", gpt_params(), TOKENS.reshape(-1), jnp.arange(8) // 3, sites=5, grads=True)
def packed(p, t, segment):
    x = p["e"][t]
    for b in p["b"]:
        x = block(b, x, jnp.where(segment[:, None] == segment, 0.0, -1e9)[None])
    counts = jax.ops.segment_sum(jnp.ones(t.shape), segment, 3)
    return norm(jax.ops.segment_sum(x, segment, 3) / jnp.maximum(counts, 1)[:, None], p["n"]) @ p["h"]


@case(
    "channels first",
    {
        "e": normal(V, D),
        "b": [{"n": ln(D, 1), "q": normal(D, H, 4), "o": normal(H, 4, D), "bias": normal(D, 1)} for _ in range(2)],
        "n": ln(D, 1),
        "h": normal(D, V),
    },
    TOKENS,
    sites=3,
    grads=True,
)
def channels_first(p, t):
    x = jnp.einsum("vd,bnv->bdn", p["e"], jax.nn.one_hot(t, V))
    for b in p["b"]:
        q = jnp.einsum("dhk,bdn->bhkn", b["q"], norm(x, b["n"], axis=1))
        s = jax.nn.softmax(jnp.einsum("bhkn,bhkm->bhnm", q, q), -1)
        x = x + jnp.einsum("hkd,bhnm,bhkm->bdn", b["o"], s, q) + b["bias"]
    return jnp.einsum("dv,bdn->bnv", p["h"], norm(x, p["n"], axis=1))


@case(
    "video, attention over space and over time",
    {
        "tube": normal(2, 2, 2, 3, D),
        "t": normal(2, D),
        "s": normal(2, 2, D),
        "b": [block_params()],
        "n": ln(),
        "h": normal(D, V),
    },
    normal(1, 4, 4, 4, 3),
    sites=3,
)
def video(p, x):
    dims = ("NTHWC", "THWIO", "NTHWC")
    x = jax.lax.conv_general_dilated(x, p["tube"], (2, 2, 2), "VALID", dimension_numbers=dims)
    x = x + p["t"][None, :, None, None] + p["s"][None, None]
    for b in p["b"]:
        y = norm(x, b["n1"]).reshape(*x.shape[:2], -1, D)
        x = (
            x
            + attention(b["a"], y).reshape(x.shape)
            + jnp.swapaxes(attention(b["a"], jnp.swapaxes(y, 1, 2)), 1, 2).reshape(x.shape)
        )
        x = x + mlp(b["m"], norm(x, b["n2"]))
    return norm(x, p["n"]).mean((1, 2, 3)) @ p["h"]


@case(
    "class attention with layer scales",
    gpt_params(3, c=normal(1, 1, D), s=[[normal(D), normal(D)] for _ in range(3)]),
    TOKENS,
    sites=7,
    grads=True,
)
def class_attention(p, t):
    x, c = p["e"][t], jnp.broadcast_to(p["c"], (B, 1, D))
    for b, (s1, s2) in zip(p["b"][:2], p["s"], strict=False):
        x = x + s1 * attention(b["a"], norm(x, b["n1"]))
        x = x + s2 * mlp(b["m"], norm(x, b["n2"]))
    b, (s1, s2) = p["b"][2], p["s"][2]
    y = norm(jnp.concatenate([c, x], 1), b["n1"])
    c = c + s1 * attention(b["a"], y[:, :1], y)
    c = c + s2 * mlp(b["m"], norm(c, b["n2"]))
    return norm(jnp.concatenate([c, x], 1), p["n"])[:, 0] @ p["h"]


@case(
    "queries that start at zero, a norm at each depth's output",
    {
        "x": linear(5, D),
        "enc": block_params(),
        "en": ln(),
        "dec": [block_params(c=attention_params(), n3=ln()) for _ in range(2)],
        "dn": ln(),
        "q": normal(3, D),
        "h": normal(D, 4),
    },
    normal(B, N, 5),
    sites=11,
)
def detection(p, x):
    memory = norm(block(p["enc"], dense(p["x"], x)), p["en"])
    y, outputs = jnp.zeros((B, 3, D)), []
    for b in p["dec"]:
        y = y + attention(b["a"], norm(y, b["n1"]) + p["q"])
        y = y + attention(b["c"], norm(y, b["n3"]) + p["q"], memory)
        y = y + mlp(b["m"], norm(y, b["n2"]))
        outputs.append(norm(y, p["dn"]))
    return jnp.stack(outputs) @ p["h"]


# --- mixers that are no attention ---


@case(
    "receptance, keys and values of this token and the last",
    gpt_params(
        0,
        n0=ln(),
        b=[
            {"n": ln(), "mix": normal(3, D), "w": normal(3, D, D), "o": normal(D, D), "decay": normal(D)}
            for _ in range(3)
        ],
    ),
    TOKENS,
    sites=5,
    added=1,
)
def receptance(p, t):
    x = norm(p["e"][t], p["n0"])
    for b in p["b"]:
        y = norm(x, b["n"])
        last = jnp.pad(y, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        r, k, v = ((y * b["mix"][i] + last * (1 - b["mix"][i])) @ b["w"][i] for i in range(3))

        def step(state, kv, b=b):
            state = state * jax.nn.sigmoid(b["decay"]) + jnp.tanh(kv[0]) * kv[1]
            return state, state

        states = jax.lax.scan(step, jnp.zeros((B, D)), (jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)))[1]
        x = x + (jax.nn.sigmoid(r) * jnp.swapaxes(states, 0, 1)) @ b["o"]
    return norm(x, p["n"]) @ p["h"]


@case(
    "selective state space",
    gpt_params(
        0,
        b=[
            {
                "n": ln(),
                "in": normal(D, 2 * F),
                "dt": normal(F, F),
                "a": normal(F, 3),
                "bc": normal(2, F, 3),
                "o": normal(F, D),
            }
            for _ in range(2)
        ],
    ),
    TOKENS,
    sites=3,
    grads=True,
)
def state_space(p, t):
    x = p["e"][t]
    for b in p["b"]:
        u, gate = jnp.split(norm(x, b["n"]) @ b["in"], 2, -1)
        dt = jax.nn.softplus(u @ b["dt"])[..., None]
        read, write = u @ b["bc"][0], u @ b["bc"][1]
        decay, push = jnp.exp(-dt * jnp.exp(b["a"])), dt * write[:, :, None] * u[..., None]
        _, states = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (decay, push), axis=1)
        x = x + (jnp.einsum("btfs,bts->btf", states, read) * jax.nn.silu(gate)) @ b["o"]
    return norm(x, p["n"]) @ p["h"]


# --- containers ---

Layer = collections.namedtuple("Layer", "attention norms mlp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    up: dict
    down: dict
    norm: dict
    act: str = dataclasses.field(metadata={"static": True}, default="gelu")


@case(
    "named tuples, dataclasses, integer keys, dotted keys",
    (
        {"wte.weight": normal(V, D), "ids": jnp.arange(N)},
        {0: Layer(attention_params(), (ln(),), None), 1: Record(linear(D, F), linear(F, D), ln())},
        [normal(D, V), ln()],
    ),
    TOKENS,
    sites=3,
)
def containers(p, t):
    tables, layers, (head, last) = p
    x = tables["wte.weight"][t]
    x = x + attention(layers[0].attention, norm(x, layers[0].norms[0]))
    record = layers[1]
    x = x + dense(record.down, getattr(jax.nn, record.act)(dense(record.up, norm(x, record.norm))))
    return norm(x, last) @ head


@case("a flag and a count among the inputs", gpt_params(), TOKENS, True, 2, sites=5)
def flagged(p, t, doubled, times):
    x = p["e"][t] * (2.0 if doubled else 1.0) * times
    for b in p["b"]:
        x = block(b, x)
    return norm(x, p["n"]) @ p["h"]
