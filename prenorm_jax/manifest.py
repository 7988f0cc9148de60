"""What a parameter tree says about itself: a small dict, JSON-able, saved beside the parameters and checked when they are loaded.

A tree does not show in which chart it is. Dropped and reflected coordinates have the same shapes, a packed tree is as wide as a full
one, and a recentered one differs in its values alone. So a manifest says it, and `check_manifest` holds it against the tree:

    format, prenorm_jax    the version of this dict, and of the package that wrote it
    chart                  "pre_ln", "pre_rmsnorm" or "pre_crmsnorm"
    basis, layout          of pre_crmsnorm: "reflect" or "drop"; "compact", "packed" or "plain" (`to_plain_rmsnorm`); else null
    coordinates            those in which the parameters are trained: "pre_ln" or "native"
    width, lanes           the nominal width d, and the lanes of the main branch in this tree
    norms                  name -> {"eps": of the LayerNorm, "kept": why its affine stays or null, "folded": nothing of it is left}
    computation            the dtype in which the model is meant to compute, or null where nobody said
    storage                dtype -> number of leaves
    tree                   a digest of all paths and shapes
    notes                  whatever the writer adds
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.bases import BASES, last
from prenorm_jax.main_branch import LayoutError, MainBranch, NormLeaves, Resolved
from prenorm_jax.paths import Tree, leaves
from prenorm_jax.transforms import require_recentered
from prenorm_jax.version import VERSION

FORMAT = 1
LANES_LESS: dict[str, dict[str | None, int]] = {
    "pre_ln": {None: 0},
    "pre_rmsnorm": {None: 0},
    "pre_crmsnorm": {"compact": 1, "plain": 1, "packed": 0},
}
"""Chart -> layout -> nominal width less lanes."""


class ManifestError(LayoutError):
    """A manifest that can't be read, or that is not the tree's; a line for each contradiction."""


def manifest(
    params: Tree,
    spec: MainBranch,
    chart: str = "pre_ln",
    *,
    basis: str | None = None,
    layout: str | None = None,
    coordinates: str | None = None,
    eps: float | Mapping[str, float] | None = None,
    computation: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of a tree, for json.dumps. It is checked against the tree before it is returned.

    Args:
      params: the tree to be saved; leaves may be shape structs, of which the values are not checked.
      spec: its description.
      chart: of `params`: "pre_ln", "pre_rmsnorm" or "pre_crmsnorm".
      basis, layout: of "pre_crmsnorm"; "reflect" and "compact" unless said otherwise.
      coordinates: "pre_ln" or "native"; the chart's own unless said otherwise.
      eps: of the LayerNorms whose description has none: one for all, or norm name -> eps. It is the Pre-LN model's in every chart.
      computation: the dtype in which the model is meant to compute.
      notes: anything JSON-able besides.

    Raises: ManifestError for a chart that is not the tree's, an unknown eps, an unknown word; LayoutError for a description that is
      not the tree's.

    >>> from prenorm_jax.main_branch import Norm, Reader, Writer
    >>> spec = MainBranch([Writer("down")], [Norm([Reader("up")], eps=1e-6)])
    >>> params = {"down": jnp.array([[1.0, -1.0]]), "up": jnp.ones((2, 3))}
    >>> made = manifest(params, spec, "pre_rmsnorm", computation="bfloat16")
    >>> made["width"], made["norms"], made["storage"]
    (2, {'up': {'eps': 1e-06, 'kept': None, 'folded': True}}, {'float32': 2})
    >>> check_manifest(made, params, spec)
    """
    if chart == "pre_crmsnorm":
        basis, layout = basis or "reflect", layout or "compact"
    found = spec.resolve(params)
    made = {
        "format": FORMAT,
        "prenorm_jax": VERSION,
        "chart": chart,
        "basis": basis,
        "layout": layout,
        "coordinates": coordinates or ("pre_ln" if chart == "pre_ln" else "native"),
        "width": found.lanes + LANES_LESS.get(chart, {}).get(layout, 0),
        "lanes": found.lanes,
        "norms": {
            norm.name: {"eps": _eps(norm, eps), "kept": _kept(norm), "folded": _folded(norm, leaves(params))}
            for norm in found.norms
        },
        "computation": None if computation is None else jnp.dtype(computation).name,
        "storage": _storage(params),
        "tree": _digest(params),
        "notes": dict(notes or {}),
    }
    check_manifest(made, params, spec)
    return made


def check_manifest(manifest: Mapping[str, Any], params: Tree, spec: MainBranch) -> None:
    """Holds a manifest against the tree that was loaded with it.

    Where leaves have no values (shape structs, tracers), structure alone is checked.

    Raises: ManifestError, a line for each contradiction; LayoutError for a description that is not the tree's.
    """
    for faults in (_unreadable, _contradicted_by_structure, _contradicted_by_values):
        lines = faults(manifest, params, spec)
        if lines:
            raise ManifestError("\n".join(f"manifest: {line}" for line in lines))


# The dict by itself.


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_eps(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_norm(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {"eps", "kept", "folded"}
        and _is_eps(value["eps"])
        and (value["kept"] is None or isinstance(value["kept"], str))
        and (value["folded"] is None or isinstance(value["folded"], bool))
    )


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": (str(FORMAT), lambda value: value == FORMAT),
    "prenorm_jax": ("a version", _is_name),
    "chart": (", ".join(LANES_LESS), lambda value: _is_name(value) and value in LANES_LESS),
    "basis": (f"{', '.join(BASES)} or null", lambda value: value is None or (_is_name(value) and value in BASES)),
    "layout": ("compact, packed, plain or null", lambda value: value in (None, "compact", "packed", "plain")),
    "coordinates": ("pre_ln or native", lambda value: value in ("pre_ln", "native")),
    "width": ("a positive integer", _is_count),
    "lanes": ("a positive integer", _is_count),
    "norms": (
        'name -> {"eps": a number >= 0, "kept": a reason or null, "folded": true, false or null}',
        lambda value: isinstance(value, Mapping) and all(map(_is_norm, value.values())),
    ),
    "computation": ("the name of a dtype, or null", lambda value: value is None or _is_name(value)),
    "storage": (
        "dtype -> number of leaves",
        lambda value: isinstance(value, Mapping) and all(map(_is_count, value.values())),
    ),
    "tree": ("a digest", _is_name),
    "notes": ("a mapping", lambda value: isinstance(value, Mapping)),
}
"""Field -> what it holds, in words and as a predicate."""


def _unreadable(manifest: Mapping[str, Any], params: Tree, spec: MainBranch) -> list[str]:
    if not isinstance(manifest, Mapping):
        return [f"got a {type(manifest).__name__}; expected the dict that prenorm_jax.manifest makes"]
    if "format" in manifest and manifest["format"] != FORMAT:
        return [
            f"format: got {manifest['format']!r}; this version of prenorm_jax ({VERSION}) reads {FORMAT}; "
            f"install the one that wrote it ({manifest.get('prenorm_jax', 'not said')})"
        ]
    lines = [f"{name}: is missing; expected {words}" for name, (words, _) in FIELDS.items() if name not in manifest]
    lines += [
        f"{name}: got {manifest[name]!r}; expected {words}"
        for name, (words, holds) in FIELDS.items()
        if name in manifest and not holds(manifest[name])
    ]
    lines += [f"{name}: unknown; what you add goes into notes" for name in manifest if name not in FIELDS]
    return lines or _inconsistent(manifest)


def _inconsistent(manifest: Mapping[str, Any]) -> list[str]:
    chart, basis, layout = (manifest[name] for name in ("chart", "basis", "layout"))
    less = LANES_LESS[chart]
    if layout not in less or (basis is None) != (layout is None):
        return [f"chart {chart}: got basis {basis!r} and layout {layout!r}; expected both of pre_crmsnorm, else null"]
    if layout == "plain" and basis != "reflect":
        return [f"layout plain: got basis {basis!r}; expected 'reflect', the one that gives a plain RMSNorm model"]
    lines = []
    if manifest["lanes"] != manifest["width"] - less[layout]:
        lines.append(
            f"lanes: got {manifest['lanes']} of nominal width {manifest['width']}; expected {manifest['width'] - less[layout]} "
            f"in {_chart(manifest)}"
        )
    if manifest["coordinates"] == "pre_ln" and chart != "pre_ln":
        lines.append(f"coordinates: got 'pre_ln' of a {chart} tree; expected 'native', or the pre_ln tree itself")
    return lines


# The dict and the tree.


def _contradicted_by_structure(manifest: Mapping[str, Any], params: Tree, spec: MainBranch) -> list[str]:
    found = spec.resolve(params)
    lines = []
    if found.lanes != manifest["lanes"]:
        lines.append(f"lanes: got {manifest['lanes']} ({_chart(manifest)}); the tree's main branch has {found.lanes}")
    if found.width not in (None, manifest["width"]):
        lines.append(f"width: got {manifest['width']}; the description says {found.width}")
    lines += _other_norms(manifest["norms"], found)
    if not lines and _digest(params) != manifest["tree"]:
        lines.append(f"tree: got {manifest['tree']}, found {_digest(params)}: written for other paths or shapes")
    if not lines and _storage(params) != manifest["storage"]:
        lines.append(f"storage: got {dict(manifest['storage'])}, found {_storage(params)}; a cast tree needs a new one")
    return lines


def _other_norms(said: Mapping[str, Any], found: Resolved) -> list[str]:
    names = {norm.name for norm in found.norms}
    for missing, where in ((sorted(set(said) - names), "in the tree"), (sorted(names - set(said)), "in the manifest")):
        if missing:
            return [f"norms: {missing[0]} is not {where} ({len(missing)} such): it was written for another model"]
    lines = []
    for norm in found.norms:
        eps, kept = said[norm.name]["eps"], said[norm.name]["kept"]
        if norm.eps not in (None, eps):
            lines.append(f"norm {norm.name}: got eps {eps}; the description says {norm.eps}")
        if (kept is None) != (_kept(norm) is None):
            lines.append(f"norm {norm.name}: got kept {kept!r}; the description says {_kept(norm)!r}")
    return lines


def _contradicted_by_values(manifest: Mapping[str, Any], params: Tree, spec: MainBranch) -> list[str]:
    found, flat = spec.resolve(params), leaves(spec.with_layers_first(params))
    lines = []
    for norm in found.norms:
        said, folded = manifest["norms"][norm.name]["folded"], _folded(norm, flat)
        if None not in (said, folded) and said != folded:
            lines.append(f"norm {norm.name}: got folded {said}; its scale and bias in the tree say {folded}")
        if manifest["chart"] == "pre_crmsnorm" and norm.keep is None and folded is False:
            lines.append(f"norm {norm.name}: has an affine of its own, which has no place in {_chart(manifest)}")
    if manifest["layout"] == "packed":
        lines += _not_packed(found, flat)
    if manifest["chart"] == "pre_rmsnorm" and all(_has_value(flat[path]) for path, _ in found.writers):
        try:
            require_recentered(params, spec)
        except LayoutError as error:
            lines.append(f"chart: got pre_rmsnorm, but {error}")
    return lines


def _not_packed(found: Resolved, flat: Mapping[str, Any]) -> list[str]:
    """A packed tree has its readers' biases in their kernels, and its writers write nothing to the spare lane."""
    biased = [leaf.bias for norm in found.norms if norm.keep is None for leaf in norm.readers if not leaf.new_bias]
    lines = [f"layout: got packed, but {path} is a reader's bias; unpacked ones have it" for path in biased[:1] if path]
    for path, axis in found.writers:
        if _has_value(flat[path]) and np.any(np.asarray(last(flat[path], axis)) != 0):
            return [*lines, f"layout: got packed, but {path} writes to the spare lane"]
    return lines


# What a tree says.


def _chart(manifest: Mapping[str, Any]) -> str:
    return ", ".join(manifest[name] for name in ("chart", "basis", "layout") if manifest[name] is not None)


def _eps(norm: NormLeaves, given: float | Mapping[str, float] | None) -> float:
    value = norm.eps if norm.eps is not None else given.get(norm.name) if isinstance(given, Mapping) else given
    if value is None:
        raise ManifestError(f"norm {norm.name}: its eps is not known; give Norm(eps=...), or manifest(eps=...)")
    return float(value)


def _kept(norm: NormLeaves) -> str | None:
    """Why the norm's affine can't move into its readers."""
    closed = [reader.kernel for reader in norm.readers if reader.bias is None]
    if norm.keep is None and norm.bias is not None and closed:
        return f"its reader {closed[0]} can take no bias"
    return norm.keep


def _folded(norm: NormLeaves, flat: Mapping[str, Any]) -> bool | None:
    """Whether no scale and bias are left, or only ones and zeros; None where values are not known."""
    own = [(flat[path], neutral) for path, neutral in ((norm.scale, 1), (norm.bias, 0)) if path]
    if not all(_has_value(leaf) for leaf, _ in own):
        return None
    return all(bool(np.all(np.asarray(leaf) == neutral)) for leaf, neutral in own)


def _has_value(leaf: Any) -> bool:
    return not isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer)


def _storage(params: Tree) -> dict[str, int]:
    return dict(sorted(Counter(jnp.dtype(leaf.dtype).name for leaf in leaves(params).values()).items()))


def _digest(params: Tree) -> str:
    lines = sorted(f"{path} {tuple(leaf.shape)}" for path, leaf in leaves(params).items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
