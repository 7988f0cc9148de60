"""On a GPU of compute capability 9.0: the kernels beside attention's against the XLA forms in float32.

PYTHONPATH=. python tests/accelerator/check_kernels.py
"""

import time

import jax
import jax.numpy as jnp

from prenorm_jax import bases, norms
from prenorm_jax.hopper import cross_entropy, gelu_gradient, norm_gradient, stack, weight_map
from prenorm_jax.models.gelu import gelu

WIDTHS = (192, 384, 768, 1024, 1280)
KINDS = {
    "layer": norms.layer,
    "rms": norms.rms,
    "packed reflect": norms.packed,
    "packed drop": lambda lanes, eps: norms.packed(lanes, eps, "drop"),
}


def microseconds(function, *arguments, calls=20):
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    for _ in range(calls):
        out = function(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls * 1e6


def missed(found, wanted):
    wanted = wanted.astype(jnp.float32)
    return float(jnp.linalg.norm(found.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))


def check_norms():
    for width in WIDTHS:
        rows = 2**25 // width // 8 * 8
        x, dn, dbranch = (
            jax.random.normal(key, (rows, width), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)
        )
        for name, kind_of in KINDS.items():
            kind, affine = kind_of(width, 1e-6), name == "layer"
            scale = jnp.linspace(0.5, 2, width) if affine else None
            sums = ("dx", "dscale", "dbias") if affine else ("dx",)
            assert norm_gradient.served(x)

            def kernel(x, dn, dbranch, kind=kind, sums=sums, scale=scale):
                arguments = {"divisor": kind.divisor, "eps": kind.eps, "centred": kind.centred}
                arguments |= {"squared_sum": kind.squared_sum, "spare_lane": kind.spare_lane}
                return norm_gradient.norm_gradient(x, dn, dbranch, scale, column_sums=sums, **arguments)

            def plain(x, dn, dbranch, kind=kind, sums=sums, scale=scale):
                return norms._gradients_by_xla(kind, x, dn, dbranch, scale, sums)

            wanted = jax.jit(plain)(*(array.astype(jnp.float32) for array in (x, dn, dbranch)))
            errors = [missed(*pair) for pair in zip(kernel(x, dn, dbranch), wanted, strict=True)]
            times = [microseconds(jax.jit(form), x, dn, dbranch) for form in (kernel, plain)]
            print(
                f"{name:15s} {rows} x {width}: errors {[f'{e:.1e}' for e in errors]}, kernel {times[0]:.0f} us, XLA {times[1]:.0f} us"
            )
            # dx is rounded to bfloat16, sums are not; the control has another branch's gradient.
            assert errors[0] < 3e-3, errors
            assert max(errors[1:]) < 1e-4, errors
            assert missed(kernel(x, dn, -dbranch)[0], wanted[0]) > 0.1


def check_cross_entropy():
    for rows, columns, classes in ((16384, 50304, 50257), (8192, 32768, 32768), (4096, 8448, 8400)):
        logits = 3 * jax.random.normal(jax.random.key(0), (rows, columns), jnp.bfloat16)
        targets = jax.random.randint(jax.random.key(1), (rows,), 0, classes)
        dloss = jax.random.uniform(jax.random.key(2), (rows,))
        assert cross_entropy.served(logits.shape, logits.dtype, classes)
        live = jnp.where(jnp.arange(columns) < classes, logits.astype(jnp.float32), -jnp.inf)
        wanted = jax.nn.logsumexp(live, axis=-1)
        slope = (jnp.exp(live - wanted[:, None]) - jax.nn.one_hot(targets, columns)) * dloss[:, None]

        def sums(logits, classes=classes):
            return cross_entropy.log_sum_exp(logits, classes=classes)

        def gradient(logits, wanted=wanted, targets=targets, dloss=dloss, classes=classes):
            return cross_entropy.gradient(logits, wanted, targets, dloss, classes=classes)

        errors = missed(sums(logits), wanted), missed(gradient(logits), slope)
        times = [microseconds(form, logits) for form in (sums, gradient)]
        print(f"cross entropy {rows} x {columns}: errors {errors}, {times[0]:.0f} and {times[1]:.0f} us")
        assert errors[0] < 1e-6, errors
        assert errors[1] < 3e-3, errors
        # The control: one class less.
        assert missed(sums(logits, classes - 1), wanted) > 1e-7


def check_gelu_gradient():
    for rows, width, outputs in (
        (51200, 3072, 768),
        (102400, 1536, 384),
        (16384, 3072, 768),
        (25600, 4096, 1024),
        (204800, 768, 192),
    ):
        dy, matrix, z = (
            scale * jax.random.normal(key, shape, jnp.bfloat16)
            for key, scale, shape in zip(
                jax.random.split(jax.random.key(0), 3),
                (1, outputs**-0.5, 2),
                ((rows, outputs), (width, outputs), (rows, width)),
                strict=True,
            )
        )
        assert gelu_gradient.served(z, matrix)

        def plain(dy, matrix, z):
            return jax.vjp(gelu, z)[1](dy @ matrix.T)[0]

        with jax.default_matmul_precision("highest"):
            wanted = jax.jit(plain)(*(array.astype(jnp.float32) for array in (dy, matrix, z)))
        forms = gelu_gradient.gelu_gradient, jax.jit(plain, compiler_options={"xla_gpu_enable_triton_gemm": False})
        errors = [missed(form(dy, matrix, z), wanted) for form in forms]
        times = [microseconds(form, dy, matrix, z) for form in forms]
        print(
            f"GELU's gradient {rows} x {outputs} x {width}: errors {errors}, kernel {times[0]:.0f} us, XLA {times[1]:.0f} us"
        )
        # One rounding, where XLA's form has two; the control has another input.
        assert errors[0] < 2e-3, errors
        assert missed(forms[0](dy, matrix, -z), wanted) > 0.1


def check_stack():
    for count, shape in ((12, (768, 3072)), (24, (1024, 1024)), (12, (192, 768))):
        arrays = list(jax.random.normal(jax.random.key(0), (count, *shape), jnp.bfloat16))
        assert stack.served(arrays)
        assert (stack.stack(arrays) == jnp.stack(arrays)).all()
        times = [microseconds(jax.jit(form), arrays) for form in (stack.stack, jnp.stack)]
        print(f"stack of {count} {shape}: kernel {times[0]:.0f} us, XLA {times[1]:.0f} us")


def pulled_back(form):
    """The pull-back of a reader's map; what a step computes of dW is fused with the optimizer, and its largest entry stands for that."""

    def sums(gradient, *arrays):
        dkernel, *others = jax.vjp(form, *arrays)[1](gradient)
        return jnp.abs(dkernel).max(), *others

    return jax.jit(sums)


def check_weight_map():
    """Stacked layers of a reader and of a writer: mapped, and what is summed on the way back."""
    for layers, width, columns in ((12, 768, 3072), (12, 768, 768), (24, 1024, 4096), (12, 384, 1536), (12, 192, 768)):
        keys = jax.random.split(jax.random.key(0), 5)
        kernel, bias, gamma, beta = (
            jax.random.normal(key, (layers, *shape))
            for key, shape in zip(keys[:4], ((width, columns), (columns,), (width,), (width,)), strict=True)
        )
        dkernel = jax.random.normal(keys[4], kernel.shape, jnp.bfloat16)
        of_reader, of_writer = (weight_map.Form(bases.as_sums(bases.reflect, width), True, jnp.dtype("bfloat16")),) * 2

        def plain(kernel, bias, gamma, beta):
            new_bias = bias[:, None] + (beta[..., None] * kernel).sum(1, keepdims=True)
            new = bases.reflect(kernel * gamma[..., None], -2)
            return bases.set_last(new, new_bias, -2).astype(jnp.bfloat16)

        def plain_writer(kernel):
            return bases.clear_last(bases.reflect(kernel, -1), -1).astype(jnp.bfloat16)

        def by_kernel(*arrays, form=of_reader):
            return weight_map.read(form, *arrays)[0]

        def writer_by_kernel(kernel, form=of_writer):
            return weight_map.written(form, kernel)

        arrays = (kernel, bias, gamma, beta)
        pairs = [
            ("reader", jax.jit(by_kernel), jax.jit(plain), arrays),
            ("reader, back", pulled_back(by_kernel), pulled_back(plain), (dkernel, *arrays)),
            ("writer", jax.jit(writer_by_kernel), jax.jit(plain_writer), (kernel.swapaxes(1, 2),)),
        ]
        for name, found, wanted, given in pairs:
            outputs = [jax.tree.leaves(form(*given)) for form in (found, wanted)]
            errors = [missed(*pair) for pair in zip(*outputs, strict=True)]
            times = [microseconds(form, *given, calls=50) for form in (found, wanted)]
            print(
                f"weight map, {name:12s} {layers} x {width} x {columns}: error {max(errors):.1e}, "
                f"kernel {times[0]:.0f} us, XLA {times[1]:.0f} us"
            )
            # What comes out in bfloat16 may be rounded to either side; the control has another scale.
            assert max(errors) < (1e-5 if "back" in name else 1e-3), errors
        assert missed(by_kernel(kernel, bias, -gamma, beta), plain(*arrays)) > 0.1


if __name__ == "__main__":
    check_norms()
    check_cross_entropy()
    check_gelu_gradient()
    check_stack()
    check_weight_map()
    print("kernels hold")
