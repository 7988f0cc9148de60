"""Files of results: each is there whole or as it was; some a command fills in several calls, {name: [row, ...]} in JSON."""

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def save_beside(path: pathlib.Path, name: str, new: Sequence[Row], key: Callable[[Row], Any]) -> None:
    """Writes rows beside those that the file holds, in the place of those with the same key. The file is there whole or as it was.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "times.json")
    >>> for row in ({"work": "a", "ms": 2}, {"work": "b", "ms": 3}, {"work": "a", "ms": 1}):
    ...     save_beside(path, "times", [row], lambda row: row["work"])
    >>> json.loads(path.read_text())
    {'times': [{'work': 'b', 'ms': 3}, {'work': 'a', 'ms': 1}]}
    """
    keys = [key(row) for row in new]
    held = json.loads(path.read_text())[name] if path.exists() else []
    kept = [row for row in held if key(row) not in keys]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({name: [*kept, *new]}, indent=1) + "\n")


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file whole, in place of what is there: a full disk or a kill leaves the old one.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "a.txt")
    >>> write_whole(path, "whole")
    >>> path.read_text()
    'whole'
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
