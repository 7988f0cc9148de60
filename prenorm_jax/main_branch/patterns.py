"""Patterns of paths: the language in which a description names leaves and modules (see the package's docstring)."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any


class LayoutError(ValueError):
    """A description and a parameter tree that don't fit each other; the message names the leaf and what to write."""


def found(pattern: str, paths: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """The paths that a pattern matches, each with what its names stand for. Raises: LayoutError where there is none."""
    matching = matches(pattern, paths)
    if not matching:
        raise LayoutError(f"{pattern}: matches nothing in the tree; its paths are like {', '.join(list(paths)[:3])}")
    return matching


def matches(pattern: str, paths: Iterable[str]) -> list[tuple[str, dict[str, str]]]:
    """As `found`, and empty where nothing matches."""
    regex = _regex(pattern)
    matching = ((path, regex.fullmatch(path)) for path in paths)
    return [(path, match.groupdict()) for path, match in matching if match]


def match(pattern: str, path: str) -> bool:
    """Whether a pattern matches a path."""
    return _regex(pattern).fullmatch(path) is not None


def names(pattern: str | None) -> set[str]:
    """The names that a pattern remembers."""
    return {name for token in _TOKEN.findall(pattern or "") if (name := _name(token))}


def filled(pattern: str, values: Mapping[str, str]) -> str:
    """The path that a pattern stands for, once its names are known; what is not known stays as it is written."""
    return _TOKEN.sub(lambda token: values.get(_name(token.group()) or "", token.group()), pattern)


_TOKEN = re.compile(r"\*\*|\*|\{\w+\}|\{\w+\.\.\.\}/")
_SHAPES_OF_TOKENS = {"**": ".*", "*": r"[^/.]+"}


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def token(text: str) -> str:
        name = _name(text)
        if name is None:
            return _SHAPES_OF_TOKENS[text]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>(?:[^/]+/)*)" if text.endswith("/") else rf"(?P<{name}>[^/.]+)"

    literals = _TOKEN.split(pattern)
    tokens = [token(t) for t in _TOKEN.findall(pattern)] + [""]
    return re.compile("".join(re.escape(literal) + t for literal, t in zip(literals, tokens, strict=True)))


def _name(token: str) -> str | None:
    match = re.search(r"\w+", token)
    return match.group() if match else None
