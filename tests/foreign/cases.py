"""The hard cases, as data: what is special about each model, and what its description has to say.

Each is run by `test_cases` in Flax Linen and in Flax NNX, with looped and with stacked layers, in every form that it allows.
"""

import dataclasses

from architecture import Config


@dataclasses.dataclass(frozen=True)
class Case:
    """A model. `gains`: whether readers may gain a bias (else an affine stays). `forms`: which forms it is run in; all, if not said."""

    fields: dict
    gains: bool = True
    forms: tuple[str, ...] = ("rms", "reflect", "drop", "packed")

    @property
    def config(self) -> Config:
        return Config(**self.fields)


VIT = {"patches": True, "extra": ("class",), "positions": "learned", "pool": "first"}

CASES = {
    # the norms
    "norm without scale": Case({"norm_scale": False}),
    "norm without bias": Case({"norm_bias": False}),
    "norm without both": Case({"norm_scale": False, "norm_bias": False}),
    "norms of queries and keys stay": Case({"qk_norm": True}),
    # norms and readers
    "one norm, several readers: parallel attention and mlp": Case({"parallel": True}),
    "several norms, one reader": Case({"final_norms": 2}),
    "several norms without affine, one reader": Case({"final_norms": 2, "norm_scale": False, "norm_bias": False}),
    "a final norm with two heads": Case({"heads_read": 2}),
    "mean pooling before the final norm": Case({"pool": "mean"}),
    "mean pooling after the final norm": Case({"pool": "mean after"}),
    # readers
    "separate q, k, v; kernels of rank 3": Case({}),
    "separate q, k, v; kernels of rank 2": Case({"qkv": "flat"}),
    "fused q, k, v; kernels of rank 4": Case({"qkv": "fused"}),
    "grouped queries": Case({"heads": 4, "kv_heads": 2}),
    "gated mlp": Case({"mlp": "gated"}),
    "mixture of experts with router": Case({"mlp": "experts"}),
    "readers without bias gain one": Case({"reader_bias": False}),
    "readers without bias, beta stays": Case({"reader_bias": False}, gains=False, forms=("rms",)),
    "experts without bias, norm without beta": Case({"reader_bias": False, "mlp": "experts", "norm_bias": False}),
    # where the main branch starts
    "patch embedding; class token": Case(VIT),
    "distillation token": Case({**VIT, "extra": ("distillation", "class")}),
    "register tokens": Case({**VIT, "extra": ("register", "class")}),
    "learned positions": Case({"positions": "learned"}),
    "learned positions added after the class token": Case({**VIT, "positions_last": True}),
    "constant positions": Case({"positions": "constant"}),
    "constant positions added after the class token": Case({**VIT, "positions": "constant", "positions_last": True}),
    "segments": Case({"segments": True, "positions": "learned"}),
    "norm right behind the embedding": Case({"embed_norm": True, "positions": "learned"}),
    "tied table": Case({"tied": True, "positions": "learned"}),
    # between a residual branch and the main branch
    "LayerScale": Case({"layer_scale": True}),
    "LayerScale over experts": Case({"layer_scale": True, "mlp": "experts"}),
    "stochastic depth": Case({"drop_path": 0.4}),
    "adapted writers (LoRA)": Case({"lora": 2}),
    "adapted writers (LoRA) behind LayerScale": Case({"lora": 2, "layer_scale": True}),
    "dropout on residual branches": Case({"dropout": 0.4}),
    # how it is run
    "recomputed blocks": Case({"remat": True}),
    "an odd width": Case({"width": 7, "nominal": 7}),
}
