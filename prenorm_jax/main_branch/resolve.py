"""A description applied to one tree: every leaf in its role, or an error that names the leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prenorm_jax.main_branch.patterns import LayoutError, filled, found, matches, names

if TYPE_CHECKING:
    from prenorm_jax.main_branch.rules import MainBranch, Norm

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ReaderLeaf:
    """One reader in a tree; `bias` is where its bias is, or would be; `new_bias` says that the tree has none there."""

    kernel: str
    axis: int
    bias: str | None
    new_bias: bool


@dataclasses.dataclass(frozen=True)
class NormLeaves:
    """One norm in a tree (a stack of them where the layers are stacked); paths are None where the tree has no such leaf; `module` is
    the pattern of its module, or None where the description doesn't tell it."""

    name: str
    scale: str | None
    bias: str | None
    readers: tuple[ReaderLeaf, ...]
    eps: float | None
    keep: str | None
    module: str | None = None

    @property
    def folds(self) -> bool:
        """Whether its affine can move: every reader can take a bias, or there is none to take."""
        return self.keep is None and (self.bias is None or all(reader.bias for reader in self.readers))

    @property
    def bare(self) -> bool:
        """Whether the tree has neither a scale nor a bias of it."""
        return self.scale is None and self.bias is None


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A MainBranch applied to one tree: writers as (path, axis), norms with their readers, lanes of the main branch as found, the
    nominal width where the description tells it, the LayerScale of each writer that has one, and the leaves that write to other main
    branches of the same tree."""

    writers: tuple[tuple[str, int], ...]
    norms: tuple[NormLeaves, ...]
    lanes: int
    width: int | None
    layer_scales: Mapping[str, str] = dataclasses.field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()


def resolve(branch: MainBranch, shapes: Shapes) -> Resolved:
    """Every leaf of a tree (path -> shape) in its role. Raises: LayoutError."""
    covered: dict[str, list[str]] = {}

    def cover(path: str, rule: str) -> str:
        covered.setdefault(path, []).append(rule)
        return path

    writers, layer_scales = [], {}
    for writer in branch.writers:
        for path, values in (matches if writer.optional else found)(writer.leaf, shapes):
            writers.append((cover(path, f"writer {writer.leaf} (axis {writer.axis})"), writer.axis))
            scale = filled(writer.scale, values) if writer.scale else None
            if scale and (scale in shapes or not writer.scale_optional):
                layer_scales[path] = _layer_scale(scale, path, shapes)
    for path in set(layer_scales.values()):
        cover(path, "a writer's scale")
    norms = tuple(norm for rule in branch.norms for norm in _norm_leaves(rule, shapes, cover))
    others = [other for other in branch.others if isinstance(other, str)]
    for pattern in others:
        for path, _ in found(pattern, shapes):
            cover(path, f"others {pattern}")
    beside = [other for other in branch.others if not isinstance(other, str)]
    in_other_branches = {path for other in beside for rule in _patterns(other) for path, _ in matches(rule, shapes)}

    for path, shape in shapes.items():
        if path not in covered and path not in in_other_branches:
            raise LayoutError(
                f"{path} {shape}: no rule covers it; name it as a writer, as a norm's scale or bias, as a reader or its bias, or in others"
            )
    for path, rules in covered.items():
        if len(rules) > 1:
            _require_one_role(path, rules, dict(writers), norms, shapes)

    lanes = _one_size([*writers, *((path, -1) for path in set(layer_scales.values()))], norms, shapes)
    written_elsewhere = {path for other in beside for w in other.writers for path, _ in matches(w.leaf, shapes)}
    return Resolved(
        tuple(writers),
        norms,
        lanes,
        _nominal_width(branch.width, shapes),
        layer_scales,
        frozenset(written_elsewhere - set(covered)),
    )


def _require_one_role(
    path: str, rules: list[str], axes: Mapping[str, int], norms: Iterable[NormLeaves], shapes: Shapes
) -> None:
    """A leaf has one role, with two exceptions. A linear map from a norm straight to the main branch is a writer and a reader, and its
    bias a writer and a reader's bias. And a reader may be behind several norms, if none of them has an affine to fold into it."""
    reads = [(norm, r) for norm in norms for r in norm.readers if path in (r.kernel, r.bias)]
    shared = len(reads) > 1 and not (
        len({(reader.kernel, reader.axis, reader.bias) for _, reader in reads}) == 1
        and len({norm.name for norm, _ in reads}) == len(reads)
        and (
            all(norm.bare and norm.keep is None for norm, _ in reads) or all(norm.keep is not None for norm, _ in reads)
        )
    )
    in_and_out = path not in axes or all(path == r.bias or r.axis != axes[path] for _, r in reads)
    if len(rules) == len(reads) + (path in axes) and not shared and in_and_out:
        return
    advice = "leave one of them"
    if path in axes and reads:
        advice = "untie it, or keep the norm's affine (keep=...) and recenter what the table writes"
    elif shared:
        advice = "one kernel can't take the affine of several norms: keep them (keep=...), or give the norm a kernel of its own"
    raise LayoutError(f"{path} {shapes[path]}: covered by {' and by '.join(rules)}; {advice}")


def _patterns(branch: MainBranch) -> Iterable[str]:
    """The patterns of all leaves that touch a main branch."""
    for writer in branch.writers:
        yield from (pattern for pattern in (writer.leaf, writer.scale) if pattern)
    for norm in branch.norms:
        yield from (pattern for pattern in (norm.scale, norm.bias) if pattern)
        for reader in norm.readers:
            yield from (pattern for pattern in (reader.kernel, reader.bias) if pattern)


def _layer_scale(path: str, writer: str, shapes: Shapes) -> str:
    if path not in shapes:
        raise LayoutError(f"{path}: the scale of the writer {writer}, and the tree has no such leaf")
    return path


def _norm_leaves(rule: Norm, shapes: Shapes, cover: Callable[[str, str], str]) -> Iterable[NormLeaves]:
    """The norms that one rule stands for: one for each value of the names in its patterns."""
    own_names = names(rule.scale) | names(rule.bias) | names(rule.module)
    groups: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}

    def group(values: Mapping[str, str]) -> dict[str, Any]:
        return groups.setdefault(_key(values, own_names), {"scale": None, "bias": None, "readers": []})

    for role in ("scale", "bias"):
        pattern = getattr(rule, role)
        for path, values in matches(pattern, shapes) if pattern else ():
            group(values)[role] = cover(path, f"norm {role} {pattern}")
    for reader in rule.readers:
        for path, values in found(reader.kernel, shapes):
            cover(path, f"reader {reader.kernel} (axis {reader.axis})")
            bias = filled(reader.bias, values) if reader.bias else None
            has_bias = bias in shapes
            if bias and has_bias:
                cover(bias, f"reader's bias {reader.bias}")
            missing = own_names - set(values)
            if missing:
                raise LayoutError(
                    f"reader {reader.kernel}: {{{min(missing)}}} of its norm's pattern does not occur in it"
                )
            group(values)["readers"].append(ReaderLeaf(path, reader.axis, bias, not has_bias))
    if not groups and not (rule.module and rule.keep):  # a norm without leaves, all of whose readers are left alone
        raise LayoutError(f"norm {rule.scale or rule.bias or rule.readers}: matches nothing in the tree")
    for key, group_found in groups.items():
        name = filled(rule.scale or rule.bias or rule.module or rule.readers[0].kernel, dict(key))
        if not group_found["readers"] and rule.keep is None:
            raise LayoutError(
                f"norm {name}: no reader; name the linear maps behind it, or say why its affine stays (keep=...)"
            )
        affine = filled(rule.scale or rule.bias or "", dict(key))
        module = filled(rule.module, dict(key)) if rule.module else affine.rpartition("/")[0]
        yield NormLeaves(
            name,
            group_found["scale"],
            group_found["bias"],
            tuple(group_found["readers"]),
            rule.eps,
            rule.keep,
            module or None,
        )


def _one_size(writers: Iterable[tuple[str, int]], norms: Iterable[NormLeaves], shapes: Shapes) -> int:
    """The one size of all main-branch axes; LayoutError where a leaf has another."""
    axes = list(writers) + [(r.kernel, r.axis) for n in norms if n.keep is None for r in n.readers]
    axes += [(path, -1) for n in norms if n.keep is None for path in (n.scale, n.bias) if path]
    sizes: dict[int, str] = {}
    for path, axis in axes:
        sizes.setdefault(_size(path, axis, shapes), f"{path} {shapes[path]} axis {axis}")
    if not sizes:
        raise LayoutError("the description names no leaf on the main branch; give its writers and its norms")
    if len(sizes) > 1:
        each = "; ".join(f"{size} in {where}" for size, where in sizes.items())
        raise LayoutError(
            f"one main branch has one width, found several: {each}; check the axes, describe each stream by itself, and say where layers "
            "are stacked on another axis than the first (MainBranch(stacked=...))"
        )
    return next(iter(sizes))


def _nominal_width(width: int | tuple[str, int] | None, shapes: Shapes) -> int | None:
    if not isinstance(width, tuple):
        return width
    pattern, axis = width
    return _size(found(pattern, shapes)[0][0], axis, shapes)


def _size(path: str, axis: int, shapes: Shapes) -> int:
    axes = len(shapes[path])
    if not axes:
        raise LayoutError(f"{path}: is no array with axes; expected one")
    if -axis > axes:
        raise LayoutError(f"{path} {shapes[path]}: axis {axis} does not exist; give an axis from -{axes} to -1")
    return shapes[path][axis]


def _key(values: Mapping[str, str], own: set[str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in values.items() if name in own))
