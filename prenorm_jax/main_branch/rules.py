"""The rules of a description, as data: writers, readers, norms, and the main branch that they make."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prenorm_jax.main_branch import patterns
from prenorm_jax.main_branch.patterns import LayoutError
from prenorm_jax.main_branch.resolve import Resolved, resolve
from prenorm_jax.paths import Tree, leaves, with_moved_axes


@dataclasses.dataclass(frozen=True)
class Writer:
    """A leaf whose `axis` runs over the coordinates of the main branch that it writes.

    Args:
      leaf: pattern of the leaf: an output kernel, its bias, an embedding or position table, a class token.
      axis: the output axis, negative; the last one unless said otherwise.
      optional: whether a tree may lack it.
      scale: pattern of the LayerScale behind it, a vector (..., d) that multiplies what it writes (several writers may share it).
        diag(scale) W is what gets recentered: the vector moves into W first and becomes ones. A name in braces must occur in `leaf`.
      scale_optional: whether a tree may lack it.
    """

    leaf: str
    axis: int = -1
    optional: bool = False
    scale: str | None = None
    scale_optional: bool = False


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
      module: pattern of its module, for `swap_norms` and `intercept_norms`, where that is not the parent of its scale or bias: a norm
        without affine has no leaf to be found by.
    """

    readers: Sequence[Reader] = ()
    scale: str | None = None
    bias: str | None = None
    eps: float | None = None
    keep: str | None = None
    module: str | None = None

    def is_at(self, module: str) -> bool:
        """Whether the module of this path is (one of) this rule's."""
        if self.module is not None:
            return patterns.match(self.module, module)
        pattern = self.scale or self.bias or ""
        name = pattern.rpartition("/")[2]
        return bool(pattern) and patterns.match(pattern, f"{module}/{'scale' if '*' in name else name}")


@dataclasses.dataclass(frozen=True)
class MainBranch:
    """Where a parameter tree touches the main branch.

    Args:
      writers: the leaves that write to it.
      norms: the norms on it, each with its readers.
      others: patterns of the leaves that don't touch it (or only behind an activation that the model recenters itself); or another
        main branch of the same tree, which stands for all leaves that it names (see `side_by_side`).
      width: the nominal width d: a number, or (leaf pattern, negative axis) where that size can be read; None if unknown. It tells
        a compressed tree (d - 1 lanes) from one that is not, which `to_pre_ln` needs.
      recentered: patterns of the modules whose output reaches the main branch otherwise than through a writer (a tied table, dropout, a
        norm behind the embedding, a constant): `swap_norms` and `intercept_norms` recenter, or compress, what they return.
      stacked: {pattern: axis} of leaves whose layers are stacked along another axis than the first, as `nn.scan(variable_axes={"params":
        1})` does: {"layers/**": 1}. The axes of a rule are those of one layer's leaf all the same: -1 for a norm's scale (d, layers).

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
    others: "Sequence[str | MainBranch]" = ()
    width: int | tuple[str, int] | None = None
    recentered: Sequence[str] = ()
    stacked: Mapping[str, int] | tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "writers", _all(self.writers, "writers", Writer))
        norms = _all(self.norms, "norms", Norm)
        norms = tuple(dataclasses.replace(n, readers=_all(n.readers, "readers of a norm", Reader)) for n in norms)
        object.__setattr__(self, "norms", norms)
        object.__setattr__(self, "others", _all(self.others, "others", str, MainBranch))
        object.__setattr__(self, "recentered", _all(self.recentered, "recentered", str))
        if not isinstance(self.width, int | tuple | None):
            raise LayoutError(f"width: {self.width!r}; expected a number, (leaf pattern, negative axis), or None")
        object.__setattr__(self, "stacked", tuple(dict(self.stacked).items()))
        for stack, axis in dict(self.stacked).items():
            if not isinstance(axis, int) or axis < 1:
                raise LayoutError(
                    f"{stack}: layers stacked on axis {axis!r}; give an axis from 1 on (on axis 0, leave it out of stacked)"
                )
        readers = [reader for norm in self.norms for reader in norm.readers]
        axes = [(w.leaf, w.axis) for w in self.writers] + [(r.kernel, r.axis) for r in readers]
        axes += [self.width] if isinstance(self.width, tuple) else []
        for leaf, axis in axes:
            if not isinstance(axis, int) or axis >= 0:
                instead = f" (write {axis} - rank)" if isinstance(axis, int) else ""
                raise LayoutError(f"{leaf}: axis {axis!r}; axes are negative numbers, counted from the last{instead}")
        for kind, of, pattern in [
            *(("the bias", reader.kernel, reader.bias) for reader in readers),
            *(("the scale", writer.leaf, writer.scale) for writer in self.writers),
        ]:
            _require_names_of(pattern, of, kind)

    def resolve(self, params: Tree) -> Resolved:
        """The rules applied to one tree: every leaf in its role. Shapes alone are read, so tracers and shape structs do.

        Raises: LayoutError, as the package's docstring says.
        """
        shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves(params).items()}
        for pattern in dict(self.stacked):
            patterns.found(pattern, shapes)
        for path, axis in self._layer_axes(shapes).items():
            layers = shapes[path][axis : axis + 1]
            shapes[path] = layers + shapes[path][:axis] + shapes[path][axis + 1 :]
        return resolve(self, shapes)

    @property
    def layers_first(self) -> "MainBranch":
        """The same for a tree whose stacked layers have been moved in front."""
        return dataclasses.replace(self, stacked=())

    def with_layers_first(self, params: Tree) -> Tree:
        """A tree with its stacked layers in front, where the transforms want them."""
        axes = self._layer_axes(leaves(params))
        return with_moved_axes(params, {path: (axis, 0) for path, axis in axes.items()}) if axes else params

    def with_layers_back(self, params: Tree) -> Tree:
        """The inverse of `with_layers_first`."""
        axes = self._layer_axes(leaves(params))
        return with_moved_axes(params, {path: (0, axis) for path, axis in axes.items()}) if axes else params

    def _layer_axes(self, paths: Mapping[str, Any]) -> dict[str, int]:
        """The axis of the layers of each leaf that is stacked along another than the first."""
        axes: dict[str, int] = {}
        for pattern, axis in dict(self.stacked).items():
            for path, _ in patterns.matches(pattern, paths):
                if axes.setdefault(path, axis) != axis:
                    raise LayoutError(f"{path}: stacked on axis {axes[path]} and on axis {axis}; leave one of them")
        return axes

    def norm_at(self, module: str) -> Norm | None:
        """The rule of the norm whose module has this path, or None. Raises: LayoutError where two rules claim it."""
        rules = [norm for norm in self.norms if norm.is_at(module)]
        if len(rules) > 1:
            raise LayoutError(f"{module}: the module of {len(rules)} norms of the description; one norm is one rule")
        return rules[0] if rules else None

    def is_recentered(self, module: str) -> bool:
        """Whether the output of the module of this path is recentered."""
        return any(patterns.match(pattern, module) for pattern in self.recentered)

    def check(
        self, fn: Callable[..., Any], params: Tree, *inputs: Any, converted: Callable[..., Any] | None = None
    ) -> None:
        """Tests the description against the Pre-LN function that it describes, with numbers: see `main_branch.check`.

        Args:
          fn: fn(params, *inputs), deterministic and jittable, with LayerNorms; any pytree of arrays as its output.
          params, *inputs: on which the description is tested; evaluated in float64 where fn lets it.
          converted: converted(params, *inputs) on the same Pre-LN parameters, which transforms them and runs RMSNorm (or CRMSNorm): it has
            to equal fn. It decides where given, and has to be given where fn alone can't show enough: where outputs are recentered, where a
            norm is kept whose readers are not described, and where something acts on single coordinates (a mix per channel in front of a
            reader), which Pre-RMSNorm allows and Pre-CRMSNorm doesn't.

        Raises: LayoutError naming the leaf and the likely reason.
        """
        from prenorm_jax.main_branch.check import check

        check(self, fn, params, inputs, converted)


def side_by_side(*branches: MainBranch) -> tuple[MainBranch, ...]:
    """Main branches of one tree (an encoder's and a decoder's, two towers), each with the others' leaves among its `others`.

    Transforms are then applied one after the other, with one of them each. A leaf may touch two of them: a kernel that reads one and writes
    to the other is named in both. What none of them touches is named in the `others` of every one of them.

    >>> towers = [
    ...     MainBranch([Writer(f"{tower}/embed")], [Norm([Reader(f"{tower}/head")], scale=f"{tower}/scale")])
    ...     for tower in ("image", "text")
    ... ]
    >>> image, text = side_by_side(*towers)
    """
    return tuple(
        dataclasses.replace(branch, others=(*branch.others, *(b for b in branches if b is not branch)))
        for branch in branches
    )


def _all(given: Any, name: str, *kinds: type) -> tuple[Any, ...]:
    """A list of a description's, as a tuple. Raises: LayoutError for what is no list of those kinds."""
    expected = f"expected a list of {' or '.join(kind.__name__ for kind in kinds)}"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise LayoutError(f"{name}: {given!r}; {expected}")
    items = tuple(given)
    for item in items:
        if not isinstance(item, kinds):
            raise LayoutError(f"{name}: {item!r} is among them; {expected}")
    return items


def _require_names_of(pattern: str | None, leaf: str, kind: str) -> None:
    """A pattern whose path follows from that of a leaf may hold no names that the leaf's pattern doesn't."""
    if pattern and "*" in pattern:
        raise LayoutError(
            f"{pattern}: a * is forgotten, so it can't say where {kind} of {leaf} is; write a name in braces"
        )
    unknown = patterns.names(pattern) - patterns.names(leaf)
    if unknown:
        raise LayoutError(f"{pattern}: {{{min(unknown)}}} does not occur in the pattern {leaf}, whose {kind[4:]} it is")
