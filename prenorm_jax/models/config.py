"""What a model is: frozen records, the paper's sizes, and one clear line for an impossible value.

Sizes: ViT Ti to H from Dosovitskiy et al. (2021) and DeiT, G/14 from Zhai et al. (2022) as the paper uses it (MLP 8192); GPT from
Brown et al. (2020), table 2.1, with head counts that multiply to the width (XL: 16 x 128, where the table prints 24; 13B: 5120, not 5140).
"""

import dataclasses
import math

NORMS = ("pre_ln", "pre_rmsnorm", "pre_crmsnorm", "no_norm")
BASES = ("reflect", "drop")
LAYOUTS = ("packed", "compact")
ATTENTIONS = ("auto", "xla", "cudnn")
GELUS = ("tanh", "erf")
DTYPES = ("bfloat16", "float16", "float32", "float64")
POOLS = ("cls", "mean")
POSITIONS = ("learned", "sincos")


class ConfigError(ValueError):
    """An impossible setting: the message is one line with the field, what was given and what is allowed."""


def require(ok: bool, field: str, given: object, allowed: str) -> None:
    """Raises ConfigError("field: got given; allowed: allowed") unless `ok`."""
    if not ok:
        raise ConfigError(f"{field}: got {given!r}; allowed: {allowed}")


def require_one_of(field: str, given: object, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless `given` is one of the names in `allowed`."""
    require(given in allowed, field, given, ", ".join(allowed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer:
    """What ViT and GPT share. `width` is the nominal width D of the Pre-LN model in every variant.

    norm, basis, layout choose the variant (prenorm_jax.models.variants); basis and layout matter to pre_crmsnorm alone.
    dtype is the dtype of the computation, param_dtype that of the parameters; norms take their statistics in float32 or wider.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    norm: str = "pre_ln"
    basis: str = "reflect"
    layout: str = "packed"
    eps: float = 1e-6
    gelu: str = "tanh"
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "auto"
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        for field in ("width", "depth", "heads", "mlp_width"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"model.{field}", value, "an integer > 0")
        require(self.width >= 2, "model.width", self.width, "at least 2")
        require(self.width % self.heads == 0, "model.heads", self.heads, f"a divisor of model.width = {self.width}")
        require_one_of("model.norm", self.norm, NORMS)
        require_one_of("model.basis", self.basis, BASES)
        require_one_of("model.layout", self.layout, LAYOUTS)
        require(isinstance(self.eps, float) and 0 < self.eps < math.inf, "model.eps", self.eps, "a float > 0")
        require_one_of("model.gelu", self.gelu, GELUS)
        require_one_of("model.dtype", self.dtype, DTYPES)
        require_one_of("model.param_dtype", self.param_dtype, DTYPES)
        require_one_of("model.attention", self.attention, ATTENTIONS)
        for field in ("scan_layers", "remat"):
            require(isinstance(getattr(self, field), bool), f"model.{field}", getattr(self, field), "True or False")

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(Transformer):
    """A Vision Transformer: (B, image_size, image_size, channels) pixels to (B, classes) logits."""

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    classes: int = 1000
    pool: str = "cls"
    positions: str = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("image_size", "patch_size", "channels", "classes"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"model.{field}", value, "an integer > 0")
        require(
            self.image_size % self.patch_size == 0,
            "model.patch_size",
            self.patch_size,
            f"a divisor of model.image_size = {self.image_size}",
        )
        require_one_of("model.pool", self.pool, POOLS)
        require_one_of("model.positions", self.positions, POSITIONS)
        require(
            self.positions == "learned" or self.width % 4 == 0,
            "model.positions",
            self.positions,
            f"learned, or sincos where 4 divides model.width = {self.width}",
        )

    @property
    def patches(self) -> int:
        """Patches in an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """L: patches, and one class token where the model pools by it."""
        return self.patches + (self.pool == "cls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig(Transformer):
    """A GPT: (B, L) int token ids to (B, L, padded_vocab) logits; only the first `vocab_size` columns mean anything."""

    context: int = 1024
    vocab_size: int = 50257
    vocab_multiple: int = 128
    tied: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("context", "vocab_size", "vocab_multiple"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"model.{field}", value, "an integer > 0")
        require(isinstance(self.tied, bool), "model.tied", self.tied, "True or False")

    @property
    def padded_vocab(self) -> int:
        """V: vocab_size rounded up to a multiple of vocab_multiple, so that the matrix units run at full speed."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def _shape(width: int, depth: int, heads: int, mlp_width: int | None = None) -> dict[str, int]:
    return {"width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width or 4 * width}


VIT_SIZES = {
    "Ti": _shape(192, 12, 3),
    "S": _shape(384, 12, 6),
    "B": _shape(768, 12, 12),
    "L": _shape(1024, 24, 16),
    "H": _shape(1280, 32, 16),
    "G": _shape(1664, 48, 16, 8192),
}

GPT_SIZES = {
    "small": _shape(768, 12, 12),
    "medium": _shape(1024, 24, 16),
    "large": _shape(1536, 24, 16),
    "xl": _shape(2048, 24, 16),
    "2.7b": _shape(2560, 32, 32),
    "6.7b": _shape(4096, 32, 32),
    "13b": _shape(5120, 40, 40),
}


def vit_config(name: str, **fields: object) -> ViTConfig:
    """`vit_config("B/16")`: a named ViT (Ti, S, B, L, H, G, then the patch size); further fields override.

    >>> vit_config("S/16", classes=10).width
    384
    """
    size, _, patch = name.partition("/")
    require_one_of("model.variant's size", size, tuple(VIT_SIZES))
    require(patch.isdigit(), "model.variant's patch size", patch, "an integer, as in B/16")
    return ViTConfig(**{**VIT_SIZES[size], "patch_size": int(patch), **fields})  # type: ignore[arg-type]


def gpt_config(name: str, **fields: object) -> GPTConfig:
    """`gpt_config("small")`: a named GPT (small, medium, large, xl, 2.7b, 6.7b, 13b); further fields override.

    >>> gpt_config("medium").depth
    24
    """
    require_one_of("model.size", name, tuple(GPT_SIZES))
    return GPTConfig(**{**GPT_SIZES[name], **fields})  # type: ignore[arg-type]
