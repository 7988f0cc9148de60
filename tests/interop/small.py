"""Small checkpoints in HF's names, written without torch."""

import json
import pathlib

import ml_dtypes
import numpy as np

from prenorm_jax.interop.safetensors import Writer

WIDTH, DEPTH, VOCABULARY = 8, 2, 11
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": WIDTH,
    "n_layer": DEPTH,
    "vocab_size": VOCABULARY,
    "layer_norm_epsilon": 1e-5,
}


def gpt2(dtype=np.float32) -> dict[str, np.ndarray]:
    """The tensors of a tied GPT-2, and a causal mask beside them, as old files have it."""
    rng = np.random.default_rng(0)
    shapes = {
        "wte.weight": (VOCABULARY, WIDTH),
        "wpe.weight": (5, WIDTH),
        "ln_f.weight": (WIDTH,),
        "ln_f.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (WIDTH,), f"h.{i}.{norm}.bias": (WIDTH,)}
        for name, shape in (
            ("attn.c_attn", (WIDTH, 3 * WIDTH)),
            ("attn.c_proj", (WIDTH, WIDTH)),
            ("mlp.c_fc", (WIDTH, 4 * WIDTH)),
            ("mlp.c_proj", (4 * WIDTH, WIDTH)),
        ):
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
    tensors = {f"transformer.{name}": rng.normal(0.3, 1, shape).astype(dtype) for name, shape in shapes.items()}
    return tensors | {"transformer.h.0.attn.bias": np.tril(np.ones((1, 1, 5, 5), bool))}


def write_file(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file."""
    with Writer(path, {name: (value.dtype, value.shape) for name, value in tensors.items()}, {"format": "pt"}) as file:
        for name, value in tensors.items():
            file.write(name, value)


def write(folder: pathlib.Path, tensors=None, config=None, shards=1) -> pathlib.Path:
    """A folder as transformers leaves it, with a tokenizer and a model card beside the weights."""
    tensors = gpt2() if tensors is None else tensors
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    held = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    weight_map = {name: held[n % shards] for n, name in enumerate(tensors)}
    for shard in held:
        write_file(folder / shard, {name: value for name, value in tensors.items() if weight_map[name] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
