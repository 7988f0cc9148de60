"""What a model is: frozen records, the paper's sizes, and one clear line for an impossible value.

Sizes: ViT Ti to H from Dosovitskiy et al. (2021) and DeiT, G/14 from Zhai et al. (2022) as the paper uses it (MLP 8192); GPT from
Brown et al. (2020), table 2.1, with head counts that multiply to the width (XL: 16 x 128, where the table prints 24; 13B: 5120, not 5140).
"""

import dataclasses
import math

NORMS = ("pre_ln", "pre_rmsnorm", "pre_crmsnorm", "no_norm")
BASES = ("reflect", "drop")
LAYOUTS = ("packed", "compact")
ATTENTIONS = ("auto", "xla", "cudnn", "hopper")
GELUS = ("tanh", "erf")
DTYPES = ("bfloat16", "float16", "float32", "float64")
POOLS = ("cls", "mean", "cls_and_mean")
POSITIONS = ("learned", "sincos")
POSITIONED = ("patches", "special", "all")
REMAT_SAVES = ("nothing", "products", "activations")
DISTILLED = ("none", "token", "head")


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
    bias: whether the blocks' linear maps and all norms have one; qkv_bias: whether query, key and value have one beside that.
    layer_scale: whether what a branch writes is multiplied by a learned vector (Touvron et al., 2021), of layer_scale_init at first.
    scan_layers: whether the layers are stacked, a leaf for all of them, and run in one loop, which compiles in the time of one layer.
    unroll: whether stacked layers run one after the other, without the loop: the fastest step, since whatever maps, casts or updates
      weights is one kernel for all layers.
    remat: whether the backward pass recomputes the blocks; remat_saves: what it needn't: nothing, products (of matrices; not attention), or
      activations (everything but weights, which are then gathered along the mesh's fsdp axis once more).
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
    bias: bool = True
    qkv_bias: bool = True
    layer_scale: bool = False
    layer_scale_init: float = 1.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "auto"
    scan_layers: bool = False
    unroll: bool = False
    remat: bool = False
    remat_saves: str = "nothing"

    def __post_init__(self) -> None:
        self._require_counts("width", "depth", "heads", "mlp_width")
        require(self.width >= 2, "model.width", self.width, "at least 2")
        require(self.width % self.heads == 0, "model.heads", self.heads, f"a divisor of model.width = {self.width}")
        require_one_of("model.norm", self.norm, NORMS)
        require_one_of("model.basis", self.basis, BASES)
        require_one_of("model.layout", self.layout, LAYOUTS)
        require(isinstance(self.eps, float) and 0 < self.eps < math.inf, "model.eps", self.eps, "a float > 0")
        init = self.layer_scale_init
        require(isinstance(init, float) and math.isfinite(init), "model.layer_scale_init", init, "a float")
        require_one_of("model.gelu", self.gelu, GELUS)
        require_one_of("model.dtype", self.dtype, DTYPES)
        require_one_of("model.param_dtype", self.param_dtype, DTYPES)
        require_one_of("model.attention", self.attention, ATTENTIONS)
        require_one_of("model.remat_saves", self.remat_saves, REMAT_SAVES)
        self._require_bools("scan_layers", "unroll", "remat", "bias", "qkv_bias", "layer_scale")

    def _require_counts(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            counts = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
            require(counts, f"model.{field}", value, "an integer > 0, below 2**31")

    def _require_bools(self, *fields: str) -> None:
        for field in fields:
            require(isinstance(getattr(self, field), bool), f"model.{field}", getattr(self, field), "True or False")

    @property
    def recomputes(self) -> str | None:
        """`remat_saves` where the backward pass recomputes the blocks."""
        return self.remat_saves if self.remat else None

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(Transformer):
    """A Vision Transformer: (B, image_size, image_size, channels) pixels to (B, classes) logits.

    Tokens are, in this order: the class token, the distillation token, the registers, the patches; all but the patches are optional.

    pool: what the head reads: cls (the class token), mean (of the patches), cls_and_mean (both, through a kernel each).
    class_token: whether there is a class token that nobody pools by ("mean" has none otherwise).
    norm_after_pool: whether the final norm sees the mean of the tokens, not the tokens.
    distilled: none, token (DeiT's second token) or head (and a second head, which reads it; the logits are the mean of both).
    registers: how many tokens without a meaning (Darcet et al., 2024).
    positioned: which tokens a learned position is added to: patches, special (also class and distillation token), all (also registers).
    pre_logits: the width of a linear map and a tanh before the head; 0 for none.
    head: False for a model that returns the pooled features themselves, (B, D), or (B, pre_logits).
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    classes: int = 1000
    pool: str = "cls"
    positions: str = "learned"
    class_token: bool = False
    norm_after_pool: bool = False
    distilled: str = "none"
    registers: int = 0
    positioned: str = "special"
    pre_logits: int = 0
    head: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_counts("image_size", "patch_size", "channels", "classes")
        require(
            self.image_size % self.patch_size == 0,
            "model.patch_size",
            self.patch_size,
            f"a divisor of model.image_size = {self.image_size}",
        )
        require_one_of("model.pool", self.pool, POOLS)
        require_one_of("model.positions", self.positions, POSITIONS)
        require_one_of("model.positioned", self.positioned, POSITIONED)
        require_one_of("model.distilled", self.distilled, DISTILLED)
        for field in ("registers", "pre_logits"):
            value = getattr(self, field)
            require(isinstance(value, int) and value >= 0, f"model.{field}", value, "an integer >= 0")
        self._require_bools("class_token", "norm_after_pool", "head")
        require(
            self.pool == "mean" or not self.norm_after_pool, "model.norm_after_pool", True, "False unless pool = mean"
        )
        plain_head = self.head and self.pool == "cls" and not self.pre_logits
        require(
            plain_head or self.distilled != "head", "model.distilled", "head", "token, or pool = cls with a plain head"
        )
        require(
            self.pool != "cls_and_mean" or not self.pre_logits,
            "model.pre_logits",
            self.pre_logits,
            "0 for cls_and_mean",
        )
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
        """L: patches, special tokens and registers."""
        return self.patches + self.special_tokens + self.registers

    @property
    def has_class_token(self) -> bool:
        """Whether there is a class token: where the model pools by it, or where the config says so."""
        return self.class_token or self.pool != "mean"

    @property
    def special_tokens(self) -> int:
        """Class and distillation token."""
        return self.has_class_token + (self.distilled != "none")

    @property
    def final_readers(self) -> tuple[str, ...]:
        """The linear maps that read the final norm: none where the model returns its value."""
        if self.pre_logits:
            return ("pre_logits",)
        further = {"head_mean": self.pool == "cls_and_mean", "head_distilled": self.distilled == "head"}
        return ("head", *(name for name, there in further.items() if there)) if self.head else ()

    @property
    def read_tokens(self) -> int | None:
        """How many tokens, from the first on, the head reads behind the last block; None: all."""
        return None if self.pool != "cls" else 2 if self.distilled == "head" else 1

    @property
    def position_rows(self) -> int:
        """Rows of a learned position table."""
        before = {"patches": 0, "special": self.special_tokens, "all": self.special_tokens + self.registers}
        return self.patches + before[self.positioned]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig(Transformer):
    """A GPT: (B, L) int token ids to (B, L, padded_vocab) logits; only the first `vocab_size` columns mean anything.

    tied: whether the head is the embedding table; else head_bias says whether it has a bias.
    """

    context: int = 1024
    vocab_size: int = 50257
    vocab_multiple: int = 128
    tied: bool = True
    head_bias: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_counts("context", "vocab_size", "vocab_multiple")
        self._require_bools("tied", "head_bias")

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
