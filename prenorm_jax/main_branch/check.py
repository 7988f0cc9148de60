"""Does a description describe the function? Numbers say, where LayerNorm itself can't be asked.

LayerNorm ignores a multiple of (1, ..., 1), and what it multiplies by gamma its readers may divide by. So, on the Pre-LN function fn:

    LayerScale   moving lambda into its writers changes no output;
    writers      adding a random constant along a writer's axis (one for each index of the other axes) changes no output;
    norms        multiplying gamma and beta by a random positive vector and dividing all readers by it along their axes changes no output
                 (a norm with beta alone: adding to it and subtracting what the readers make of that from their biases; a norm without
                 either: adding a constant along the readers' axes, since what they read has zero mean);
    the rest     no leaf that is not described as a writer behaves like one: constants along an axis as long as the main branch is wide
                 invisible, random values visible.

What fn alone can't show, since LayerNorm hides it: something that is no leaf and writes a mean (a constant, a norm's output that goes back
to the main branch, and is kept) and a bias-only norm whose readers have no bias. `converted`, the function with RMSNorm in its norms'
places (and the transforms inside), shows everything: it has to equal fn. Inputs that don't reach a leaf don't test it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.bases import along, stacks
from prenorm_jax.main_branch.patterns import LayoutError
from prenorm_jax.main_branch.resolve import NormLeaves, Resolved
from prenorm_jax.paths import Tree, leaves, with_leaves

if TYPE_CHECKING:
    from prenorm_jax.main_branch.rules import MainBranch

Flat = dict[str, Any]

TOLERANCE = {"float64": 1e-8, "float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-2}
"""dtype of an output -> how much of its largest entry counts as unmoved."""


def check(
    spec: MainBranch,
    fn: Callable[..., Any],
    params: Tree,
    inputs: tuple[Any, ...],
    converted: Callable[..., Any] | None = None,
) -> None:
    """`MainBranch.check`."""
    found = spec.resolve(params)
    with jax.enable_x64(True):
        probe = _Probe(fn, params, inputs)
        base = _without_layer_scales(probe, found)
        _check_writers(probe, base, found)
        _check_norms(probe, base, found)
        missed = list(_like_writers(probe, base, found))
        if converted is not None:
            _check_converted(probe, converted, missed)
        elif missed:
            path, axis = missed[0]
            raise LayoutError(
                f"{path} {base[path].shape}: described as no writer, yet no output sees a constant along its axis {axis}: a writer that "
                "was missed? If it feeds another norm than the main branch's (behind the embedding, of queries or keys, another main "
                "branch), describe that in others as a MainBranch of its own, or pass converted=..., which decides"
            )


class _Probe:
    """A function of parameters, evaluated in the widest type that it lets through."""

    def __init__(self, fn: Callable[..., Any], params: Tree, inputs: tuple[Any, ...]):
        self.params, self.fn, self.random = params, jax.jit(fn), np.random.default_rng(0)
        wide = {path: _wide(leaf) for path, leaf in leaves(params).items()}
        try:
            self.inputs = jax.tree.map(_wide, inputs)
            self.outputs(wide)
            self.flat = wide
        except (TypeError, ValueError):  # a loop's carry of a fixed type, for example
            self.inputs = inputs
            self.flat = {path: np.asarray(leaf) if _is_float(leaf) else leaf for path, leaf in leaves(params).items()}

    def outputs(self, flat: Flat, fn: Callable[..., Any] | None = None) -> list[Any]:
        found = jax.tree.leaves((fn or self.fn)(with_leaves(self.params, flat), *self.inputs))
        floats = [leaf for leaf in found if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
        if not floats:
            raise LayoutError("check: fn returns nothing of a floating dtype, so nothing can be seen to move")
        return floats

    def moved(self, flat: Flat, base: Flat) -> float:
        """The largest change of an output from one tree to another, over its tolerance: more than 1 is seen."""
        return max(map(distance, self.outputs(flat), self.outputs(base)))

    def constant(self, leaf: np.ndarray, axis: int) -> np.ndarray:
        """A random constant along an axis, as large as the leaf's entries."""
        shape = list(leaf.shape)
        shape[axis] = 1
        return (self.random.normal(size=shape) * _size(leaf)).astype(leaf.dtype)


def distance(actual: Any, expected: Any) -> float:
    """The largest difference of two outputs, over what counts as unmoved."""
    tolerance = TOLERANCE[str(jnp.result_type(expected))]
    a, b = (np.asarray(value, np.float64) for value in (actual, expected))
    if not np.all(np.isfinite(b)):
        raise LayoutError("check: fn is not finite on these inputs, so nothing can be seen to move")
    worst = np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(b), initial=0.0), 1e-30) / tolerance
    return float(worst) if np.isfinite(worst) else np.inf


def _without_layer_scales(probe: _Probe, found: Resolved) -> Flat:
    """The tree with each LayerScale moved into its writers; refused where that changes the function."""
    flat, axes = dict(probe.flat), dict(found.writers)
    for scale in sorted(set(found.layer_scales.values())):
        before = dict(flat)
        for writer in (writer for writer, of in found.layer_scales.items() if of == scale):
            flat[writer] = flat[writer] * along(flat[scale], flat[writer], axes[writer])
        flat[scale] = np.ones_like(flat[scale])
        if probe.moved(flat, before) > 1:
            raise LayoutError(
                f"{scale}: described as the LayerScale of its writers, and moving it into them changes the function; it multiplies "
                "something else too, or a writer that it multiplies lacks Writer(scale=...)"
            )
    return flat


def _check_writers(probe: _Probe, base: Flat, found: Resolved) -> None:
    shifts = {(path, axis): probe.constant(base[path], axis) for path, axis in found.writers}

    def shifted(flat: Flat, writers: Iterable[tuple[str, int]]) -> Flat:
        return {**flat, **{path: flat[path] + shifts[path, axis] for path, axis in writers}}

    if probe.moved(shifted(base, found.writers), base) <= 1:
        return
    movers = [writer for writer in found.writers if probe.moved(shifted(base, [writer]), base) > 1] or [*found.writers]
    path, axis = movers[0]
    head = f"{path} {base[path].shape}: described as a writer along axis {axis}, but outputs see a constant along it"
    for other in range(-base[path].ndim, 0):
        constant = probe.constant(base[path], other)
        if other != axis and probe.moved({**base, path: base[path] + constant}, base) <= 1:
            raise LayoutError(f"{head}; they don't along axis {other}: is that the axis?")
    for scale, leaf in base.items():
        if scale in found.layer_scales.values() or not _can_scale(leaf, base[path], axis):
            continue
        row = along(leaf, base[path], axis)
        if np.all(row != 0) and probe.moved({**base, path: base[path] + shifts[path, axis] / row}, base) <= 1:
            raise LayoutError(f"{head}: {scale} {leaf.shape} multiplies what it writes; give Writer(scale=...)")
    raw = _raw_readers(probe, base, found, lambda flat: shifted(flat, movers))
    if raw:
        where = " and ".join(f"{reader} (axis {reader_axis})" for reader, reader_axis in raw)
        raise LayoutError(
            f"{where}: reads the main branch raw, behind no norm, and so sees the mean of what {path} writes; a main branch that is read "
            "raw can't be recentered or compressed"
        )
    if len(movers) == len(found.writers):
        raise LayoutError(
            f"{head}, and along those of all {len(movers)} writers: is it an RMSNorm model already, or a Post-LN one? Only a main branch "
            "that is read through LayerNorm alone has a mean to spare"
        )
    raise LayoutError(
        f"{head}: between it and the norms there is more than sums: a non-linear function, a gate or a scale for each channel, dropout. "
        "If it is no writer name it in others, and what it passes through, if it reaches the main branch, in recentered"
    )


def _raw_readers(probe: _Probe, base: Flat, found: Resolved, shifted: Callable[[Flat], Flat]) -> list[tuple[str, int]]:
    """The leaves that have to be blind to a mean for a shift to be invisible, and are not described as readers."""
    known = {*found.writers, *((r.kernel, r.axis) for n in found.norms for r in n.readers)}
    candidates = [place for place in _places(base, found.lanes) if place not in known and base[place[0]].ndim > 1]

    def seen(blind: Iterable[tuple[str, int]]) -> bool:
        flat = dict(base)
        for path, axis in blind:
            flat[path] = flat[path] - flat[path].mean(axis=axis, keepdims=True)
        return probe.moved(shifted(flat), flat) > 1

    if not candidates or seen(candidates):
        return []
    for place in list(candidates):
        rest = [other for other in candidates if other != place]
        if not seen(rest):
            candidates = rest
    return candidates


def _check_norms(probe: _Probe, base: Flat, found: Resolved) -> None:
    changes = {norm.name: _norm_change(probe, base, norm) for norm in found.norms if norm.keep is None}

    def changed(names: Iterable[str]) -> Flat:
        flat = dict(base)
        for name in names:
            flat |= {path: change(flat[path]) for path, change in changes[name].items()}
        return flat

    if probe.moved(changed(changes), base) <= 1:
        return
    for norm in found.norms:
        if norm.name not in changes or probe.moved(changed([norm.name]), base) <= 1:
            continue
        head = f"{norm.name}: moving the norm's affine into {', '.join(r.kernel for r in norm.readers)} changes the function"
        for reader in _missing_readers(probe, base, found, norm, changed([norm.name])):
            raise LayoutError(f"{head}, unless {reader[0]} (axis {reader[1]}) is a reader, too: name it")
        raise LayoutError(
            f"{head}: a reader is missing or has another axis; or what the norm returns goes back to the main branch (Post-LN), where an "
            "affine can't be moved: name such a norm with keep=..., and its module in recentered"
        )


def _missing_readers(
    probe: _Probe, base: Flat, found: Resolved, norm: NormLeaves, changed: Flat
) -> Iterable[tuple[str, int]]:
    """The one leaf that undoes the change of a norm's scale, once it is divided like the readers."""
    if norm.scale is None:
        return
    for path, axis in _places(base, found.lanes):
        if path not in (norm.scale, norm.bias) and _can_scale(base[norm.scale], base[path], axis):
            with np.errstate(divide="ignore", invalid="ignore"):
                factor = np.nan_to_num(changed[norm.scale] / base[norm.scale], nan=1.0)
            if probe.moved({**changed, path: changed[path] / along(factor, base[path], axis)}, base) <= 1:
                yield path, axis


def _norm_change(probe: _Probe, base: Flat, norm: NormLeaves) -> Mapping[str, Callable[[Any], Any]]:
    """A change of a norm's leaves that a change of its readers undoes, leaf by leaf."""
    affine = norm.scale or norm.bias
    if affine is None:
        constants = {r.kernel: probe.constant(base[r.kernel], r.axis) for r in norm.readers}
        return {path: lambda kernel, constant=constant: kernel + constant for path, constant in constants.items()}
    if norm.scale is not None:
        factor = probe.random.uniform(0.5, 2.0, size=base[affine].shape)
        scaled = {path: lambda leaf: leaf * factor for path in (norm.scale, norm.bias) if path}
        return scaled | {
            r.kernel: lambda kernel, axis=r.axis: kernel / along(factor, kernel, axis) for r in norm.readers
        }
    if any(r.bias is None or r.new_bias for r in norm.readers):
        return {}
    added = probe.random.normal(size=base[affine].shape)
    read = {r.bias: (along(added, base[r.kernel], r.axis) * base[r.kernel]).sum(axis=r.axis) for r in norm.readers}
    return {
        affine: lambda bias: bias + added,
        **{path: lambda bias, shift=shift: bias - shift for path, shift in read.items() if path},
    }


def _like_writers(probe: _Probe, base: Flat, found: Resolved) -> Iterable[tuple[str, int]]:
    """Leaves that behave like writers and are not described as such, with the axis."""
    known = {*found.writers, *((r.kernel, r.axis) for n in found.norms for r in n.readers)}
    scales = {*found.layer_scales.values(), *(path for n in found.norms for path in (n.scale, n.bias) if path)}
    for path, axis in _places(base, found.lanes):
        if (path, axis) in known or path in scales or path in found.elsewhere:
            continue
        leaf = base[path]
        if probe.moved({**base, path: leaf + probe.constant(leaf, axis)}, base) > 1:
            continue
        if probe.moved({**base, path: leaf + probe.random.normal(size=leaf.shape) * _size(leaf)}, base) > 1:
            yield path, axis


def _check_converted(probe: _Probe, converted: Callable[..., Any], missed: list[tuple[str, int]]) -> None:
    expected, actual = probe.outputs(probe.flat), probe.outputs(probe.flat, jax.jit(converted))
    if [a.shape for a in actual] != [e.shape for e in expected]:
        raise LayoutError("converted: its outputs have other shapes than those of fn")
    if max(map(distance, actual, expected)) <= 1:
        return
    worst = max(float(np.max(np.abs(a - e)) / np.max(np.abs(e))) for a, e in zip(actual, expected, strict=True))
    reason = (
        f"{missed[0][0]} looks like a writer that was missed (axis {missed[0][1]})"
        if missed
        else "something that is no leaf writes a mean: a constant, a norm's output (Post-LN), a non-linear function; see recentered"
    )
    raise LayoutError(f"converted: differs from fn by {worst:.1e} of its largest output; {reason}")


def _places(flat: Flat, lanes: int) -> list[tuple[str, int]]:
    """Every axis of a floating leaf that is as long as the main branch is wide."""
    return [
        (path, axis)
        for path, leaf in flat.items()
        if _is_float(leaf)
        for axis in range(-np.ndim(leaf), 0)
        if leaf.shape[axis] == lanes
    ]


def _can_scale(row: Any, leaf: np.ndarray, axis: int) -> bool:
    return _is_float(row) and np.ndim(row) > 0 and row.shape[-1] == leaf.shape[axis] and stacks(row, leaf, axis)


def _wide(leaf: Any) -> Any:
    return np.asarray(leaf).astype(np.float64) if _is_float(leaf) else leaf


def _is_float(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _size(leaf: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64))))) or 1.0
