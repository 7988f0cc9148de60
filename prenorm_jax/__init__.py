"""Pre-RMSNorm and Pre-CRMSNorm Transformers in JAX: LayerNorm's redundant mean, removed exactly."""

from prenorm_jax import layouts
from prenorm_jax.main_branch import LayoutError, MainBranch, Norm, Reader, Writer
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
    zero_mean_gauge,
)
from prenorm_jax.version import VERSION

__version__ = VERSION

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
    "convert",
    "crms_norm",
    "crms_norm_packed",
    "decompress",
    "fold_affine",
    "layer_norm",
    "layouts",
    "manifest",
    "pack",
    "plain_eps",
    "recenter",
    "rms_norm",
    "strip_affine",
    "to_plain_rmsnorm",
    "to_pre_crmsnorm",
    "to_pre_ln",
    "to_pre_rmsnorm",
    "trace",
    "unpack",
    "zero_mean_gauge",
]
