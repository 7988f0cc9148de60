"""On a GPU: the kernels of attention against the XLA form, values and gradients, even and odd lengths.

PYTHONPATH=. python tests/accelerator/check_attention.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.hopper import attention as hopper
from prenorm_jax.models.attention import attend


def attend_by(name, q, k, v, causal):
    """Attention by one of the forms; "together": hopper's kernels, queries, keys and values in one array."""
    if name == "together":
        rows = -q.shape[1] % hopper.ROWS
        qkv = jnp.pad(jnp.concatenate([q, k, v], axis=-1), [(0, 0), (0, rows), (0, 0), (0, 0)])
        return hopper.attend((qkv,), q.shape[1])[:, : q.shape[1]]
    return attend(q, k, v, causal=causal, implementation=name)


def main():
    for length, causal in [(64, False), (100, False), (197, False), (256, False), (256, True), (197, True)]:
        q, k, v, w = (
            jax.random.normal(key, (4, length, 3, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)
        )

        def outputs(q, k, v, implementation, causal=causal, w=w):
            def weighted(q, k, v):
                y = attend_by(implementation, q, k, v, causal)
                return (y * w).astype(jnp.float32).sum(), y

            (_, y), gradients = jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)(q, k, v)
            return [np.asarray(x, np.float32) for x in (y, *gradients)]

        exact = outputs(*(x.astype(jnp.float32) for x in (q, k, v)), "xla")

        def error(a, b):
            return float(np.abs(a - b).max() / np.abs(b).max())

        missed = {
            name: [error(a, b) for a, b in zip(outputs(q, k, v, name), exact, strict=True)]
            for name in ("xla", "cudnn", *(("hopper", "together") if not causal and length <= 200 else ()))
        }
        print(length, causal, {name: [f"{e:.1e}" for e in found] for name, found in missed.items()})
        # bfloat16 keeps 8 bits; either form is a few roundings away from the float32 one.
        assert all(max(errors) < 3e-2 for errors in missed.values()), missed
    print("attention holds")


if __name__ == "__main__":
    main()
