"""What tracing costs: seconds and memory of a conversion, and that a scan is not unrolled. The table in docs/tracing.md.

    PYTHONPATH=. JAX_PLATFORMS=cpu python tests/tracing/overhead.py

A 24-layer GPT of width 256 in plain JAX, looped and scanned, without verification (which runs the model) and with it. Each row is a
process of its own; its memory is the largest resident size during the conversion less the one before, beside the parameters' size, with an
allocator that gives back at once what is free. Where others share the cores, the processor's seconds say more than the clock's.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.tracing import convert

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "tracing.md"
START, END = "<!-- overhead: made by tests/tracing/overhead.py -->", "<!-- end of overhead -->"
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # to glibc
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
    before, start, busy = resident(), time.perf_counter(), time.process_time()
    out = convert(gpt, params, tokens, verify=verify)
    seconds, busy, memory = time.perf_counter() - start, time.process_time() - busy, resident() - before
    return {
        "kind": kind,
        "verified": verify,
        "seconds": round(seconds, 1),
        "processor_seconds": round(busy, 1),
        "memory_mib": round(memory),
        "parameters_mib": round(size),
        "equations": equations(jax.make_jaxpr(out.fn)(out.params, tokens).jaxpr),
        "reductions": [out.report.reductions_before, out.report.reductions_after],
    }


def table(rows):
    """The table of the docs."""
    lines = [
        "| model | verified | conversion | of a processor | memory above | parameters | equations | reductions |",
        "|---" * 8 + "|",
    ]
    for r in rows:
        lines.append(
            f"| {LAYERS} layers, {r['kind']} | {'yes' if r['verified'] else 'no'} | {r['seconds']} s | {r['processor_seconds']} s | "
            f"{r['memory_mib']} MiB | {r['parameters_mib']} MiB | {r['equations']} | {r['reductions'][0]} -> {r['reductions'][1]} |"
        )
    return "\n".join(lines)


def run(kind, verify):
    """A row, from a process of its own."""
    command = [sys.executable, __file__, "--kind", kind, *(["--verify"] if verify else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    return json.loads(done.stdout)


def write(rows, path=DOCS):
    """Put the table into the docs."""
    path.write_text(
        re.sub(f"{START}.*?{END}", lambda _: f"{START}\n\n{table(rows)}\n\n{END}", path.read_text(), flags=re.S)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["looped", "scanned"], help="print one row as JSON")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tracing/overhead.json"))
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options.verify)))
    else:
        rows = [run(kind, verify) for kind in ("looped", "scanned") for verify in (False, True)]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        summary = {
            "command": "python tests/tracing/overhead.py",
            "jax": jax.__version__,
            "cores": os.cpu_count(),
            "rows": rows,
        }
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
        write(rows)
        print(table(rows))
