"""What converting a checkpoint will do to each of its tensors, decided from config.json, names and shapes before one is read.

Every tensor has a role or the checkpoint is refused: it writes to a main branch, reads one behind a norm, belongs to a norm or a
LayerScale, is a buffer, or is known to be beside all main branches. What the names say and what config.json says has to agree.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from prenorm_jax.interop.architectures import ARCHITECTURES, BUFFERS, MAY_LACK, REFUSED, Architecture, Stream
from prenorm_jax.interop.formats import Checkpoint
from prenorm_jax.interop.tensors import Tensor, is_float
from prenorm_jax.main_branch import LayoutError, MainBranch, Norm, Reader, Resolved, Writer
from prenorm_jax.main_branch.patterns import match, matches, names

# Classes whose head may be the embedding table; what a base model returns is its last norm's output.
WITH_HEAD = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "DoubleHeadsModel", "ForMaskedLM")

WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}


class RefusedError(ValueError):
    """A checkpoint that can't be converted, or not soundly; the message says why."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """A norm's affine that moves into one of its readers."""

    axis: int
    bias: str | None
    gamma: str | None
    beta: str | None


@dataclasses.dataclass(frozen=True)
class Recenter:
    """A leaf that becomes zero-mean along its output axis, behind its LayerScale."""

    axis: int
    scale: str | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens to a checkpoint.

    Args:
      architecture, model_type: what it is.
      tensors: name in the destination -> tensor of the source.
      folds, recenters: name -> what happens to it, in that order; `constants`: name -> what fills it; all others are copied.
      branches: main branch -> its exact description, in the destination's names.
      norms: module -> {"converted": may it be RMSNorm now, "reason": why not, "eps"}; every LayerNorm that is known.
      recentered: modules whose input has to be recentered by whoever runs them with RMSNorm -> why.
      untied: (head, table) where the head gets a table of its own, or None.
      config: the new config.json.
    """

    architecture: Architecture
    model_type: str
    tensors: Mapping[str, Tensor]
    folds: Mapping[str, Fold]
    recenters: Mapping[str, Recenter]
    constants: Mapping[str, float]
    branches: Mapping[str, MainBranch]
    norms: Mapping[str, dict[str, Any]]
    recentered: Mapping[str, str]
    untied: tuple[str, str] | None
    config: Mapping[str, Any]


def make_plan(checkpoint: Checkpoint, *, fold: bool = False, keep_tied: bool = False) -> Plan:
    """The plan of a checkpoint's conversion to pre_rmsnorm.

    Args:
      fold: whether the norms' affines move into their readers, where those have room.
      keep_tied: whether an embedding table stays tied to the head: it is left as it is then, and what starts the main branch is
        recentered at run time.

    Raises: RefusedError for a model that can't be converted, and where config.json contradicts the tensors; LayoutError for tensors
      that the architecture has no place for.
    """
    config, file = checkpoint.config, checkpoint.folder / "config.json"
    if config is None:
        raise RefusedError(f"{file}: is missing; what a checkpoint's tensors are can't be told from their names alone")
    model_type, architecture = _architecture(config, file)
    _check_types(config, architecture, file)
    tensors = _canonical(checkpoint.tensors, architecture)
    head_is_table = _tied(config, tensors, architecture, file)
    if head_is_table and architecture.head in tensors:
        tensors = {name: tensor for name, tensor in tensors.items() if name != architecture.head}
    untied, unties = None, head_is_table and architecture.untie and not keep_tied
    if unties and _has_head(config):
        untied = (str(architecture.head), str(architecture.table))
        tensors = {**tensors, untied[0]: tensors[untied[1]]}
    loose = head_is_table and keep_tied and architecture.untie
    found = {}
    for name, stream in architecture.streams.items():
        branch, starts = _fitted(stream, tensors, str(architecture.table) if loose else None, _is_base(config))
        if branch.writers:
            found[name] = dataclasses.replace(stream, branch=branch, starts=starts)
    resolved = _resolved(found, tensors, architecture, config, model_type, file)
    norms, exact = _norms(found, resolved, config, fold)
    return Plan(
        architecture,
        model_type,
        tensors,
        *_steps(resolved, exact, tensors, fold),
        exact,
        {**norms, **_kept_norms(architecture, tensors, config, found)},
        {stream.first: stream.starts for stream in found.values() if stream.starts},
        untied,
        # Also where there is no head: one that is put on this model later must not read the recentered table.
        {**config, "tie_word_embeddings": False} if unties else config,
    )


def _architecture(config: Mapping[str, Any], file: pathlib.Path) -> tuple[str, Architecture]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise RefusedError(f"{file}: has no model_type; expected one of {', '.join(sorted(ARCHITECTURES))}")
    if model_type in REFUSED:
        raise RefusedError(f"{file}: model_type {model_type} can't be converted: {REFUSED[model_type]}")
    if model_type not in ARCHITECTURES:
        raise RefusedError(
            f"{file}: model_type {model_type[:80]!r} is not known, and nothing is guessed; known are {', '.join(sorted(ARCHITECTURES))}. "
            "Describe its main branch with prenorm_jax.MainBranch and convert its parameters in Python"
        )
    if config.get("quantization_config") is not None:
        raise RefusedError(f"{file}: the checkpoint is quantised; convert the one that it was made from")
    made = ARCHITECTURES[model_type]
    architecture = made(config) if callable(made) else made
    for key, value, reason in architecture.refused:
        if config.get(key) == value:
            raise RefusedError(f"{file}: {model_type} with {key}={value} can't be converted: {reason}")
    return model_type, architecture


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


HEADS = ("n_head", "num_heads", "num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_heads")
"""How configs call the number of heads, which no tensor tells."""


def _check_types(config: Mapping[str, Any], architecture: Architecture, file: pathlib.Path) -> None:
    """What is read of config.json is what it should be, where it is there."""
    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "architectures": (
            "a list of names",
            lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
        ),
        "tie_word_embeddings": ("true or false", lambda value: isinstance(value, bool)),
        "vocab_size": ("a positive integer", _is_size),
    }
    for stream in architecture.streams.values():
        expected |= dict.fromkeys(
            filter(None, (stream.width, stream.layers, stream.readers_layers)), ("a positive integer", _is_size)
        )
        if isinstance(stream.eps, str):
            expected[stream.eps] = ("a number above 0", lambda value: isinstance(value, int | float) and 0 < value < 1)
        expected |= _heads(config, stream)
    for key, (words, holds) in expected.items():
        value = _of(config, key)
        if value is not None and not holds(value):
            raise RefusedError(f"{file}: {key} is {str(value)[:80]!r}; expected {words}")


def _heads(config: Mapping[str, Any], stream: Stream) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """What a stream's number of heads is, under each of its names."""
    within = stream.width.rpartition(".")[0] + "." if stream.width and "." in stream.width else ""
    width = _of(config, stream.width) if stream.width else None
    if width is None or not _is_size(width) or _of(config, f"{within}head_dim") is not None:
        return dict.fromkeys((within + name for name in HEADS), ("a positive integer", _is_size))
    holds = functools.partial(_divides, width)
    return dict.fromkeys((within + name for name in HEADS), (f"a divisor of {stream.width} = {width}", holds))


def _divides(width: int, value: Any) -> bool:
    return _is_size(value) and width % value == 0


def _canonical(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The tensors under the names of the model with its head: a base model's lack the beginning."""
    wrapper = next((word for word in WRAPPERS if all(name.startswith(word) for name in tensors)), None)
    if wrapper:
        first = next(iter(tensors.values()))
        raise RefusedError(
            f"{first.file}: all names begin with {wrapper!r}, as {WRAPPERS[wrapper]} leaves them, and the stock code looks for others; "
            "save the tensors without it"
        )
    base = architecture.base if not any(name.startswith(architecture.base) for name in tensors) else ""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        alias = next((old for old in architecture.aliases if name.startswith(old)), "")
        full = architecture.aliases.get(alias, "") + name.removeprefix(alias)
        known = full if full == architecture.head else base + full
        if known in renamed:
            raise LayoutError(
                f"{tensor.file}: {name} and {renamed[known].name} are two names of one tensor; remove one"
            )
        renamed[known] = tensor
    return renamed


def _has_head(config: Mapping[str, Any]) -> bool:
    classes = config.get("architectures") or ["LMHeadModel"]
    return any(str(name).endswith(WITH_HEAD) for name in classes)


def _is_base(config: Mapping[str, Any]) -> bool:
    """Whether what the last norm returns is an output of the model."""
    classes = config.get("architectures") or ["Model"]
    return all(str(name).endswith("Model") and not str(name).endswith(WITH_HEAD) for name in classes)


def _tied(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], architecture: Architecture, file: pathlib.Path
) -> bool:
    """Whether the head is the embedding table. What config.json says has to be so."""
    table, head = architecture.table, architecture.head
    if table is None or head is None or table not in tensors:
        return False
    tied = bool(config.get("tie_word_embeddings", architecture.tied))
    if not tied:
        if head not in tensors and _has_head(config):
            raise RefusedError(
                f"{file}: says that {head} is no tied table, and the checkpoint has no such tensor; one of the two is wrong"
            )
        return False
    if head in tensors:
        a, b = tensors[head], tensors[table]
        if (a.dtype, a.shape) != (b.dtype, b.shape) or not np.array_equal(_bits(a.read()), _bits(b.read())):
            raise RefusedError(
                f"{file}: says that {head} is tied to {table}, and the two differ; set tie_word_embeddings to what is so"
            )
    return True


def _bits(value: np.ndarray) -> np.ndarray:
    return value.reshape(-1).view(np.uint8)


def _fitted(
    stream: Stream, tensors: Mapping[str, Tensor], tied_table: str | None, base: bool
) -> tuple[MainBranch, str | None]:
    """The layout without the rules that this checkpoint has no leaf for, and why what starts the main branch is to be recentered."""

    def there(pattern: str | None) -> bool:
        return pattern is not None and bool(matches(pattern, tensors))

    def kept(pattern: str) -> bool:
        return there(pattern) or not MAY_LACK.search(pattern)

    writers = [
        dataclasses.replace(writer, scale=writer.scale if there(writer.scale) else None)
        for writer in stream.branch.writers
        if there(writer.leaf) or not (writer.optional or MAY_LACK.search(writer.leaf))
    ]
    starts = stream.starts
    if tied_table in [writer.leaf for writer in writers]:
        writers = [writer for writer in writers if "{" in writer.leaf]
        starts = "the embedding table is tied to the head, so that it can't be recentered"
    norms = []
    for norm in stream.branch.norms:
        readers = [
            dataclasses.replace(reader, bias=reader.bias if there(reader.bias) else None)
            for reader in norm.readers
            if kept(reader.kernel)
        ]
        if not there(norm.scale) and norm.scale and MAY_LACK.search(norm.scale):
            continue
        last = norm.scale is not None and "{" not in norm.scale
        keep = norm.keep
        if keep is None and not readers:
            keep = "its reader is the tied embedding table, or its output the model's"
        elif keep is None and last and base:
            keep = "its output is the model's"
        norms.append(dataclasses.replace(norm, readers=readers, keep=keep))
    return dataclasses.replace(stream.branch, writers=writers, norms=norms), starts


def _patterns(branch: MainBranch) -> Iterable[tuple[str, bool]]:
    """The patterns of a layout, and whether a model has all leaves of such a one or none."""
    for writer in branch.writers:
        yield writer.leaf, writer.optional
        if writer.scale:
            yield writer.scale, True
    for norm in branch.norms:
        yield from ((pattern, True) for pattern in (norm.scale, norm.bias) if pattern)
        for reader in norm.readers:
            yield reader.kernel, False
            if reader.bias:
                yield reader.bias, True


def _resolved(
    streams: Mapping[str, Stream],
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    config: Mapping[str, Any],
    model_type: str,
    file: pathlib.Path,
) -> dict[str, Resolved]:
    beside = {name for pattern in (*architecture.beside, *BUFFERS) for name, _ in matches(pattern, tensors)}
    resolved, covered = {}, set(beside)
    for key, stream in streams.items():
        own = {name for pattern, _ in _patterns(stream.branch) for name, _ in matches(pattern, tensors)} - beside
        if stream.starts:
            tables = {w.leaf for w in architecture.streams[key].branch.writers if "{" not in w.leaf}
            covered |= {name for name in tables if name in tensors}
        covered |= own
        _check_layers(stream, tensors, config, file)
        resolved[key] = stream.branch.resolve({name: _shape(tensors[name]) for name in own})
        width = _of(config, stream.width)
        leaf = resolved[key].writers[0][0]
        if width is not None and resolved[key].lanes != width:
            raise RefusedError(
                f"{file}: {stream.width} is {width}; the tensors have a main branch of {resolved[key].lanes} ({leaf} is "
                f"{tensors[leaf].shape}); the two belong to different checkpoints"
            )
    for name, tensor in tensors.items():
        if name not in covered:
            raise LayoutError(
                f"{tensor.file}: {name} {tensor.shape}: {model_type} has no such tensor that is known, and what it reads or writes is "
                "not guessed; is it of another architecture, or an adapter's to be merged first?"
            )
        if not is_float(tensor.dtype) and name not in beside:
            raise RefusedError(
                f"{name}: is {tensor.dtype}; expected float64, float32, float16 or bfloat16 (a quantised checkpoint can't be converted)"
            )
    _check_vocabulary(architecture, tensors, config, file)
    return resolved


def _shape(tensor: Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)


def _of(config: Mapping[str, Any], key: str) -> Any:
    """config["a"]["b"] for "a.b"; None where it does not say."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _check_layers(stream: Stream, tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: pathlib.Path) -> None:
    """All layers that config.json speaks of, and no others, have each kind of leaf that one has."""
    for pattern, optional in _patterns(stream.branch):
        key = {"i": stream.layers, "j": stream.readers_layers}.get("".join(names(pattern)))
        if key is None or (optional and not matches(pattern, tensors)):
            continue
        found = matches(pattern, [*tensors, *stream.lacking])
        depth = _of(config, key)
        expected = set(map(str, range(depth if isinstance(depth, int) else len(found))))
        there = {value for _, values in found for value in values.values()}
        if there != expected:
            lost = sorted(expected - there, key=int)
            what = f"layer {lost[0]} has no" if lost else f"the tensors have a layer {sorted(there - expected)[0]},"
            raise RefusedError(
                f"{file}: {key} is {depth}; {what} {pattern}; a file is missing, or the two belong to different checkpoints"
            )


def _check_vocabulary(
    architecture: Architecture, tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: pathlib.Path
) -> None:
    size = config.get("vocab_size")
    for name in (architecture.table, architecture.head):
        if name is not None and name in tensors and isinstance(size, int) and tensors[name].shape[:1] != (size,):
            raise RefusedError(
                f"{file}: vocab_size is {size}; {name} is {tensors[name].shape}; the two belong to different checkpoints"
            )


def _norms(
    streams: Mapping[str, Stream], resolved: Mapping[str, Resolved], config: Mapping[str, Any], fold: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, MainBranch]]:
    """What becomes of each norm on a main branch, and the exact descriptions."""
    norms: dict[str, dict[str, Any]] = {}
    branches = {}
    for key, stream in streams.items():
        eps = _eps(stream, config)
        for norm in resolved[key].norms:
            module = norm.name.rpartition(".")[0]
            if norm.bare and norm.name not in stream.lacking and config.get("layer_norm_elementwise_affine", True):
                raise RefusedError(
                    f"{norm.name}: is missing, and {norm.readers[0].kernel} is there; the checkpoint is not whole"
                )
            if norm.name not in stream.lacking:
                reason = stream.kept.get(module)
                norms[module] = {"converted": reason is None, "reason": reason, "eps": eps}
        branches[key] = MainBranch(
            [Writer(path, axis, scale=resolved[key].layer_scales.get(path)) for path, axis in resolved[key].writers],
            [
                Norm([Reader(r.kernel, r.axis, r.bias) for r in n.readers], n.scale, n.bias, eps, n.keep)
                for n in resolved[key].norms
            ],
        )
    return norms, branches


def _eps(stream: Stream, config: Mapping[str, Any]) -> float:
    said = _of(config, stream.eps) if isinstance(stream.eps, str) else stream.eps
    return float(stream.default_eps if said is None else said)


def _kept_norms(
    architecture: Architecture, tensors: Mapping[str, Tensor], config: Mapping[str, Any], streams: Mapping[str, Stream]
) -> dict[str, dict[str, Any]]:
    """The LayerNorms that are on no main branch."""
    eps = _eps(next(iter(streams.values())), config)
    return {
        module: {"converted": False, "reason": reason, "eps": eps}
        for module, reason in architecture.kept.items()
        if any(match(f"{module}.*", name) for name in tensors)
    }


def _steps(
    resolved: Mapping[str, Resolved], exact: Mapping[str, MainBranch], tensors: Mapping[str, Tensor], fold: bool
) -> tuple[dict[str, Fold], dict[str, Recenter], dict[str, float]]:
    folds: dict[str, Fold] = {}
    recenters: dict[str, Recenter] = {}
    constants: dict[str, float] = {}
    for found in resolved.values():
        for path, axis in found.writers:
            recenters[path] = Recenter(axis, found.layer_scales.get(path))
        constants.update(dict.fromkeys(found.layer_scales.values(), 1.0))
        for norm in found.norms:
            if fold and norm.folds and not norm.bare:
                folds.update({r.kernel: Fold(r.axis, r.bias, norm.scale, norm.bias) for r in norm.readers})
                constants.update({path: value for path, value in ((norm.scale, 1.0), (norm.bias, 0.0)) if path})
    return folds, recenters, constants
