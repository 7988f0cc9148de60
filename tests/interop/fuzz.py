"""Hostile files for the readers, and what has to hold for every one of them.

A file is read whole or refused with FormatError (a checkpoint is planned or refused): no other exception, no second of time, and no
more memory than its size (and what a small one takes anyhow). What is accepted as safetensors, the format's own library accepts, too,
and reads the same.

    PYTHONPATH=. python tests/interop/fuzz.py --inputs=100000 --json=results/interop/fuzz.json       random mutations of valid files
    PYTHONPATH=. python tests/interop/fuzz.py --atheris --inputs=100000                      guided by coverage (pip install atheris)
"""

import argparse
import contextlib
import io
import json
import pathlib
import random
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable

import numpy as np
from safetensors import safe_open

if "--atheris" in sys.argv:
    import atheris

    watched = atheris.instrument_imports(include=["prenorm_jax"])
else:
    watched = contextlib.nullcontext()
with watched:
    from prenorm_jax.interop.formats import open_checkpoint
    from prenorm_jax.interop.plan import RefusedError, make_plan
    from prenorm_jax.interop.tensors import FormatError
    from prenorm_jax.main_branch import LayoutError

SECONDS = 1.0
BASELINE = 1 << 20  # what JSON, zipfile and a plan take for a file of a few hundred bytes
Pick = Callable[[int], int]  # a number below another one: a random one, or one that a fuzzer chooses

NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63), 1.5, 1e308, True]
VALUES = [*NUMBERS, None, "", "F32", "../up", "/etc/passwd", "a\0b", "\ud800", [], {}, [[]], [1], {"a": 1}, "x" * 5000]
NAMES = ["", "..", "../x", "a/../b", "/abs", "C:\\x", "a\0", "__metadata__", "h.0.ln_1.weight", "x" * 5000, "\u202e"]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "Q4", "f32", ""]
CONFIG = {"model_type": "gpt2", "n_embd": 4, "n_layer": 1, "vocab_size": 5, "architectures": ["GPT2LMHeadModel"]}
GPT2 = {
    "wte.weight": (5, 4),
    "wpe.weight": (3, 4),
    **{f"h.0.{norm}.{leaf}": (4,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")},
    "h.0.attn.c_attn.weight": (4, 12),
    "h.0.attn.c_attn.bias": (12,),
    "h.0.attn.c_proj.weight": (4, 4),
    "h.0.attn.c_proj.bias": (4,),
    "h.0.mlp.c_fc.weight": (4, 8),
    "h.0.mlp.c_fc.bias": (8,),
    "h.0.mlp.c_proj.weight": (8, 4),
    "h.0.mlp.c_proj.bias": (4,),
    "ln_f.weight": (4,),
    "ln_f.bias": (4,),
}


def safetensors_file(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file of that header and those bytes, whatever they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_of(shapes: dict, dtype: str = "F32", item: int = 4) -> tuple[dict, int]:
    """A valid header, and the bytes that it describes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * item
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header, end


def bytes_changed(pick: Pick, data: bytes) -> bytes:
    """Flipped, cut out, doubled or cut off."""
    for _ in range(pick(4)):
        at, many = pick(len(data) + 1), pick(12)
        data = [
            data[:at] + bytes([pick(256)]) + data[at + 1 :],
            data[:at] + data[at + many :],
            data[:at] + data[at : at + many] * 2 + data[at + many :],
            data[:at],
            data + bytes(many),
        ][pick(5)]
    return data


def hostile_safetensors(pick: Pick) -> bytes:
    header, end = header_of({"a": (2, 3), "b.c": (4,), "empty": (0, 5), "scalar": ()})
    name = list(header)[pick(len(header))]
    entry = header[name]
    match pick(9):
        case 0:
            entry[["dtype", "shape", "data_offsets", "more"][pick(4)]] = VALUES[pick(len(VALUES))]
        case 1:
            entry["shape"] = [NUMBERS[pick(len(NUMBERS))] for _ in range(pick(40))]
        case 2:
            entry["data_offsets"] = [NUMBERS[pick(len(NUMBERS))], NUMBERS[pick(len(NUMBERS))]]
        case 3:
            entry["data_offsets"] = [offset + pick(9) - 4 for offset in entry["data_offsets"]]
        case 4:
            header[NAMES[pick(len(NAMES))]] = header.pop(name)
        case 5:
            entry["dtype"] = DTYPES[pick(len(DTYPES))]
        case 6:
            header["__metadata__"] = VALUES[pick(len(VALUES))]
        case 7:
            text = json.dumps(header).encode()
            twice = text[:-1] + b"," + text[1:]
            return bytes_changed(pick, safetensors_file([twice, b"[" * pick(5000), text * 2][pick(3)], bytes(end)))
    length = None if pick(5) else [0, 1, 2**63, 2**64 - 1, 100_000_001, pick(1000)][pick(6)]
    return bytes_changed(pick, safetensors_file(header, bytes(end), length))


def hostile_index(pick: Pick) -> bytes:
    table = {"metadata": {"total_size": 64}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    match pick(5):
        case 0:
            table["weight_map"][["a", "c"][pick(2)]] = VALUES[pick(len(VALUES))]
        case 1:
            table["weight_map"]["a"] = NAMES[pick(len(NAMES))]
        case 2:
            table["weight_map"][NAMES[pick(len(NAMES))]] = "one.safetensors"
        case 3:
            table[["metadata", "weight_map"][pick(2)]] = VALUES[pick(len(VALUES))]
    return bytes_changed(pick, json.dumps(table).encode())


NPY_HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (-1, 3), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000000000000), }",
    "{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (2,), }",
    "{'descr': '<U100000000', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '|V2', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<f4', 'fortran_order': 3, 'shape': 7, }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 2, 0), }",
    "__import__('os').abort()",
    "((((((((((" * 200,
]


def hostile_npz(pick: Pick) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][pick(2)]) as archive:
        for name in ("a/kernel", "b", *([NAMES[pick(len(NAMES))]] if not pick(4) else [])):
            header = NPY_HEADERS[pick(len(NPY_HEADERS)) if not pick(3) else 0].encode()
            version = [b"\1\0", b"\2\0", b"\3\0", b"\x09\0"][pick(4) if not pick(6) else 0]
            length = struct.pack("<H" if version == b"\1\0" else "<I", min(len(header), 65535))
            size = 24 if pick(4) else [0, 6, 23, 300_000][pick(4)]
            archive.writestr(
                (name or "c").replace("\ud800", "") + ".npy", b"\x93NUMPY" + version + length + header + bytes(size)
            )
    return bytes_changed(pick, buffer.getvalue())


def hostile_config(pick: Pick) -> bytes:
    """A GPT-2 of one layer, its config or its names and shapes changed: config.json, a line feed, and the safetensors file."""
    config, shapes = dict(CONFIG), dict(GPT2)
    for _ in range(pick(3)):
        config[[*CONFIG, "tie_word_embeddings", "layer_norm_epsilon", "quantization_config"][pick(8)]] = VALUES[
            pick(len(VALUES))
        ]
    for _ in range(pick(3)):
        name = list(shapes)[pick(len(shapes))]
        match pick(4):
            case 0:
                del shapes[name]
            case 1:
                shapes[name] = tuple(pick(6) for _ in range(pick(4)))
            case 2:
                shapes[["lm_head.weight", "h.1.ln_1.weight", "h.x.ln_1.weight", "transformer.wte.weight"][pick(4)]] = (
                    shapes.pop(name)
                )
    header, end = header_of(shapes, *[("F32", 4), ("BF16", 2), ("I8", 1)][pick(3) if not pick(4) else 0])
    return json.dumps(config).encode("utf-8", "surrogatepass") + b"\n" + safetensors_file(header, bytes(end))


KINDS: dict[str, Callable[[Pick], bytes]] = {
    "safetensors": hostile_safetensors,
    "index": hostile_index,
    "npz": hostile_npz,
    "config": hostile_config,
}


class Room:
    """A folder in which each input is laid down as the file that it is."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        for name, tensor in (("one", "a"), ("two", "b")):
            header, end = header_of({tensor: (2, 2)})
            (folder / f"{name}.safetensors").write_bytes(safetensors_file(header, bytes(end)))
        (folder / "planned").mkdir()

    def lay(self, kind: str, data: bytes) -> pathlib.Path:
        if kind == "config":
            config, _, data = data.partition(b"\n")
            (self.folder / "planned" / "config.json").write_bytes(config)
            path = self.folder / "planned" / "model.safetensors"
        else:
            path = (
                self.folder
                / {"safetensors": "x.safetensors", "index": "model.safetensors.index.json", "npz": "x.npz"}[kind]
            )
        path.write_bytes(data)
        return {"index": path.parent, "config": path.parent}.get(kind, path)

    def check(self, kind: str, data: bytes) -> bool:
        """Whether an input is accepted. Raises: AssertionError where it costs too much or is read wrongly; whatever a reader raises."""
        path = self.lay(kind, data)
        values, seconds, peak = self._read(path, kind)
        if seconds >= SECONDS or peak >= BASELINE + len(data):
            # Another process had the core, or one of the interpreter's own tables grew: that does not happen twice.
            values, seconds, peak = self._read(path, kind)
        assert seconds < SECONDS, f"{seconds:.1f} s"
        assert peak < BASELINE + len(data), f"{peak} bytes for a file of {len(data)}"
        if values is not None and kind == "safetensors":
            with safe_open(path, framework="np") as file:
                assert set(file.keys()) == set(values)
                for name, value in values.items():
                    if value.dtype.itemsize > 1:  # numpy alone has no 8-bit floats for the library to give
                        assert np.array_equal(file.get_tensor(name), value, equal_nan=value.dtype.kind in "fc"), name
        return values is not None

    def _read(self, path: pathlib.Path, kind: str) -> tuple[dict[str, np.ndarray] | None, float, int]:
        """The tensors, or None where the file is refused; seconds; bytes."""
        tracemalloc.start()
        start = time.perf_counter()
        try:
            checkpoint = open_checkpoint(path)
            values = checkpoint.read()
            if kind == "config":
                make_plan(checkpoint)
        except (FormatError, RefusedError, LayoutError):
            values = None
        finally:
            seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return values, seconds, peak


def run(inputs: int, seed: int, room: Room) -> dict[str, dict[str, int]]:
    """Random inputs of all kinds in turn; how many of each were accepted and refused."""
    rng = random.Random(seed)
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    for number in range(inputs):
        kind = list(KINDS)[number % len(KINDS)]
        state = rng.getstate()
        try:
            counts[kind]["accepted" if room.check(kind, KINDS[kind](rng.randrange)) else "refused"] += 1
        except BaseException:
            rng.setstate(state)
            print(f"input {number}, {kind}: {KINDS[kind](rng.randrange)[:2000]!r}", file=sys.stderr)
            raise
    return {kind: dict(count) for kind, count in counts.items()}


def run_guided(inputs: int, room: Room) -> None:
    """The same, where atheris chooses the mutations by the code that they reach. Ends the process."""

    def one(data: bytes) -> None:
        chosen = atheris.FuzzedDataProvider(data)
        kind = list(KINDS)[chosen.ConsumeIntInRange(0, len(KINDS) - 1)]
        room.check(kind, KINDS[kind](lambda below: chosen.ConsumeIntInRange(0, below - 1)))

    atheris.Setup([sys.argv[0], f"-runs={inputs}", "-timeout=5", "-rss_limit_mb=2048", "-max_len=4096"], one)
    atheris.Fuzz()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None) as folder:
        room = Room(pathlib.Path(folder))
        if chosen.atheris:
            run_guided(chosen.inputs, room)
        start = time.perf_counter()
        counts = run(chosen.inputs, chosen.seed, room)
        text = json.dumps(
            {"inputs": chosen.inputs, "seed": chosen.seed, "seconds": time.perf_counter() - start, **counts}, indent=2
        )
        print(text)
        if chosen.json:
            chosen.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
