"""What libraries call the leaves of a linear map and of a norm, and which axes their kernels have: the vocabulary of the layouts."""

import dataclasses

from prenorm_jax.main_branch import Norm, Reader, Writer


@dataclasses.dataclass(frozen=True)
class Words:
    """Leaf names and axes of one library's linear maps and norms."""

    kernel: str = "kernel"
    bias: str = "bias"
    scale: str = "scale"
    offset: str = "bias"
    reads: int = -2
    writes: int = -1

    def writer(self, path: str, optional: bool = False) -> list[Writer]:
        """A linear map that writes to the main branch: its kernel and, where there is one, its bias."""
        return [
            Writer(f"{path}/{self.kernel}", self.writes, optional),
            Writer(f"{path}/{self.bias}", optional=True),
        ]

    def reader(self, path: str, axis: int | None = None) -> Reader:
        """A linear map behind a norm; where it has no bias, folding the norm's gives it one."""
        return Reader(f"{path}/{self.kernel}", self.reads if axis is None else axis, f"{path}/{self.bias}")

    def norm(self, path: str, readers: list[Reader], eps: float | None = None, keep: str | None = None) -> Norm:
        """A norm and what reads it."""
        return Norm(readers, f"{path}/{self.scale}", f"{path}/{self.offset}", eps, keep)


FLAX = Words()
FLAX_CONV1D = Words(reads=-1, writes=-2)
"""HF's FlaxConv1D, whose kernel is (out, in)."""
HAIKU = Words(kernel="w", bias="b", offset="offset")
EQUINOX = Words(kernel="weight", scale="weight", reads=-1, writes=-2)
