"""What tracing costs: seconds and memory of a conversion, and that a scan is not unrolled. The table in docs/tracing.md.

    JAX_PLATFORMS=cpu python tests/tracing/overhead.py

A 24-layer GPT of width 256 in plain JAX, looped and scanned, without verification (which runs the model) and with it. Each row is a
process of its own; its memory is the largest resident size during the conversion less the one before, beside the parameters' size.
"""

import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.tracing import convert

LAYERS, D, F, V, HEADS = 24, 256, 1024, 1000, 4


def norm(x, p):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def block(x, p):
    n = norm(x, p["ln1"])
    q, k, v = (jnp.reshape(n @ p[w] + p[f"{w}_bias"], (*n.shape[:2], HEADS, -1)) for w in "qkv")
    scores = jnp.einsum("blhk,bthk->bhlt", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30))
    x = x + jnp.einsum("bhlt,bthk->blhk", weights, v).reshape(x.shape) @ p["o"] + p["o_bias"]
    return x + jax.nn.gelu(norm(x, p["ln2"]) @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def gpt(params, tokens):
    x = params["embed"][tokens] + params["position"][: tokens.shape[1]]
    if isinstance(params["blocks"], list):
        for p in params["blocks"]:
            x = block(x, p)
    else:
        x = jax.lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])[0]
    return norm(x, params["ln"]) @ params["head"]


def parameters(scanned):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(np.float32)

    def affine():
        return {"scale": 1 + normal(D), "bias": normal(D)}

    def layer():
        kernels = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "up": (D, F), "down": (F, D)}
        weights = {name: normal(*shape) for name, shape in kernels.items()}
        biases = {f"{name}_bias": normal(shape[1]) for name, shape in kernels.items()}
        return {**weights, **biases, "ln1": affine(), "ln2": affine()}

    blocks = [layer() for _ in range(LAYERS)]
    blocks = jax.tree.map(lambda *a: np.stack(a), *blocks) if scanned else blocks
    return {"embed": normal(V, D), "position": normal(64, D), "blocks": blocks, "ln": affine(), "head": normal(D, V)}


def resident():
    """The largest resident size so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def equations(jaxpr):
    inner = [getattr(v, "jaxpr", v) for e in jaxpr.eqns for v in e.params.values()]
    return len(jaxpr.eqns) + sum(equations(j) for j in inner if hasattr(j, "eqns"))


def measure(kind, verify):
    """One row of the table."""
    params = parameters(kind == "scanned")
    size = sum(a.nbytes for a in jax.tree.leaves(params)) / 2**20
    tokens = np.arange(2 * 64).reshape(2, 64) % V
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))
    before, start = resident(), time.perf_counter()
    out = convert(gpt, params, tokens, verify=verify)
    seconds, memory = time.perf_counter() - start, resident() - before
    report = out.report
    lines = equations(jax.make_jaxpr(out.fn)(out.params, tokens).jaxpr)
    print(
        f"| {LAYERS} layers, {kind} | {'yes' if verify else 'no'} | {seconds:.1f} s | {memory:.0f} MiB | {size:.0f} MiB | "
        f"{lines} | {report.reductions_before} -> {report.reductions_after} |",
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], sys.argv[2] == "yes")
    else:
        print("| model | verified | conversion | memory above | parameters | equations | reductions |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for kind in ("looped", "scanned"):
            for verify in ("no", "yes"):
                subprocess.run([sys.executable, __file__, kind, verify], check=True)
