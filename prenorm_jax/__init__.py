"""Pre-RMSNorm and Pre-CRMSNorm Transformers in JAX: LayerNorm's redundant mean, removed exactly."""

import typing as _typing

from prenorm_jax import layouts
from prenorm_jax.bases import compress_activation, expand_activation, recenter_activation
from prenorm_jax.main_branch import LayoutError, MainBranch, Norm, Reader, Writer, side_by_side
from prenorm_jax.manifest import ManifestError, check_manifest, manifest
from prenorm_jax.norms import crms_norm, crms_norm_packed, layer_norm, rms_norm
from prenorm_jax.tracing import ConversionError, Converted, convert, trace
from prenorm_jax.transforms import (
    compress,
    decompress,
    fold_affine,
    pack,
    plain_eps,
    recenter,
    strip_affine,
    to_plain_rmsnorm,
    to_pre_crmsnorm,
    to_pre_ln,
    to_pre_rmsnorm,
    unpack,
    untie,
    zero_mean_gauge,
)
from prenorm_jax.version import VERSION

__version__ = VERSION


def __getattr__(name: str) -> _typing.Any:
    """What needs flax is imported when it is asked for: this package itself needs jax and numpy alone."""
    if name not in ("intercept_norms", "swap_norms"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prenorm_jax import models

    globals()[name] = getattr(models, name)
    return globals()[name]


__all__ = [
    "ConversionError",
    "Converted",
    "LayoutError",
    "MainBranch",
    "ManifestError",
    "Norm",
    "Reader",
    "Writer",
    "check_manifest",
    "compress",
    "compress_activation",
    "convert",
    "crms_norm",
    "crms_norm_packed",
    "decompress",
    "expand_activation",
    "fold_affine",
    "intercept_norms",
    "layer_norm",
    "layouts",
    "manifest",
    "pack",
    "plain_eps",
    "recenter",
    "recenter_activation",
    "rms_norm",
    "side_by_side",
    "strip_affine",
    "swap_norms",
    "to_plain_rmsnorm",
    "to_pre_crmsnorm",
    "to_pre_ln",
    "to_pre_rmsnorm",
    "trace",
    "unpack",
    "untie",
    "zero_mean_gauge",
]
