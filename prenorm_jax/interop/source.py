"""A checkpoint as its family names it, and what its config says, read strictly."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from prenorm_jax.interop.formats import Checkpoint
from prenorm_jax.interop.tensors import FormatError, Tensor

GELUS = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_tanh": "tanh"}
"""How configs call a GELU -> how ours do."""


class ImportRefused(FormatError):
    """A checkpoint that is no model of ours, or contradicts itself; the message says what was found and what to do."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint as its family names it.

    Args:
      checkpoint: as it was opened.
      prefix: what stands before every name and means nothing (a compiled or wrapped module, the root of a training state).
      tensors: name without the prefix -> tensor.
      beside: tensors outside the prefix (an optimizer's), by their whole name.
      given: fields of our config that the user gave, which win.
    """

    checkpoint: Checkpoint
    prefix: str
    tensors: Mapping[str, Tensor]
    beside: Mapping[str, Tensor]
    given: Mapping[str, Any]

    @property
    def says(self) -> "Says":
        """config.json."""
        return Says(self.checkpoint.config or {}, f"{self.checkpoint.path}: config.json")


@dataclasses.dataclass(frozen=True)
class Says:
    """A JSON object that is read strictly."""

    values: Mapping[str, Any]
    where: str

    def refuse(self, key: str, allowed: str) -> ImportRefused:
        """What to raise for a value that can't be."""
        return ImportRefused(f"{self.where}: {key}: got {self.values.get(key)!r}; allowed: {allowed}")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer, or a pair of the same one (a square's sides)."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(key, "a positive integer (or a square's two sides)")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refuse(key, "a positive number")
        return float(value)

    def gelu(self, key: str, default: str) -> str:
        """The form of the GELU, in our words."""
        value = self.values.get(key, default)
        if value not in GELUS:
            raise self.refuse(key, f"{', '.join(GELUS)} (our MLP has no other non-linearity)")
        return GELUS[value]

    def only(self, reason: str, **expected: Any) -> None:
        """Raises ImportRefused unless these keys, where they are there, have these values."""
        for key, value in expected.items():
            if self.values.get(key, value) != value:
                raise self.refuse(key, f"{value!r} ({reason})")
