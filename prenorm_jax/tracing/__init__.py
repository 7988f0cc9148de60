"""LayerNorm becomes RMSNorm in any JAX program, found and proven by tracing."""

from prenorm_jax.tracing.convert import Converted, convert
from prenorm_jax.tracing.decision import ConversionError
from prenorm_jax.tracing.describe import trace
from prenorm_jax.tracing.report import Report, SiteReport
from prenorm_jax.tracing.rules import register_rule

__all__ = ["ConversionError", "Converted", "Report", "SiteReport", "convert", "register_rule", "trace"]
