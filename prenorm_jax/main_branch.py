"""The main branch of a pre-norm Transformer, described: which leaves write to it, which read it, and behind which norm.

A parameter tree is seen as paths ("blocks/0/attn/query/kernel") to arrays. A `MainBranch` names every one of them once, by patterns:

    {i}     one name (no "/" and no "."), remembered, so that a norm finds its readers
    {i...}  any number of path segments, none included, remembered: "blocks/{i...}/norm" is looped and stacked layers alike
    *       one name, forgotten
    **      anything

Axes are negative always, so that one rule serves looped layers (rank 2 kernels) and stacked ones (rank 3, layers first).
Descriptions are strict: a leaf that no rule covers, a leaf that two rules cover, a rule that covers nothing and an axis of the wrong
size are errors that name the leaf. Nothing is guessed from shapes.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prenorm_jax.paths import Tree, leaves


class LayoutError(ValueError):
    """A description and a parameter tree that don't fit each other; the message names the leaf and what to write."""


@dataclasses.dataclass(frozen=True)
class Writer:
    """A leaf whose `axis` runs over the coordinates of the main branch that it writes.

    Args:
      leaf: pattern of the leaf: an output kernel, its bias, an embedding or position table, a class token.
      axis: the output axis, negative; the last one unless said otherwise.
      optional: whether a tree may lack it.
      scale: pattern of the vector that multiplies what it writes (LayerScale), where the tree has one; its names occur in `leaf`.
    """

    leaf: str
    axis: int = -1
    optional: bool = False
    scale: str | None = None


@dataclasses.dataclass(frozen=True)
class Reader:
    """A linear map behind a norm: its `axis` is contracted with the normalised main branch.

    Args:
      kernel: pattern of the kernel.
      axis: the input axis, negative: -2 for (in, out), -1 for (out, in), -3 for (in, heads, head_dim).
      bias: pattern of the bias, which takes the norm's beta; where the tree has none, folding creates it there. None: this reader can
        take no bias. A name in braces must also occur in `kernel`.
    """

    kernel: str
    axis: int = -2
    bias: str | None = None


@dataclasses.dataclass(frozen=True)
class Norm:
    """A LayerNorm (or RMSNorm) on the main branch and the linear maps that read what it returns.

    Args:
      readers: all of them; a norm that misses one can't be folded exactly.
      scale, bias: patterns of gamma and beta; a tree may lack either (a norm without affine, or one already folded and stripped).
      eps: its eps, where known.
      keep: why its affine has to stay (for example "tied table"), or None to let it fold. What reads a kept norm is left alone.
    """

    readers: Sequence[Reader] = ()
    scale: str | None = None
    bias: str | None = None
    eps: float | None = None
    keep: str | None = None


@dataclasses.dataclass(frozen=True)
class MainBranch:
    """Where a parameter tree touches the main branch.

    Args:
      writers: the leaves that write to it.
      norms: the norms on it, each with its readers.
      others: patterns of the leaves that don't touch it (or only behind an activation that the model recenters itself).
      width: the nominal width d: a number, or (leaf pattern, negative axis) where that size can be read; None if unknown. It tells
        a compressed tree (d - 1 lanes) from one that is not, which `to_pre_ln` needs.

    >>> branch = MainBranch(
    ...     writers=[Writer("embed/table"), Writer("mlp_{i}/down/kernel"), Writer("mlp_{i}/down/bias")],
    ...     norms=[
    ...         Norm([Reader("mlp_{i}/up/kernel", bias="mlp_{i}/up/bias")], scale="norm_{i}/scale", bias="norm_{i}/bias"),
    ...         Norm([Reader("head/kernel", bias="head/bias")], scale="norm/scale", bias="norm/bias"),
    ...     ],
    ... )
    """

    writers: Sequence[Writer]
    norms: Sequence[Norm]
    others: Sequence[str] = ()
    width: int | tuple[str, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "writers", tuple(self.writers))
        object.__setattr__(self, "norms", tuple(dataclasses.replace(n, readers=tuple(n.readers)) for n in self.norms))
        object.__setattr__(self, "others", tuple(self.others))
        axes = [(w.leaf, w.axis) for w in self.writers]
        axes += [(r.kernel, r.axis) for n in self.norms for r in n.readers]
        axes += [self.width] if isinstance(self.width, tuple) else []
        for leaf, axis in axes:
            if not isinstance(axis, int) or axis >= 0:
                raise LayoutError(
                    f"{leaf}: axis {axis!r}; axes are negative, counted from the last (write {axis!r} - rank)"
                )
        for writer in self.writers:
            unknown = _names(writer.scale) - _names(writer.leaf)
            if unknown or "*" in (writer.scale or ""):
                raise LayoutError(
                    f"{writer.scale}: the scale of {writer.leaf} is found by the names in braces of that pattern, and no others"
                )
        for norm in self.norms:
            for reader in norm.readers:
                if reader.bias and "*" in reader.bias:
                    raise LayoutError(
                        f"{reader.bias}: a * is forgotten, so it can't say where the bias of {reader.kernel} is; write a name in braces"
                    )
                unknown = _names(reader.bias) - _names(reader.kernel)
                if unknown:
                    raise LayoutError(
                        f"{reader.bias}: {{{min(unknown)}}} does not occur in its kernel's pattern {reader.kernel}"
                    )

    def resolve(self, params: Tree) -> "Resolved":
        """The rules applied to one tree: every leaf in its role. Shapes alone are read, so tracers and shape structs do.

        Raises: LayoutError, as the module's docstring says.
        """
        return _resolve(self, {path: leaf.shape for path, leaf in leaves(params).items()})


@dataclasses.dataclass(frozen=True)
class ReaderLeaf:
    """One reader in a tree; `bias` is where its bias is, or would be; `new_bias` says that the tree has none there."""

    kernel: str
    axis: int
    bias: str | None
    new_bias: bool


@dataclasses.dataclass(frozen=True)
class NormLeaves:
    """One norm in a tree (a stack of them where the layers are stacked); paths are None where the tree has no such leaf."""

    name: str
    scale: str | None
    bias: str | None
    readers: tuple[ReaderLeaf, ...]
    eps: float | None
    keep: str | None


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A MainBranch applied to one tree: writers as (path, axis), norms with their readers, lanes of the main branch as found, the
    nominal width where the description tells it, and writer -> the LayerScale that multiplies what it writes."""

    writers: tuple[tuple[str, int], ...]
    norms: tuple[NormLeaves, ...]
    lanes: int
    width: int | None
    scales: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _resolve(branch: MainBranch, shapes: Mapping[str, tuple[int, ...]]) -> Resolved:
    covered: dict[str, list[str]] = {}

    def cover(path: str, rule: str) -> str:
        covered.setdefault(path, []).append(rule)
        return path

    writers: list[tuple[str, int]] = []
    scales: dict[str, str] = {}
    for writer in branch.writers:
        for path, names in (_matches if writer.optional else _found)(writer.leaf, shapes):
            writers.append((cover(path, f"writer {writer.leaf} (axis {writer.axis})"), writer.axis))
            scale = _filled(writer.scale, names) if writer.scale else ""
            if scale in shapes:
                scales[path] = scale
    for scale in set(scales.values()):
        cover(scale, "writer's scale")
    norms = tuple(norm for rule in branch.norms for norm in _norm_leaves(rule, shapes, cover))
    for pattern in branch.others:
        for path, _ in _found(pattern, shapes):
            cover(path, f"others {pattern}")

    for path, shape in shapes.items():
        if path not in covered:
            raise LayoutError(
                f"{path} {shape}: no rule covers it; name it as a writer, as a norm's scale or bias, as a reader or its bias, or in others"
            )
    # A linear map from a norm straight to the main branch is a writer and a reader, and its bias a writer and a reader's bias.
    axes = dict(writers)
    biases = {r.bias for n in norms for r in n.readers}
    for path, rules in covered.items():
        reads = [r.axis for n in norms for r in n.readers if r.kernel == path]
        both = len(rules) == 2 and path in axes and (path in biases or (len(reads) == 1 and reads[0] != axes[path]))
        if len(rules) > 1 and not both:
            tied = path in axes and bool(reads)
            advice = (
                "untie it, or keep the norm's affine (keep=...) and recenter what the table writes"
                if tied
                else "leave one of them"
            )
            raise LayoutError(f"{path} {shapes[path]}: covered by {' and by '.join(rules)}; {advice}")

    lanes = _one_size([*writers, *((scale, -1) for scale in scales.values())], norms, shapes)
    return Resolved(tuple(writers), norms, lanes, _nominal_width(branch.width, shapes), scales)


def _norm_leaves(rule: Norm, shapes: Mapping[str, Any], cover: Callable[[str, str], str]) -> Iterable[NormLeaves]:
    """The norms that one rule stands for: one for each value of the names in its scale and bias patterns."""
    own_names = _names(rule.scale) | _names(rule.bias)
    groups: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}

    def group(names: Mapping[str, str]) -> dict[str, Any]:
        return groups.setdefault(_key(names, own_names), {"scale": None, "bias": None, "readers": []})

    for role in ("scale", "bias"):
        pattern = getattr(rule, role)
        for path, names in _matches(pattern, shapes) if pattern else ():
            group(names)[role] = cover(path, f"norm {role} {pattern}")
    for reader in rule.readers:
        for path, names in _found(reader.kernel, shapes):
            cover(path, f"reader {reader.kernel} (axis {reader.axis})")
            bias = _filled(reader.bias, names) if reader.bias else None
            has_bias = bias in shapes
            if bias and has_bias:
                cover(bias, f"reader's bias {reader.bias}")
            missing = own_names - set(names)
            if missing:
                raise LayoutError(
                    f"reader {reader.kernel}: {{{min(missing)}}} of its norm's pattern does not occur in it"
                )
            group(names)["readers"].append(ReaderLeaf(path, reader.axis, bias, not has_bias))
    if not groups:
        raise LayoutError(f"norm {rule.scale or rule.bias or rule.readers}: matches nothing in the tree")
    for key, found in groups.items():
        name = _filled(rule.scale or rule.bias or rule.readers[0].kernel, dict(key))
        if not found["readers"] and rule.keep is None:
            raise LayoutError(
                f"norm {name}: no reader; name the linear maps behind it, or say why its affine stays (keep=...)"
            )
        yield NormLeaves(name, found["scale"], found["bias"], tuple(found["readers"]), rule.eps, rule.keep)


def _one_size(
    writers: Iterable[tuple[str, int]], norms: Iterable[NormLeaves], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """The one size of all main-branch axes; LayoutError where a leaf has another."""
    axes = list(writers) + [(r.kernel, r.axis) for n in norms if n.keep is None for r in n.readers]
    axes += [(path, -1) for n in norms if n.keep is None for path in (n.scale, n.bias) if path]
    sizes: dict[int, str] = {}
    for path, axis in axes:
        sizes.setdefault(_size(path, axis, shapes), f"{path} {shapes[path]} axis {axis}")
    if not sizes:
        raise LayoutError("the description names no leaf on the main branch; give its writers and its norms")
    if len(sizes) > 1:
        found = "; ".join(f"{size} in {where}" for size, where in sizes.items())
        raise LayoutError(
            f"one main branch has one width, found several: {found}; check the axes, and describe each stream by itself"
        )
    return next(iter(sizes))


def _nominal_width(width: int | tuple[str, int] | None, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    if not isinstance(width, tuple):
        return width
    pattern, axis = width
    return _size(_found(pattern, shapes)[0][0], axis, shapes)


def _size(path: str, axis: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if -axis > len(shapes[path]):
        raise LayoutError(
            f"{path} {shapes[path]}: axis {axis} does not exist; give an axis from -{len(shapes[path])} to -1"
        )
    return shapes[path][axis]


def _found(pattern: str, shapes: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    found = _matches(pattern, shapes)
    if not found:
        raise LayoutError(f"{pattern}: matches nothing in the tree; its paths are like {', '.join(list(shapes)[:3])}")
    return found


def _matches(pattern: str, shapes: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    regex = re.compile(_regex(pattern))
    found = ((path, regex.fullmatch(path)) for path in shapes)
    return [(path, match.groupdict()) for path, match in found if match]


_TOKEN = re.compile(r"\*\*|\*|\{\w+\}|\{\w+\.\.\.\}/")
_SHAPES_OF_TOKENS = {"**": ".*", "*": r"[^/.]+"}


def _regex(pattern: str) -> str:
    seen: set[str] = set()

    def token(text: str) -> str:
        name = _name(text)
        if name is None:
            return _SHAPES_OF_TOKENS[text]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>(?:[^/]+/)*)" if text.endswith("/") else rf"(?P<{name}>[^/.]+)"

    literals = _TOKEN.split(pattern)
    tokens = [token(t) for t in _TOKEN.findall(pattern)] + [""]
    return "".join(re.escape(literal) + t for literal, t in zip(literals, tokens, strict=True))


def _name(token: str) -> str | None:
    match = re.search(r"\w+", token)
    return match.group() if match else None


def _names(pattern: str | None) -> set[str]:
    return {name for t in _TOKEN.findall(pattern or "") if (name := _name(t))}


def _filled(pattern: str, names: Mapping[str, str]) -> str:
    """The path that a pattern stands for, once its names are known; what is not known stays as it is written."""
    return _TOKEN.sub(lambda match: names.get(_name(match.group()) or "", match.group()), pattern)


def _key(names: Mapping[str, str], own: set[str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in names.items() if name in own))
