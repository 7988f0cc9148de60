"""Do the described writers and readers alone touch the main branch? Then its coordinates are anybody's choice.

Behind neutral affines (gamma 1, beta 0) LayerNorm commutes with every reflection that leaves (1, ..., 1) where it is, so reflecting all
writers along their axes and all readers along theirs changes no output. Whatever else writes to the main branch (a constant, a tied table,
a norm's output, tokens of the caller's), reads it or acts on its single coordinates (a gate) is not reflected, and shows. And with all
readers at zero, no output depends on the writers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from prenorm_jax.bases import along
from prenorm_jax.main_branch.patterns import LayoutError
from prenorm_jax.main_branch.probe import Flat, Probe, places
from prenorm_jax.main_branch.resolve import NormLeaves, Resolved

KEPT = (
    "{}: is kept, and what is behind it, as far as that is described, doesn't show that nothing but the writers writes to the main branch; "
    "describe all of its readers, or pass converted=..., which decides"
)


RECENTERED = (
    "{}: its output is recentered, and fn alone can't show whether that makes the function equal; pass converted=..., the function with "
    "RMSNorm in its norms' places"
)


def check_nothing_else_reads(probe: Probe, base: Flat, found: Resolved) -> None:
    """With all readers at zero, no output depends on the writers. Raises: LayoutError naming the leaf that reads."""
    unread = [norm for norm in found.norms if not norm.readers]  # kept ones, whose readers need not be named
    if any(norm.scale is None for norm in unread):
        return
    silent = {
        **_neutral(base, found.norms),
        **{norm.scale: np.zeros_like(base[norm.scale]) for norm in unread if norm.scale},
    }
    kernels = {reader.kernel for norm in found.norms for reader in norm.readers}
    silent |= {path: np.zeros_like(base[path]) for path in kernels}
    if not probe.is_finite(silent):
        return
    writers = dict.fromkeys(path for path, _ in found.writers if path not in kernels)
    written = {path: probe.values(base[path]) for path in writers}

    def seen(flat: Flat) -> bool:
        return probe.moved({**flat, **{path: leaf for path, leaf in written.items() if np.any(flat[path])}}, flat) > 1

    if not seen(silent):
        return
    for path, axis in places(base, found.lanes):
        if (
            path not in kernels
            and probe.is_finite(alone := {**silent, path: np.zeros_like(base[path])})
            and not seen(alone)
        ):
            role = (
                "a writer, and outputs see more of it than it writes: is it"
                if path in writers
                else "no reader, and it is"
            )
            raise LayoutError(
                f"{path} {base[path].shape}: described as {role} a reader (axis {axis}), raw or behind a norm? Name it among a norm's "
                "readers; a leaf that reads and writes has to be untied, or its norm kept"
            )
    raise LayoutError(
        f"{found.writers[0][0]}: outputs see what it writes even with all described readers at zero: the main branch is returned, or read "
        "by what is not described"
    )


def check_coordinates(probe: Probe, base: Flat, found: Resolved, recentered: Sequence[str]) -> None:
    """Reflecting writers and readers changes no output. Raises: LayoutError naming what else touches the main branch, if it is a leaf; and
    where that can't be shown."""
    unread = [norm.name for norm in found.norms if not norm.readers]
    if recentered or unread:
        for message in untold(probe, base, found):
            raise LayoutError(f"{message}; or pass converted=..., which decides")
        raise LayoutError(RECENTERED.format(recentered[0]) if recentered else KEPT.format(unread[0]))
    if found.lanes < 3:  # no reflection but the identity
        return
    normal = probe.random.normal(size=found.lanes)
    normal -= normal.mean()
    normal /= np.linalg.norm(normal)
    readers = [(reader.kernel, reader.axis) for norm in found.norms for reader in norm.readers]

    def reflected(flat: Flat, leaves: Iterable[tuple[str, int]]) -> Flat:
        flat = dict(flat)
        for path, axis in leaves:
            row = along(normal, flat[path], axis)
            flat[path] = (flat[path] - 2 * row * (row * flat[path]).sum(axis=axis, keepdims=True)).astype(
                flat[path].dtype
            )
        return flat

    known = dict.fromkeys([*found.writers, *readers])
    neutral = _neutral(base, found.norms)
    if not probe.is_finite(neutral) or probe.moved(reflected(neutral, known), neutral) <= 1:
        return
    for message in untold(probe, neutral, found):
        raise LayoutError(message)
    for path, axis in places(base, found.lanes):
        if (path, axis) not in known and probe.moved(reflected(neutral, [*known, (path, axis)]), neutral) <= 1:
            raise LayoutError(
                f"{path} {base[path].shape}: described as neither a writer nor a reader, and its axis {axis} is that of the main branch"
            )
    kept = [norm.name for norm in found.norms if norm.keep is not None]
    if kept:
        raise LayoutError(KEPT.format(kept[0]))
    raise LayoutError(
        "more than the described writers and readers touches the main branch: a constant or a norm's output that writes (name its module "
        "in recentered), an input of that width, a map of single coordinates in front of a reader (which Pre-RMSNorm allows); "
        "converted=... decides"
    )


def untold(probe: Probe, base: Flat, found: Resolved) -> Iterator[str]:
    """What to say of each leaf that behaves like a writer (or like a reader behind a norm without affine) and is not described so:
    constants along an axis are invisible, random values are not."""
    known = {*found.writers, *((r.kernel, r.axis) for n in found.norms for r in n.readers)}
    scales = {*found.layer_scales.values(), *(path for n in found.norms for path in (n.scale, n.bias) if path)}
    for path, axis in places(base, found.lanes):
        if (path, axis) in known or path in scales or path in found.elsewhere:
            continue
        leaf = base[path]
        constant, values = (
            {**base, path: leaf + change} for change in (probe.constant(leaf, axis), probe.values(leaf))
        )
        if probe.moved(constant, base) <= 1 < probe.moved(values, base):
            yield (
                f"{path} {leaf.shape}: described as no writer, yet no output sees a constant along its axis {axis}: a writer that was "
                "missed, or a reader behind a norm without affine? If it feeds another norm than the main branch's (behind the embedding, "
                "of another main branch), describe that in others as a MainBranch of its own"
            )


def _neutral(base: Flat, norms: Iterable[NormLeaves]) -> Flat:
    """The tree with norms whose scale is 1 and whose bias is 0."""
    flat = dict(base)
    for norm in norms:
        for path, value in ((norm.scale, 1), (norm.bias, 0)):
            if path is not None:
                flat[path] = np.full_like(base[path], value)
    return flat
