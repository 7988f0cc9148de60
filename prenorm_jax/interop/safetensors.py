"""The safetensors format: a length (8 bytes, little endian), that many bytes of JSON, and the tensors' bytes without gaps.

The header says name -> {dtype, shape, data_offsets}, and under "__metadata__" text -> text. Source: the format's description at
https://github.com/huggingface/safetensors. Tensors are read and written one by one with plain file reads, so that memory holds one
tensor whatever the file's size (pages of a mapped file would count until the system wants them back), and every claim of a header is
checked against the file before a byte of data is touched.
"""

import json
import math
import os
import pathlib
import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from prenorm_jax.interop.tensors import SHAPE, FormatError, Tensor, checked_name, is_shape

MAX_HEADER = 100_000_000  # the limit of the format's own library
METADATA = "__metadata__"

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "C64": np.complex64,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, unread, and its metadata.

    Raises: FormatError for whatever in the file contradicts the format or the file's size; OSError as the system does.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise FormatError(f"{path}: {size} bytes; expected at least the 8 of a safetensors header's length")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER):
            raise FormatError(
                f"{path}: its header claims {length} bytes of a file of {size}; truncated, or not safetensors at all"
            )
        entries = json_object(file.read(length), path)
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: {METADATA} is not a table of text; the header is corrupt")
    tensors, begins = {}, {}
    for name, entry in entries.items():
        dtype, shape, (begin, end) = _checked(name, entry, path)
        begins[name] = begin, end
        tensors[name] = Tensor(name, dtype, shape, path, _reader(path, 8 + length + begin, dtype, shape))
    _check_tiling(begins, size - 8 - length, path)
    return tensors, metadata


def json_object(text: bytes, path: pathlib.Path) -> dict[str, Any]:
    """A JSON object, no key of it twice. Raises: FormatError for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise FormatError(f"{path}: {twice[:80]!r} occurs twice in it; expected every name once")
        return found

    try:
        found = json.loads(text.decode(), object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON ({str(error)[:120]}); truncated or corrupt") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: its JSON is a {type(found).__name__}; expected an object")
    return found


def _checked(name: str, entry: Any, path: pathlib.Path) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and offsets of a header's entry, as far as they can be told without the others."""
    where = f"{path}: tensor {checked_name(name, path)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: its entry does not hold dtype, shape and data_offsets; the header is corrupt")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise FormatError(f"{where}: dtype {str(entry['dtype'])[:40]!r}; expected one of {', '.join(DTYPES)}")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not is_shape(shape, dtype.itemsize):
        raise FormatError(f"{where}: shape {str(shape)[:80]}; expected {SHAPE}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_shape([offset], 1) for offset in offsets):
        raise FormatError(f"{where}: data_offsets {str(offsets)[:80]}; expected [begin, end]")
    begin, end = offsets
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise FormatError(
            f"{where}: {end - begin} bytes for shape {tuple(shape)} of {entry['dtype']}; expected {str(expected)[:20]}"
        )
    return dtype, tuple(shape), (begin, end)


def _check_tiling(offsets: Mapping[str, tuple[int, int]], size: int, path: pathlib.Path) -> None:
    """The tensors' bytes are the file's, each once."""
    last, end = "the header", 0
    for name, (begin, stop) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != end:
            fault = "overlaps" if begin < end else "leaves a gap behind"
            raise FormatError(
                f"{path}: tensor {name} {fault} {last} (byte {begin}, expected {end}); the header is corrupt"
            )
        last, end = f"tensor {name}", stop
    if end != size:
        raise FormatError(f"{path}: {size} bytes of data; its header describes {end}; truncated or corrupt")


def _reader(path: pathlib.Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    def read_it() -> np.ndarray:
        count = math.prod(shape)
        # As bytes, since fromfile knows the builtin dtypes alone.
        found = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=offset)
        if found.size != count * dtype.itemsize:
            raise FormatError(
                f"{path}: ends before byte {offset + count * dtype.itemsize}; did it change while it was read?"
            )
        return found.view(dtype).reshape(shape)

    return read_it


class Writer:
    """A file whose tensors are known by dtype and shape, and written in any order, each once; a context manager.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> with Writer(path, {"a": (np.dtype("float32"), (2,))}) as file:
    ...     file.write("a", np.ones(2, np.float32))
    >>> read(path)[0]["a"].read()
    array([1., 1.], dtype=float32)
    """

    def __init__(
        self,
        path: pathlib.Path,
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Writes the header, and makes the file as long as it will be. Raises: OSError where it exists or the disk is full."""
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
        end = 0
        # Larger items first, as the format's library does, so that every tensor is aligned to its item.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._offsets[name] = begin
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file: BinaryIO = path.open("xb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        if end and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, self._start + end)  # a full disk is found out now

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes a tensor. Raises: ValueError for one that is not as announced, or a second time."""
        dtype, shape = self._tensors[name]
        if (value.dtype, value.shape) != (dtype, shape) or name not in self._offsets:
            raise ValueError(f"{name}: {value.dtype} {value.shape}; expected {dtype} {shape}, once")
        self._file.seek(self._start + self._offsets.pop(name))
        self._file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, exception: object, *_: object) -> None:
        """On disk, when it returns. Raises: ValueError for tensors that were never written."""
        with self._file:
            if exception is None:
                if self._offsets:
                    raise ValueError(f"never written: {', '.join(self._offsets)}")
                self._file.flush()
                os.fsync(self._file.fileno())
