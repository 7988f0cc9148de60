"""What a checkpoint says in JSON, and whether its arrays are what was written."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from prenorm_jax.fingerprints import fingerprints, of_text
from prenorm_jax.models.config import ConfigError

FORMAT = 2
FORMATS = (1, 2)  # that can be read; 1 has no fingerprints
# Not damage: what another machine, or another experiment, would not meet.
NOT_DAMAGE = (ConfigError, MemoryError, jax.errors.JaxRuntimeError)


class Damaged(ValueError):
    """A checkpoint that is not as it was written."""


def require_as_written(
    manager: ocp.CheckpointManager,
    step: int,
    stamp: Mapping[str, Any],
    trees: Mapping[str, Any],
    position: Mapping[str, Any] | None = None,
) -> None:
    """Raises Damaged where an array of `trees`, {item: tree}, or the position, is not what its fingerprint says."""
    if stamp["format"] == 1:
        return
    written, found = read_json(manager, step, "fingerprints"), fingerprints(**trees)
    if position is not None:
        found["position"] = of_text(canonical(position))
    wrong = [path for path, number in found.items() if written.get(path) != number]
    if wrong:
        others = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise Damaged(f"{wrong[0]} is not what was written{others}")


def read_stamp(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Which experiment the checkpoint is of. Raises ConfigError for another format, Damaged where it is not as it was written."""
    found = read_json(manager, step, "stamp")
    if found.get("format") != 1 and read_json(manager, step, "fingerprints").get("stamp") != of_text(canonical(found)):
        raise Damaged("stamp is not what was written")
    if found.get("format") not in FORMATS:
        raise ConfigError(
            f"checkpoint {step}: got format {found.get('format')!r}; allowed: {', '.join(map(str, FORMATS))}"
        )
    return found


def read_json(manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, Any]:
    """One of the items "position", "stamp" and "fingerprints"."""
    found: dict[str, Any] = manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
    return found


def held_out(manager: ocp.CheckpointManager, step: int) -> dict[str, float] | None:
    """The evaluation at a checkpoint's step; None where there was none, or it can't be read."""
    try:
        found: dict[str, float] | None = read_json(manager, step, "position").get("held_out")
    except Exception:
        return None
    return found


def canonical(tree: Mapping[str, Any]) -> str:
    """A tree as the text whose fingerprint is taken."""
    return json.dumps(json.loads(json.dumps(tree)), sort_keys=True)


def in_a_line(error: Exception) -> str:
    """What an error says, short enough to be quoted."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".removeprefix("Damaged: ")
