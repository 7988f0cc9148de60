"""A plan carried out tensor by tensor: memory holds one tensor as it is stored, and a few blocks of it in float64.

A linear map's rows (or columns) are independent in what they write or read, so a block of them is a linear map by itself: each goes
through `prenorm_jax.transforms`, in float64 with one rounding, like a whole tree would.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import numpy as np

from prenorm_jax.interop.architectures import is_buffer
from prenorm_jax.interop.plan import Fold, Plan, Recenter, RefusedError
from prenorm_jax.interop.tensors import Tensor, is_float
from prenorm_jax.main_branch import MainBranch, Norm, Reader, Writer
from prenorm_jax.precision import rounded
from prenorm_jax.transforms import fold_affine, recenter

BLOCK = 1 << 19
"""Elements that are widened at once: blocks that stay in a core's cache are twice as fast as large ones."""

Change = Callable[[np.ndarray, slice], np.ndarray]


def converted(plan: Plan, dtype: np.dtype | None, pool: Executor) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every tensor of the destination, each once.

    Args:
      dtype: of its weights; None keeps those of the source.
      pool: threads that share the work on one tensor.

    Raises: RefusedError for NaN or infinity in a tensor, or for weights that don't fit into `dtype`.
    """
    with_kernel = {fold.bias for fold in plan.folds.values() if fold.bias}
    for name, tensor in plan.tensors.items():
        if name in with_kernel:
            continue
        target = target_dtype(tensor, dtype)
        if name in plan.constants:
            yield name, np.full(tensor.shape, plan.constants[name]).astype(target)
        elif name in plan.folds and name in plan.recenters:
            yield from _reader_and_writer(plan, name, dtype)
        elif name in plan.folds:
            yield from _reader(plan, name, dtype, pool)
        elif name in plan.recenters:
            yield (
                name,
                _blockwise(tensor, plan.recenters[name].axis, _recentering(plan, plan.recenters[name]), target, pool),
            )
        else:
            yield name, _copied(tensor, target, pool)


def target_dtype(tensor: Tensor, dtype: np.dtype | None) -> np.dtype:
    """What a tensor is stored as: whatever is no weight keeps its dtype."""
    return dtype if dtype is not None and _is_weight(tensor) else tensor.dtype


def _is_weight(tensor: Tensor) -> bool:
    return is_float(tensor.dtype) and not is_buffer(tensor.name)


def _wide(tensor: Tensor) -> np.ndarray:
    """A small tensor, in float64."""
    return _checked(tensor.read().astype(np.float64), tensor)


def _beside(plan: Plan, fold: Fold) -> tuple[np.ndarray | None, ...]:
    """What a fold takes beside the kernel: its bias, gamma and beta."""
    return tuple(None if leaf is None else _wide(plan.tensors[leaf]) for leaf in (fold.bias, fold.gamma, fold.beta))


def _fold(
    fold: Fold, kernel: np.ndarray, bias: np.ndarray | None, gamma: np.ndarray | None, beta: np.ndarray | None
) -> dict[str, np.ndarray]:
    rule = Norm([Reader("kernel", fold.axis, bias="bias" if bias is not None else None)], scale="gamma", bias="beta")
    leaves = {"kernel": kernel, "bias": bias, "gamma": gamma, "beta": beta}
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    result: dict[str, np.ndarray] = fold_affine(present, MainBranch([], [rule]))
    return result


def _reader(plan: Plan, name: str, dtype: np.dtype | None, pool: Executor) -> Iterator[tuple[str, np.ndarray]]:
    """A reader with its norm's affine folded in, and its bias."""
    fold, tensor = plan.folds[name], plan.tensors[name]
    bias, gamma, beta = _beside(plan, fold)
    new_bias = None if bias is None else bias.copy()

    def change(kernel: np.ndarray, rows: slice) -> np.ndarray:
        result = _fold(fold, kernel, None if bias is None else bias[rows], gamma, beta)
        if new_bias is not None:
            new_bias[rows] = result["bias"]
        changed: np.ndarray = result["kernel"]
        return changed

    yield name, _blockwise(tensor, fold.axis, change, target_dtype(tensor, dtype), pool)
    if new_bias is not None and fold.bias is not None:
        yield fold.bias, _stored(new_bias, plan.tensors[fold.bias], dtype)


def _recentering(plan: Plan, step: Recenter) -> Change:
    scale = None if step.scale is None else _wide(plan.tensors[step.scale])
    rule = MainBranch([Writer("leaf", step.axis, scale=None if scale is None else "scale")], [])

    def change(leaf: np.ndarray, _: slice) -> np.ndarray:
        tree = {"leaf": leaf} if scale is None else {"leaf": leaf, "scale": scale}
        changed: np.ndarray = recenter(tree, rule)["leaf"]
        return changed

    return change


def _reader_and_writer(plan: Plan, name: str, dtype: np.dtype | None) -> Iterator[tuple[str, np.ndarray]]:
    """A linear map from one main branch straight to another; whole, so that there is one rounding."""
    fold = plan.folds[name]
    tree = _fold(fold, _wide(plan.tensors[name]), *_beside(plan, fold))
    for leaf, value in zip((name, fold.bias), (tree["kernel"], tree.get("bias")), strict=True):
        if leaf is not None and value is not None:
            step = plan.recenters.get(leaf)
            value = _recentering(plan, step)(value, slice(None)) if step else value
            yield leaf, _stored(value, plan.tensors[leaf], dtype)


def _blockwise(tensor: Tensor, axis: int, change: Change, target: np.dtype, pool: Executor) -> np.ndarray:
    """`change` of a tensor, block by block along its longest axis but `axis`; in place where the dtype stays."""
    value = tensor.read()
    others = [position for position in range(value.ndim) if position != value.ndim + axis]
    if not others:
        return _narrow(change(_checked(value.astype(np.float64), tensor), slice(None)), target, tensor)
    split = max(others, key=lambda position: value.shape[position])
    length = value.shape[split]
    step = max(1, BLOCK * length // max(value.size, 1))
    result = value if target == value.dtype else np.empty(value.shape, target)

    def one(start: int) -> None:
        rows = slice(start, start + step)
        index = (slice(None),) * split + (rows,)
        wide = _checked(value[index].astype(np.float64), tensor)
        result[index] = _narrow(change(wide, rows), target, tensor)

    list(pool.map(one, range(0, length, step)))
    return result


def _copied(tensor: Tensor, target: np.dtype, pool: Executor) -> np.ndarray:
    """The tensor as it is, or in another dtype, once its values are known to be finite."""
    if not _is_weight(tensor):
        return tensor.read()
    value = tensor.read()
    flat = value.reshape(-1)
    result = flat if target == value.dtype else np.empty(flat.shape, target)

    def one(start: int) -> None:
        block = _checked(flat[start : start + BLOCK], tensor)
        if target != block.dtype:
            result[start : start + BLOCK] = _narrow(block.astype(np.float64), target, tensor)

    list(pool.map(one, range(0, flat.size, BLOCK)))
    return result.reshape(value.shape)


def _checked(value: np.ndarray, tensor: Tensor) -> np.ndarray:
    if not np.isfinite(value).all():
        what = "NaN" if np.isnan(value).any() else "infinity"
        raise RefusedError(
            f"{tensor.file}: tensor {tensor.name} holds {what}; such a model computes nothing that could be kept"
        )
    return value


def _stored(value: np.ndarray, tensor: Tensor, dtype: np.dtype | None) -> np.ndarray:
    return _narrow(value, target_dtype(tensor, dtype), tensor)


def _narrow(value: np.ndarray, target: np.dtype, tensor: Tensor) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow: np.ndarray = rounded(value, target)
    if not np.isfinite(narrow).all():
        raise RefusedError(
            f"{tensor.file}: tensor {tensor.name} reaches {np.abs(value).max():.2e}, more than {target} holds; take bfloat16 or float32"
        )
    return narrow
