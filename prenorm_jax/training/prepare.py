"""Texts to token files, once: python -m prenorm_jax.training.prepare SOURCE [...] --out DIR

Writes train.bin and val.bin, nothing but token ids in 16 or 32 bits, and tokens.json, which says of which vocabulary and how many: what
config.data.name=text reads with config.data.root=DIR. DIR appears when all of it is written, or not at all.

SOURCE is a text file, a folder of .txt files (hidden ones don't count), or a data set that the library datasets saved, whose column
--text-column is read. Without --tokenizer the tokens are the bytes of the text. What is held out is the sources given by --val, or else a
fixed share of the text in pieces spread over all of it.
"""

import argparse
import codecs
import dataclasses
import itertools
import json
import math
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from prenorm_jax.training.data import DataError
from prenorm_jax.training.hugging_face import read_splits, read_texts
from prenorm_jax.training.text import read_tokenizer
from prenorm_jax.training.token_files import ABOUT

PIECE_BYTES = 2**16  # of a text file are a piece, about; a tokenizer takes a hundred times as much memory
AT_ONCE = 64  # pieces that a tokenizer gets, to spread over its threads
LEAST_SHARE = 1e-6

Encode = Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """encode: texts -> ids; end: the ids behind a document; name: what tokens.json says it is."""

    encode: Encode
    size: int
    end: list[int]
    name: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document; `last` where the document ends."""

    text: str
    last: bool


def prepare(
    sources: list[pathlib.Path],
    out: pathlib.Path,
    vocabulary: Vocabulary,
    held_out: list[pathlib.Path] | None = None,
    held_out_share: float = 0.005,
    text_column: str = "text",
) -> dict[str, Any]:
    """Writes the token files of texts into a new folder, and returns what its tokens.json says.

    Args:
      held_out: sources of val.bin; None: every n-th piece of `sources`, n the whole number nearest to 1 / held_out_share.

    Raises: DataError where a source can't be read, a side is empty, `out` exists, or the disk is full; then nothing is left of it.
    """
    if out.exists():
        raise DataError(f"--out: {out} exists; expected a new folder")
    dtype = "uint16" if vocabulary.size <= 2**16 else "uint32"
    every = round(1 / held_out_share)
    if held_out:
        sides = {side: _pieces(paths, 1, text_column) for side, paths in (("train", sources), ("val", held_out))}
    else:
        sides = {
            "train": (p for i, p in enumerate(_pieces(sources, every, text_column)) if i % every != every - 1),
            "val": (p for i, p in enumerate(_pieces(sources, every, text_column)) if i % every == every - 1),
        }
    about: dict[str, Any] = {
        "format": 1,
        "dtype": dtype,
        "vocab_size": vocabulary.size,
        "tokenizer": vocabulary.name,
        "sources": [str(path) for path in sources],
        "held_out": [str(path) for path in held_out] if held_out else f"every {every}th piece",
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        half = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error
    try:
        for side, pieces in sides.items():
            about[side] = {"tokens": _write(half / f"{side}.bin", pieces, vocabulary, dtype)}
            if not about[side]["tokens"]:
                named = ", ".join(map(str, held_out if side == "val" and held_out else sources))
                if side == "train" or held_out:
                    raise DataError(f"{named}: no text in it")
                raise DataError(
                    f"{named}: too short to hold out one piece in {every}; give --val, or a larger --val-share"
                )
        (half / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        half.chmod(0o755)
        half.rename(out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return about


def _write(file: pathlib.Path, pieces: Iterable[Piece], vocabulary: Vocabulary, dtype: str) -> int:
    """Appends the ids of all pieces to a new file; returns how many."""
    count, waiting = 0, iter(pieces)
    with file.open("wb") as stream:
        while some := list(itertools.islice(waiting, AT_ONCE)):
            for piece, ids in zip(some, vocabulary.encode([piece.text for piece in some]), strict=True):
                for run in (ids, vocabulary.end) if piece.last else (ids,):
                    stream.write(np.asarray(run, dtype).tobytes())
                    count += len(run)
    return count


def _pieces(sources: list[pathlib.Path], every: int, text_column: str) -> Iterator[Piece]:
    """The sources' texts in order; text files in so many that one in `every` is that share of them, a multiple of `every`."""
    files = [path for source in sources for path in ([source] if _is_saved(source) else _text_files(source))]
    size = sum(path.stat().st_size for path in files if path.is_file())
    rounds = max(1, math.ceil(size / (every * PIECE_BYTES)))
    limit = max(1, size // (every * rounds))
    for path in files:
        yield from _rows(path, text_column) if path.is_dir() else _parts(path, limit)


def _is_saved(source: pathlib.Path) -> bool:
    return any((source / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def _text_files(source: pathlib.Path) -> list[pathlib.Path]:
    if source.is_file():
        return [source]
    texts = (path for path in source.rglob("*") if path.suffix.lower() == ".txt" and path.is_file())
    found = sorted(path for path in texts if not any(n.startswith(".") for n in path.relative_to(source).parts))
    if not found:
        raise DataError(f"{source}: expected a text file, a folder of .txt files, or a data set that datasets saved")
    return found


def _rows(source: pathlib.Path, text_column: str) -> Iterator[Piece]:
    splits = read_splits(str(source))
    if len(splits) > 1:
        raise DataError(f"{source}: has {', '.join(splits)}; expected one split (give {source}/train, and --val)")
    (table,) = splits.values()
    for text in read_texts(table, text_column, str(source), "--text-column"):
        yield Piece(text, last=True)


def _parts(path: pathlib.Path, limit: int) -> Iterator[Piece]:
    """A text file, cut at or before each multiple of `limit` bytes, so that what is before a cut does not move those behind it."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    try:
        with path.open("rb") as stream:
            rest, read = "", stream.read(limit)
            while read:
                following = stream.read(limit)
                text = rest + decode(read, not following)
                end = _end_of_part(text) if following else len(text)
                yield Piece(text[:end], last=not following)
                rest, read = text[end:], following
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _end_of_part(text: str) -> int:
    """In the second half of the text: behind its last line; or before its last space, which goes with the word behind it; or all."""
    half = len(text) // 2
    line, space = text.rfind("\n", half), text.rfind(" ", half)
    return line + 1 if line >= 0 else space if space > 0 else len(text)


def vocabulary(tokenizer: pathlib.Path | None, end: str) -> Vocabulary:
    """Bytes, or what a tokenizer.json says; `end` is the text of what stands behind each document. Raises: DataError."""
    if any("\ud800" <= sign <= "\udfff" for sign in end):
        raise DataError(f"--end: got {end!r}; expected text")
    if tokenizer is None:
        return Vocabulary(_bytes, 256, list(end.encode()), "bytes")
    read = read_tokenizer(tokenizer)

    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in read.encode_batch(texts, add_special_tokens=False)]

    marked = read.token_to_id(end) if end else None
    if end and marked is None:
        raise DataError(f"--end: {tokenizer} has no token {end!r}")
    # Ids need not be dense: the largest says how many rows a table needs.
    size = max(read.get_vocab(with_added_tokens=True).values()) + 1
    return Vocabulary(encode, size, [] if marked is None else [marked], str(tokenizer))


def _bytes(texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]


def read_flags(arguments: list[str]) -> argparse.Namespace:
    """The command's flags."""
    flags = argparse.ArgumentParser(
        prog="prenorm_jax.training.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("sources", nargs="+", type=pathlib.Path, metavar="SOURCE")
    flags.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="a new folder")
    flags.add_argument("--tokenizer", type=pathlib.Path, metavar="FILE", help="a tokenizer.json; default: bytes")
    flags.add_argument("--val", nargs="+", type=pathlib.Path, metavar="SOURCE", help="held out")
    flags.add_argument("--val-share", type=float, default=0.005, help="held out without --val; default %(default)s")
    flags.add_argument("--end", default="", metavar="TOKEN", help="behind each document, as in <|endoftext|>")
    flags.add_argument("--text-column", default="text", help="of a saved data set; default %(default)s")
    given = flags.parse_args(arguments)
    if not LEAST_SHARE <= given.val_share <= 0.5:
        flags.error(f"--val-share: got {given.val_share}; allowed: {LEAST_SHARE} to 0.5")
    return given


def main(arguments: list[str]) -> int:
    """Exit status: 0; 2 for what can't be (one line on stderr)."""
    given = read_flags(arguments)
    try:
        words = vocabulary(given.tokenizer, given.end)
        about = prepare(given.sources, given.out, words, given.val, given.val_share, given.text_column)
    except DataError as error:
        print(f"prenorm_jax.training.prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prenorm_jax.training.prepare: interrupted; nothing was written", file=sys.stderr)
        return 130
    for side in ("train", "val"):
        print(f"{given.out / side}.bin: {about[side]['tokens']:,} tokens of {about['vocab_size']}, {about['dtype']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
