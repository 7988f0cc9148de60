"""What of a model the devices of this process can do."""

import jax

from prenorm_jax.models.config import GPTConfig, ViTConfig, require


def require_platform(model: ViTConfig | GPTConfig) -> None:
    """Raises ConfigError for what would fail, or be something else, on the devices of this process."""
    require_float64(model)
    if jax.default_backend() == "cpu":
        require(model.dtype != "float16", "config.model.dtype", model.dtype, "float32 or bfloat16 on cpu")
        require(model.attention in ("auto", "xla"), "config.model.attention", model.attention, "auto or xla on cpu")


def require_float64(model: ViTConfig | GPTConfig) -> None:
    """Raises ConfigError for a model in float64 where JAX would make float32 of it."""
    wide = jax.config.read("jax_enable_x64")
    for field in ("dtype", "param_dtype"):
        given = getattr(model, field)
        allowed = "float32 or bfloat16, or JAX_ENABLE_X64=1 in the environment"
        require(wide or given != "float64", f"config.model.{field}", given, allowed)
