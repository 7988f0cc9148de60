"""Does a description describe the function? Numbers say, where LayerNorm itself can't be asked.

LayerNorm ignores a multiple of (1, ..., 1), and what it multiplies by gamma its readers may divide by. So, on the Pre-LN function fn:

    LayerScale   moving lambda into its writers changes no output;
    writers      adding a random constant along a writer's axis (one for each index of the other axes) changes no output;
    norms        multiplying gamma and beta by a random positive vector and dividing all readers by it along their axes changes no output
                 (a norm with beta alone: adding to it and subtracting what the readers make of that from their biases; a norm without
                 either: adding a constant along the readers' axes, since what they read has zero mean);
    affines      folding a random gamma and beta into the readers and their biases changes no output;
    readers      with all readers at zero, no output depends on the writers;
    coordinates  reflecting writers and readers changes no output (see `coordinates`): nothing else writes, nothing else reads.

What fn alone can't show: whether recentering a module's output makes the function equal, and what reads a norm that is kept, if that is not
described. `check` asks for `converted` then: the function with RMSNorm in its norms' places (and the transforms inside), which has to
equal fn, and decides wherever it is given. It alone can show one number that is added to all channels of a token (and is no leaf):
LayerNorm hides that at any depth; and it alone looks at the norms' formula and eps: whatever removes a mean passes the others (centring
without a variance, a variance over d - 1, eps outside the root, another eps than the description's). Inputs that don't reach a leaf
don't test it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from prenorm_jax.bases import along
from prenorm_jax.main_branch.coordinates import check_coordinates, check_nothing_else_reads, untold
from prenorm_jax.main_branch.patterns import LayoutError
from prenorm_jax.main_branch.probe import Flat, Probe, can_scale, places
from prenorm_jax.main_branch.resolve import NormLeaves, Resolved
from prenorm_jax.paths import Tree

if TYPE_CHECKING:
    from prenorm_jax.main_branch.rules import MainBranch


def check(
    spec: MainBranch,
    fn: Callable[..., Any],
    params: Tree,
    inputs: tuple[Any, ...],
    converted: Callable[..., Any] | None = None,
) -> None:
    """`MainBranch.check`."""
    found = spec.resolve(params)
    if spec.stacked:
        params, fn = spec.with_layers_first(params), _of_layers_first(spec, fn)
        converted = _of_layers_first(spec, converted) if converted is not None else None
    with jax.enable_x64(True):
        probe = Probe(fn, params, inputs)
        base = _without_layer_scales(probe, found)
        _check_writers(probe, base, found)
        _check_norms(probe, base, found)
        _check_affines(probe, base, found)
        check_nothing_else_reads(probe, base, found)
        if converted is not None:
            _check_converted(probe, base, found, converted)
        else:
            check_coordinates(probe, base, found, spec.recentered)


def _of_layers_first(spec: MainBranch, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a tree whose layers have been moved in front."""
    return lambda params, *inputs: fn(spec.with_layers_back(params), *inputs)


def _without_layer_scales(probe: Probe, found: Resolved) -> Flat:
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


def _check_writers(probe: Probe, base: Flat, found: Resolved) -> None:
    shifts = {(path, axis): probe.constant(base[path], axis) for path, axis in found.writers}

    def shifted(flat: Flat, writers: Iterable[tuple[str, int]]) -> Flat:
        return {**flat, **{path: flat[path] + shifts[path, axis] for path, axis in writers}}

    if probe.moved(shifted(base, found.writers), base) <= 1:
        if found.writers and probe.moved({**base, **{p: probe.values(base[p]) for p, _ in found.writers}}, base) <= 1:
            raise LayoutError(
                f"{found.writers[0][0]}: no output of fn depends on it, nor on any other writer, so nothing is shown; does fn use the "
                "parameters that it is given, and do the inputs reach them?"
            )
        return
    movers = [writer for writer in found.writers if probe.moved(shifted(base, [writer]), base) > 1] or [*found.writers]
    path, axis = movers[0]
    head = f"{path} {base[path].shape}: described as a writer along axis {axis}, but outputs see a constant along it"
    for other in range(-base[path].ndim, 0):
        constant = probe.constant(base[path], other)
        if other != axis and probe.moved({**base, path: base[path] + constant}, base) <= 1:
            raise LayoutError(f"{head}; they don't along axis {other}: is that the axis?")
    for scale, leaf in base.items():
        if scale in found.layer_scales.values() or not can_scale(leaf, base[path], axis):
            continue
        row = along(leaf, base[path], axis)
        if np.all(row != 0) and probe.moved({**base, path: base[path] + shifts[path, axis] / row}, base) <= 1:
            raise LayoutError(f"{head}: {scale} {leaf.shape} multiplies what it writes; give Writer(scale=...)")
    raw = _culprits(probe, base, found, lambda flat: shifted(flat, movers), _blind)
    if raw:
        raise LayoutError(
            f"{raw}: reads the main branch raw, behind no norm, and so sees the mean of what {path} writes; a main branch that is read "
            "raw can't be recentered or compressed"
        )
    gates = _culprits(probe, base, found, lambda flat: shifted(flat, movers), _uniform)
    if gates:
        raise LayoutError(
            f"{gates}: a gate or a scale for each channel, between what {path} writes and a norm: it makes a mean out of what has none. "
            "Only a vector right behind a writer can move into it (Writer(scale=...))"
        )
    outputs = [distance > 1 for distance in probe.distances(probe.outputs(shifted(base, movers)), probe.outputs(base))]
    if not all(outputs):
        raise LayoutError(
            f"{head}: {outputs.count(True)} of {len(outputs)} outputs do (the first is number {outputs.index(True)}), the others don't. A "
            "main branch that is returned un-normed has a mean that is wanted: leave that output out of fn, or the model as it is"
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


def _culprits(
    probe: Probe,
    base: Flat,
    found: Resolved,
    shifted: Callable[[Flat], Flat],
    change: Callable[[np.ndarray, int], np.ndarray],
) -> str:
    """The leaves that have to be changed for a shift to be invisible, other than those described as shifted."""
    affine = {path for norm in found.norms for path in (norm.scale, norm.bias)}
    readers = {(reader.kernel, reader.axis) for norm in found.norms for reader in norm.readers}
    known = {
        *found.writers,
        *(readers if change is _uniform else ()),
    }  # a uniform reader reads nothing of a normalised row
    candidates = [place for place in places(base, found.lanes) if place not in known and place[0] not in affine]

    def seen(changed: Iterable[tuple[str, int]]) -> bool:
        flat = dict(base)
        for path, axis in changed:
            flat[path] = change(flat[path], axis)
        return not probe.is_finite(flat) or probe.moved(shifted(flat), flat) > 1

    if not candidates or seen(candidates):
        return ""
    for place in list(candidates):
        rest = [other for other in candidates if other != place]
        if not seen(rest):
            candidates = rest
    return " and ".join(f"{path} (axis {axis})" for path, axis in candidates)


def _blind(leaf: np.ndarray, axis: int) -> np.ndarray:
    """A reader that sees no mean. Of a vector's reader there would be nothing left."""
    return leaf - leaf.mean(axis=axis, keepdims=True) if leaf.ndim > 1 else leaf


def _uniform(leaf: np.ndarray, axis: int) -> np.ndarray:
    """A gate that is one for all channels."""
    return np.broadcast_to(leaf.mean(axis=axis, keepdims=True), leaf.shape).copy()


def _check_norms(probe: Probe, base: Flat, found: Resolved) -> None:
    factors = {n.name: probe.random.uniform(0.5, 2.0, size=base[n.scale].shape) for n in found.norms if n.scale}
    changes = {n.name: _norm_change(probe, base, n, factors.get(n.name)) for n in found.norms if n.keep is None}

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
        for path, axis in _missing_readers(probe, base, found, norm, changed([norm.name]), factors.get(norm.name)):
            if path in (reader.kernel for reader in norm.readers):
                raise LayoutError(f"{head}; {path} {base[path].shape} reads along its axis {axis}")
            raise LayoutError(f"{head}, unless {path} (axis {axis}) is a reader, too: name it")
        raise LayoutError(
            f"{head}: readers are missing or have other axes; or what the norm returns goes back to the main branch (Post-LN), where an "
            "affine can't be moved: name such a norm with keep=..., and its module in recentered; or the leaf holds gamma - 1: add 1"
        )


def _missing_readers(
    probe: Probe, base: Flat, found: Resolved, norm: NormLeaves, changed: Flat, factor: np.ndarray | None
) -> Iterable[tuple[str, int]]:
    """The one leaf that undoes the change of a norm's scale, once it is divided like the readers along this axis."""
    kernels = {reader.kernel for reader in norm.readers}
    for path, axis in places(base, found.lanes) if factor is not None else ():
        if path not in (norm.scale, norm.bias) and can_scale(factor, base[path], axis):
            leaf = base[path] if path in kernels else changed[path]
            if probe.moved({**changed, path: leaf / along(factor, leaf, axis)}, base) <= 1:
                yield path, axis


def _norm_change(
    probe: Probe, base: Flat, norm: NormLeaves, factor: np.ndarray | None
) -> Mapping[str, Callable[[Any], Any]]:
    """A change of a norm's leaves (of its scale, by a factor) that a change of its readers undoes, leaf by leaf."""
    affine = norm.scale or norm.bias
    if affine is None:
        constants = {r.kernel: probe.constant(base[r.kernel], r.axis) for r in norm.readers}
        return {path: functools.partial(np.add, constant) for path, constant in constants.items()}
    if factor is not None:
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
        **{path: functools.partial(np.add, -shift) for path, shift in read.items() if path},
    }


def _check_affines(probe: Probe, base: Flat, found: Resolved) -> None:
    """Folding gamma and beta into the readers, as the transforms do, changes no output; a factor alone would not tell them apart, nor the
    biases of two readers. A beta that a reader has no place for is 0."""
    reading = [(reader.kernel, reader.axis) for norm in found.norms for reader in norm.readers]
    norms = [
        norm
        for norm in found.norms
        # Behind several norms each of them would be folded into the reader.
        if norm.keep is None and not norm.bare and all(reading.count((r.kernel, r.axis)) == 1 for r in norm.readers)
    ]
    told_apart = dict(base)
    for norm in norms:
        if norm.scale:
            gamma = base[norm.scale]
            told_apart[norm.scale] = gamma * probe.random.uniform(0.5, 2.0, size=gamma.shape).astype(gamma.dtype)
        if norm.bias:
            beta = base[norm.bias]
            told_apart[norm.bias] = (probe.random.normal(size=beta.shape) * _has_place(norm)).astype(beta.dtype)
    if not probe.is_finite(told_apart) or probe.moved(functools.reduce(_folded, norms, told_apart), told_apart) <= 1:
        return
    norm = next((norm for norm in norms if probe.moved(_folded(told_apart, norm), told_apart) > 1), norms[0])
    biases = ", ".join(f"{reader.bias} of {reader.kernel}" for reader in norm.readers if reader.bias)
    raise LayoutError(
        f"{norm.name}: folding its scale ({norm.scale or 'none'}) and bias ({norm.bias or 'none'}) into its readers changes the "
        f"function: are the two exchanged, or biases of its readers ({biases or 'none'})?"
    )


def _has_place(norm: NormLeaves) -> bool:
    """Whether the tree has a bias of each of a norm's readers."""
    return all(reader.bias and not reader.new_bias for reader in norm.readers)


def _folded(flat: Flat, norm: NormLeaves) -> Flat:
    """The tree with a norm's scale and bias in its readers."""
    folded = dict(flat)
    for reader in norm.readers:
        kernel = flat[reader.kernel]
        if norm.bias and reader.bias and _has_place(norm):
            read = (along(flat[norm.bias], kernel, reader.axis) * kernel).sum(axis=reader.axis)
            folded[reader.bias] = folded[reader.bias] + read.reshape(folded[reader.bias].shape)
        if norm.scale:
            folded[reader.kernel] = kernel * along(flat[norm.scale], kernel, reader.axis)
    for path, value in ((norm.scale, 1), (norm.bias, 0)):
        if path is not None:
            folded[path] = np.full_like(flat[path], value)
    return folded


def _check_converted(probe: Probe, base: Flat, found: Resolved, converted: Callable[..., Any]) -> None:
    expected, actual = probe.outputs(probe.flat), probe.outputs(probe.flat, jax.jit(converted))
    if [a.shape for a in actual] != [e.shape for e in expected]:
        raise LayoutError("converted: its outputs have other shapes than those of fn")
    if max(probe.distances(actual, expected)) <= 1:
        return
    worst = max(float(np.max(np.abs(a - e)) / np.max(np.abs(e))) for a, e in zip(actual, expected, strict=True))
    reason = (
        next(untold(probe, base, found), None)
        or "something that is no leaf writes a mean: a constant, a norm's output (Post-LN), a non-linear function; see recentered"
    )
    raise LayoutError(f"converted: differs from fn by {worst:.1e} of its largest output; {reason}")
