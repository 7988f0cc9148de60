"""What a step has to compute and to move, from shapes alone: what MFU is a fraction of, and the floor below each part of a profile.

With M rows (tokens), a product of (M, K) by (K, N) takes 2 M K N operations and moves M K + K N + M N numbers; the attention of a layer
takes 4 D operations for each pair of a query and a key (two products of 2 K for each of H heads, D = H K). A training step takes three
times the operations of a forward pass, and three times the bytes of its products: one product more for the gradient of either side.
Recomputation is not counted: this is what the mathematics asks for, not what a program does.

Two conventions of counting attention are in use. "full" counts all L^2 pairs of a sequence (Chowdhery et al., 2022, appendix B), "causal"
only the L (L + 1) / 2 that a causal mask leaves. Without a mask they are the same. Norms, GELU, softmax and the optimizer count as no
operations in either. Where the head reads a few tokens alone (a ViT's class token), the last block owes nothing to the others but their
keys and values, and in both conventions nothing else of it is counted.

Bytes of the other parts, each tensor read once and written once, a and p the bytes of a number of the computation and of a parameter (for
the last block, M is what is read of it, but for its keys, its values and the norm in front of them):

    attention            forward 4 M D a (q, k, v, output; in decoding k and v are the cache's), backward 8 M D a (those, their gradients)
    GELU                 forward 2 M F a, backward 3 M F a
    norms and residuals  forward 2 M D a for each norm (main branch, normalised value), backward 4 M D a (main branch, gradient of the
                         value, gradient of the main branch in and out); additions ride on the products before them
    loss                 the logits once forward, once backward, and their gradient
    optimizer            7 p for each parameter: parameter, two moments, gradient in; parameter, two moments out
    weight map           p + a for each parameter, and in Pre-LN coordinates as much again for the gradient
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from prenorm_jax import models
from prenorm_jax.models import GPTConfig, ViTConfig


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do in a second: bf16 operations and bytes, as its vendor says and as a large product and a large copy reach."""

    peak_flops: float
    peak_bytes: float
    product_flops: float
    copy_bytes: float


DEVICES: dict[str, Device] = {
    "NVIDIA H200": Device(989e12, 4.8e12, 790e12, 4.3e12),
    "NVIDIA H100 80GB HBM3": Device(989e12, 3.35e12, 798e12, 3.0e12),
}
"""Device by what JAX calls its kind. NVIDIA's data sheets (dense bf16), and products of 8192^3 and copies of 8.6 GB as measured."""
PEAK_FLOPS: dict[str, float] = {
    **{kind: device.peak_flops for kind, device in DEVICES.items()},
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""bf16 operations a second, dense, by what JAX calls a device's kind; from the data sheets of NVIDIA and Google Cloud."""
FLOOR_DEVICE = DEVICES["NVIDIA H200"]  # whose floors are told where the device is another


def device() -> Device | None:
    """This process's device, if it is in `DEVICES`."""
    return DEVICES.get(jax.devices()[0].device_kind)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One thing that a step has to do: the part of a profile it belongs to, its operations by convention, and its bytes."""

    part: str
    full: float = 0.0
    causal: float = 0.0
    bytes: float = 0.0

    def floor(self, device: Device) -> float:
        """Seconds below which it can't be done, by what a large product and a large copy reach."""
        return max(self.causal / device.product_flops, self.bytes / device.copy_bytes)


def flops_per_step(config: ViTConfig | GPTConfig, batch: int) -> float:
    """Operations that a training step on `batch` examples asks for, attention counted in full: MFU's numerator."""
    return sum(each.full for each in operations(config, batch))


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """bf16 operations a second of these devices together, or None where a kind is not in `PEAK_FLOPS`."""
    peaks = [PEAK_FLOPS[device.device_kind] for device in devices if device.device_kind in PEAK_FLOPS]
    return sum(peaks) if len(peaks) == len(devices) else None


def operations(
    config: ViTConfig | GPTConfig, batch: int, *, kind: str = "training", coordinates: str = "native"
) -> list[Operation]:
    """What a step of a model on `batch` examples has to do: a forward pass, and in training the rest too.

    Args:
      config: of the variant that runs; a GPT sees its whole context.
      kind: "training", "inference", or "decoding": the last token of each context, the rest of it in a cache.
      coordinates: in which it is trained.

    >>> sum(each.full for each in operations(models.vit_config("B/16"), 1, kind="inference")) / 1e9
    32.696...
    """
    training = kind == "training"
    causal = isinstance(config, GPTConfig)
    seen = config.context if isinstance(config, GPTConfig) else config.tokens
    length = 1 if kind == "decoding" else seen
    rows, width, depth, hidden = batch * length, config.width, config.depth, config.mlp_width
    a, p = (np.dtype(getattr(jax.numpy, name)).itemsize for name in (config.dtype, config.param_dtype))

    if isinstance(config, GPTConfig):
        judged, classes, normed, read = rows, config.padded_vocab, rows, rows
    else:
        judged, classes, normed = batch, config.classes, batch if config.pool == "cls" else rows
        read = batch * (config.read_tokens or length)
    written = rows * (depth - 1) + read  # rows that a branch writes to, of all layers; what is read are all rows
    products = [(rows, width, width, 2 * depth)]  # keys and values
    for m, count in ((rows, depth - 1), (read, 1)):
        products += [(m, width, width, 2 * count), (m, width, hidden, count), (m, hidden, width, count)]
    if isinstance(config, ViTConfig):
        products.append((batch * config.patches, config.patch_size**2 * config.channels, width, 1))
    products.append((judged, width, classes, 1))

    passes = 3 if training else 1
    found = []
    for m, k, n, count in products:
        flops = 2.0 * m * k * n * count * passes
        found.append(Operation("matrix products", flops, flops, (m * k + k * n + m * n) * a * count * passes))

    pairs = written * seen
    unmasked = pairs * (length + 1) / (2 * length) if causal and length == seen else pairs
    norms = 0 if config.norm == "no_norm" else depth * rows + written + normed

    def attention(times: int, moved: int) -> Operation:
        flops = 4.0 * width * times
        return Operation("attention", flops * pairs, flops * unmasked, moved * width * a)

    found += [
        attention(1, 2 * written + 2 * batch * seen * depth),
        Operation("GELU", bytes=2 * written * hidden * a),
        Operation("norms and residuals", bytes=2 * norms * width * a),
    ]
    if not training:
        return found
    parameters = models.count(config)
    mapped_back = coordinates == "pre_ln" and config.norm != "pre_ln"
    return [
        *found,
        attention(2, 4 * written + 4 * rows * depth),
        Operation("GELU", bytes=3 * written * hidden * a),
        Operation("norms and residuals", bytes=4 * norms * width * a),
        Operation("loss", bytes=3 * judged * classes * a),
        Operation("optimizer", bytes=7 * p * parameters),
        Operation("weight map", bytes=(p + a) * parameters * (2 if mapped_back else 1)),
    ]


def floors(found: list[Operation], device: Device = FLOOR_DEVICE) -> dict[str, float]:
    """Milliseconds of each part that a device can't go below."""
    sums: dict[str, float] = {}
    for each in found:
        sums[each.part] = sums.get(each.part, 0.0) + 1e3 * each.floor(device)
    return sums
