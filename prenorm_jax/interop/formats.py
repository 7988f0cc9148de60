"""Checkpoints on disk, whatever their format, as one thing: names to tensors that are read when they are wanted.

| format                 | what is looked for                                                                      | needs              |
| safetensors            | a .safetensors file; a folder with model.safetensors, or its shards and their index     |                    |
| torch                  | a .bin, .pt or .pth file; a folder with pytorch_model.bin, or its shards and their index | torch              |
| npz                    | an .npz file, as big_vision and vision_transformer write them                           |                    |
| orbax                  | a folder that Orbax wrote                                                               | orbax-checkpoint   |
| prenorm_jax            | a workdir of ours, with checkpoints/<step>/; the newest                                 | orbax-checkpoint   |

Nothing is ever unpickled: torch files go through `weights_only=True`, npz files through `allow_pickle=False`.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from prenorm_jax import fingerprints
from prenorm_jax.interop import safetensors
from prenorm_jax.interop.tensors import SHAPE, FormatError, Tensor, checked_name, is_shape

# What an array of a given size may look like when it is packed: more than this is no array of weights but a bomb.
MAX_COMPRESSION = 100
UNCHECKED_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened.

    Args:
      path: what was opened.
      format: the first column of the module's table.
      tensors: name -> tensor, unread.
      files: the files (or folders) that hold the tensors, the index of a sharded one among them.
      metadata: what a file says besides: a safetensors file's own table, what a torch file holds beside tensors, our stamp.
      config: config.json of its folder, where there is one.
    """

    path: pathlib.Path
    format: str
    tensors: Mapping[str, Tensor]
    files: tuple[pathlib.Path, ...]
    metadata: Mapping[str, Any]
    config: Mapping[str, Any] | None

    @property
    def folder(self) -> pathlib.Path:
        """Where its config.json, its tokenizer and whatever comes with it lie."""
        return _folder(self.path)

    def read(self) -> dict[str, np.ndarray]:
        """All of it, in memory."""
        return {name: tensor.read() for name, tensor in self.tensors.items()}


def open_checkpoint(path: str | pathlib.Path) -> Checkpoint:
    """Opens a file or a folder; reads headers alone.

    Raises: FormatError for what is no checkpoint, a corrupt one, or a format whose library is not installed; OSError as the system does.

    >>> import tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "vit.npz"
    >>> np.savez(file, **{"head/kernel": np.zeros((4, 2), np.float32)})
    >>> checkpoint = open_checkpoint(file)
    >>> checkpoint.format, checkpoint.tensors["head/kernel"].shape
    ('npz', (4, 2))
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FormatError(f"{path}: does not exist; expected a checkpoint's file or folder")
    kind, found = _in_folder(path) if path.is_dir() else (_kind_of_file(path), path)
    tensors, files, metadata = READERS[kind](found)
    if not tensors:
        raise FormatError(f"{found}: holds no tensor")
    return Checkpoint(path, kind.partition(",")[0], tensors, files, metadata, _config(path))


Contents = tuple[dict[str, Tensor], tuple[pathlib.Path, ...], Mapping[str, Any]]

SUFFIXES = {".safetensors": "safetensors", ".bin": "torch", ".pt": "torch", ".pth": "torch", ".npz": "npz"}
IN_FOLDER = {  # in the order in which the reference library looks for them
    "model.safetensors": "safetensors",
    "model.safetensors.index.json": "safetensors, sharded",
    "pytorch_model.bin": "torch",
    "pytorch_model.bin.index.json": "torch, sharded",
    "checkpoints": "prenorm_jax",
    "_METADATA": "orbax",
    "default/_METADATA": "orbax",
}


ADAPTERS = "adapter_config.json"


def _kind_of_file(path: pathlib.Path) -> str:
    if path.suffix not in SUFFIXES:
        raise FormatError(f"{path}: not a checkpoint that is known; expected {', '.join(SUFFIXES)}, or a folder")
    return SUFFIXES[path.suffix]


def _in_folder(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    if (folder / ADAPTERS).exists():
        raise FormatError(
            f"{folder / ADAPTERS}: adapters, which the library adds to the tensors beside them when it loads the folder; merge them first "
            "(peft: merge_and_unload, then save_pretrained), or take the model without them from a folder of its own"
        )
    for name, kind in IN_FOLDER.items():
        if (folder / name).exists():
            whole = kind in ("prenorm_jax", "orbax")
            return kind, (folder / name).parent if whole else folder / name
    raise FormatError(f"{folder}: no checkpoint in it; expected one of {', '.join(IN_FOLDER)}")


def _folder(path: pathlib.Path) -> pathlib.Path:
    return path if path.is_dir() else path.parent


def _config(path: pathlib.Path) -> dict[str, Any] | None:
    file = _folder(path) / "config.json"
    return safetensors.json_object(file.read_bytes(), file) if file.is_file() else None


def _safetensors(path: pathlib.Path) -> Contents:
    tensors, metadata = safetensors.read(path)
    return tensors, (path,), metadata


def _torch(path: pathlib.Path) -> Contents:
    torch = _library("torch", path, "torch files")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever its unpickler stumbles over
        raise FormatError(f"{path}: torch can't load it with weights_only=True ({_line(error)})") from None
    # Training scripts put the tensors under one of these, beside their optimizer.
    inner = [key for key in ("model", "state_dict", "model_state_dict") if _is_state(loaded, key, torch)]
    state = loaded[inner[0]] if inner else loaded
    if not isinstance(state, Mapping):
        raise FormatError(f"{path}: holds a {type(state).__name__}; expected names and tensors")
    tensors = {
        name: _torch_tensor(name, value, path, torch)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    beside = {**({k: v for k, v in loaded.items() if k not in inner} if inner else {}), **state}
    return (
        tensors,
        (path,),
        {key: value for key, value in beside.items() if isinstance(value, str | int | float | dict | list)},
    )


def _is_state(loaded: Any, key: str, torch: Any) -> bool:
    inner = loaded.get(key) if isinstance(loaded, Mapping) else None
    return isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values())


def _torch_tensor(name: Any, value: Any, path: pathlib.Path, torch: Any) -> Tensor:
    if not isinstance(name, str):
        raise FormatError(f"{path}: a tensor is named {str(name)[:80]!r}; expected text")
    halves = value.dtype == torch.bfloat16
    if value.layout != torch.strided or value.is_quantized:
        raise FormatError(f"{path}: tensor {name} is sparse or quantised; expected a plain one")
    if value.is_meta:
        raise FormatError(f"{path}: tensor {name} was saved without its data (device meta); expected a plain one")

    def read() -> np.ndarray:
        plain = value.detach().contiguous()
        return (plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if halves else plain.numpy()).copy()

    # numpy's name for the dtype, by way of an empty tensor of it.
    try:
        dtype = np.dtype(ml_dtypes.bfloat16) if halves else torch.empty(0, dtype=value.dtype).numpy().dtype
    except (TypeError, RuntimeError):
        word = str(value.dtype).removeprefix("torch.")
        raise FormatError(
            f"{path}: tensor {name} is of dtype {word}; expected one that numpy has, or bfloat16"
        ) from None
    return Tensor(checked_name(name, path), dtype, tuple(value.shape), path, read)


def _npz(path: pathlib.Path) -> Contents:
    with _broken_zip_is_format_error(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) < len(members):
            raise FormatError(f"{path}: a name occurs twice in it; expected every name once")
        found = [_npz_tensor(archive, member, path) for member in members]
    return {tensor.name: tensor for tensor in found}, (path,), {}


def _npz_tensor(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: pathlib.Path) -> Tensor:
    name = checked_name(member.filename.removesuffix(".npy"), path)
    if (
        member.file_size > max(MAX_COMPRESSION * member.compress_size, UNCHECKED_SIZE)
        or member.compress_size > path.stat().st_size
    ):
        raise FormatError(f"{path}: {name} would unpack to {member.file_size} bytes; no weights are packed so tightly")
    with archive.open(member) as file:
        shape, fortran, dtype = _npy_header(file, name, path)
        start = file.tell()
    held = member.file_size - start
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if held != expected:
        raise FormatError(
            f"{path}: {name} holds {held} bytes for shape {shape} of {dtype}; expected {str(expected)[:20]}"
        )
    # numpy has no word for bfloat16: two bytes of nothing in particular are it, as JAX saves them.
    meant = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype.newbyteorder("=")

    def read() -> np.ndarray:
        with _broken_zip_is_format_error(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            file.read(start)
            data = bytearray(file.read())
        if len(data) != expected:
            raise FormatError(f"{path}: {name} ends early; truncated or corrupt")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        return np.ascontiguousarray(
            array.view(meant) if dtype.kind == "V" else array.astype(meant, copy=False)
        ).reshape(shape)

    return Tensor(name, meant, shape, path, read)


def _npy_header(file: Any, name: str, path: pathlib.Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = versions[np.lib.format.read_magic(file)](file)
    except Exception as error:  # the header is a Python literal: it may fail in many ways
        raise FormatError(
            f"{path}: {name} is no array ({type(error).__name__} in its header); truncated or corrupt"
        ) from None
    if dtype.hasobject or (dtype.kind not in "fiubc" and dtype != np.dtype("V2")):
        raise FormatError(f"{path}: {name} is of dtype {str(dtype)[:80]}; expected numbers (nothing is ever unpickled)")
    if not is_shape(shape, dtype.itemsize):
        raise FormatError(f"{path}: {name} has shape {str(shape)[:80]}; expected {SHAPE}")
    return tuple(shape), fortran, dtype


@contextlib.contextmanager
def _broken_zip_is_format_error(path: pathlib.Path) -> Iterator[None]:
    """What zipfile raises for a corrupt file is many things; EINVAL is a seek to where no file can be."""
    try:
        yield
    except FormatError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise
        raise FormatError(f"{path}: not readable as a zip file ({error}); truncated or corrupt") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
        ValueError,
        struct.error,
    ) as error:
        raise FormatError(f"{path}: not readable as a zip file ({str(error)[:120]}); truncated or corrupt") from None


def _sharded(one: Callable[[pathlib.Path], Contents], index: pathlib.Path) -> Contents:
    """The tensors of all shards, held against their index."""
    table = safetensors.json_object(index.read_bytes(), index)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: no weight_map in it; expected names and the shards that hold them")
    shards = {str(shard): index.parent / _plain(shard, index) for shard in weight_map.values()}
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for shard, file in shards.items():
        if not file.is_file():
            lost = sum(value == shard for value in weight_map.values())
            raise FormatError(
                f"{index}: shard {shard} is missing, and with it {lost} of {len(weight_map)} tensors; fetch it again"
            )
        found, _, beside = one(file)
        metadata.update(beside)
        promised = {name for name, where in weight_map.items() if where == shard}
        for fault, wrong in (("lacks", promised - set(found)), ("holds more than", set(found) - promised)):
            if wrong:
                raise FormatError(
                    f"{file}: {fault} what {index.name} says: {_some(wrong)}; the two belong to different checkpoints"
                )
        tensors.update(found)
    return tensors, (index, *shards.values()), metadata


def _plain(shard: Any, index: pathlib.Path) -> str:
    """A file's name that stays in the folder. Raises: FormatError for any other."""
    name = shard if isinstance(shard, str) else ""
    if (
        not name
        or name in (".", "..")
        or any(sign in name for sign in "/\\:\0")
        or len(name.encode(errors="replace")) > 255
    ):
        raise FormatError(f"{index}: points to {str(shard)[:80]!r}; expected the plain name of a file beside it")
    return name


def _orbax(folder: pathlib.Path) -> Contents:
    ocp = _library("orbax.checkpoint", folder, "Orbax folders")
    folder = folder.absolute()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
    except Exception as error:  # a broken one fails in as many ways as it has parts
        raise FormatError(f"{folder}: Orbax can't read it ({_line(error)})") from None
    found = [_orbax_tensor(ocp, folder, tree, keys, leaf) for keys, leaf in _leaves(tree)]
    return {tensor.name: tensor for tensor in found}, (folder,), {}


Keys = tuple[str | int, ...]


def _leaves(tree: Any, keys: Keys = ()) -> Iterable[tuple[Keys, Any]]:
    if isinstance(tree, Mapping | list | tuple):
        for key, child in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _leaves(child, (*keys, key))
    elif tree is not None:
        yield keys, tree


def _alone(tree: Any, wanted: Keys, leaf: Any, other: Any, keys: Keys = ()) -> Any:
    """The tree with `leaf` at one place and `other` at all others."""
    if isinstance(tree, Mapping):
        return {key: _alone(child, wanted, leaf, other, (*keys, key)) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [_alone(child, wanted, leaf, other, (*keys, at)) for at, child in enumerate(tree)]
    return tree if tree is None else leaf if keys == wanted else other


def _orbax_tensor(ocp: Any, folder: pathlib.Path, tree: Any, keys: Keys, leaf: Any) -> Tensor:
    def read() -> np.ndarray:
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        args = ocp.args.PyTreeRestore(
            item=_alone(tree, keys, 0, ocp.PLACEHOLDER), restore_args=_alone(tree, keys, as_numpy, as_numpy)
        )
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                found = checkpointer.restore(folder, args=args)
        except Exception as error:
            raise FormatError(f"{folder}: Orbax can't read {name} ({_line(error)})") from None
        return np.array(functools.reduce(lambda inner, key: inner[key], keys, found))

    name = checked_name("/".join(map(str, keys)), folder)
    return Tensor(name, np.dtype(leaf.dtype), tuple(leaf.shape), folder, read)


def _ours(workdir: pathlib.Path) -> Contents:
    """The newest checkpoint that a training run of this package left: what the run is judged by, which is the moving average of the
    parameters where it keeps one. An array that is not what was written is refused as it is read."""
    folder = workdir / "checkpoints"
    steps = sorted((int(step.name), step) for step in folder.iterdir() if step.name.isdecimal())
    if not steps:
        raise FormatError(f"{folder}: no checkpoint in it yet")
    whole = [step for _, step in steps if (step / "stamp" / "metadata").is_file() and (step / "parameters").is_dir()]
    if not whole:
        raise FormatError(f"{steps[-1][1]}: no stamp or no parameters in it; not written by this package's training")
    newest = whole[-1]
    stamp, written = newest / "stamp" / "metadata", newest / "fingerprints" / "metadata"
    about = safetensors.json_object(stamp.read_bytes(), stamp)
    numbers = safetensors.json_object(written.read_bytes(), written) if written.is_file() else {}
    average = about.get("experiment", {}).get("optimizer", {}).get("average", 0)
    item = "optimizer" if average else "parameters"
    tensors = {
        name: _as_written(tensor, numbers.get(f"{item}/{name}")) for name, tensor in _orbax(newest / item)[0].items()
    }
    if average:
        tensors = {name.partition("/average/")[2]: tensor for name, tensor in tensors.items() if "/average/" in name}
    return tensors, (newest,), about


def _as_written(tensor: Tensor, number: Any) -> Tensor:
    """A tensor that is refused, when it is read, where it has another fingerprint. Checkpoints of the first format have none."""

    def read() -> np.ndarray:
        value = tensor.read()
        if number is not None and fingerprints.of_host_array(value) != number:
            raise FormatError(
                f"{tensor.file}: {tensor.name} is not what was written; without {tensor.file.parent} the one before is taken"
            )
        return value

    return dataclasses.replace(tensor, read=read)


READERS: dict[str, Callable[[pathlib.Path], Contents]] = {
    "safetensors": _safetensors,
    "safetensors, sharded": functools.partial(_sharded, _safetensors),
    "torch": _torch,
    "torch, sharded": functools.partial(_sharded, _torch),
    "npz": _npz,
    "orbax": _orbax,
    "prenorm_jax": _ours,
}


def _library(name: str, path: pathlib.Path, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.replace(".", "-")
        raise FormatError(f"{path}: {what} need {package}, which is not installed; pip install {package}") from None


def _line(error: Exception) -> str:
    """What another library said, as part of a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
