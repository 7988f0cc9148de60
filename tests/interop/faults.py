"""What `prenorm convert` says to spoiled checkpoints, and that neither they nor anything else on the disk is changed by it.

PYTHONPATH=. python tests/interop/faults.py --json=results/interop/faults.json
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import small

from prenorm_jax.interop.__main__ import main as prenorm

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"
EMBEDDING, KERNEL = "transformer.wte.weight", "transformer.h.0.mlp.c_proj.weight"
Room = pathlib.Path  # holds the folder "source", where "destination" will be
PATCHED = """import errno, os, resource, shutil, signal, sys
from prenorm_jax.interop import safetensors
from prenorm_jax.interop.__main__ import main
write = safetensors.Writer.write
def then(what):
    def both(self, name, value):
        write(self, name, value)
        what()
    safetensors.Writer.write = both
{}
sys.exit(main(sys.argv[1:]))
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done to a good checkpoint, a GPT-2 in three shards, and what is said about it.

    Args:
      spoil: does it.
      says: a regular expression for the message.
      options: of the command.
      during: Python that a process of its own runs before; none where it can be tried in this one.
      status: the exit status.
      destination: the folder to write.
      leaves: what the next run with the same destination will sweep away.
    """

    spoil: Callable[[Room], object]
    says: str
    options: tuple[str, ...] = ()
    during: str | None = None
    status: int = 2
    destination: str = "destination"
    leaves: frozenset[str] = frozenset()


def nothing(room: Room) -> None:
    """A good checkpoint."""


def data(name: str, change: Callable[[bytes], bytes]) -> Callable[[Room], object]:
    """A file's bytes changed."""

    def spoil(room: Room) -> None:
        file = room / "source" / name
        file.write_bytes(change(file.read_bytes()))

    return spoil


def index(shard: object) -> Callable[[Room], object]:
    """What the index says about the embedding."""

    def change(text: bytes) -> bytes:
        table = json.loads(text)
        table["weight_map"][EMBEDDING] = shard
        return json.dumps(table).encode()

    return data(INDEX, change)


def config(**fields: object) -> Callable[[Room], object]:
    """config.json with other fields."""
    return data("config.json", lambda text: json.dumps({**json.loads(text), **fields}).encode())


def tensors(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Room], object]:
    """A checkpoint of other tensors, in shards that agree with their index."""

    def spoil(room: Room) -> None:
        shutil.rmtree(room / "source")
        small.write(room / "source", change(small.gpt2()), shards=3)

    return spoil


def value(name: str, position: int, number: float) -> Callable[[Room], object]:
    """One element of one tensor."""

    def change(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tree[name].reshape(-1)[position] = number
        return tree

    return tensors(change)


def two_shards_changed_places(room: Room) -> None:
    first, second = (room / "source" / f"model-{n:05}-of-00003.safetensors" for n in (1, 2))
    os.rename(first, room / "other")
    os.rename(second, first)
    os.rename(room / "other", second)


def big_tokenizer(room: Room) -> None:
    (room / "source" / "tokenizer.json").write_bytes(bytes(1 << 20))


LEFT = frozenset({".destination.partial", ".destination.lock"})
# A disk of 64 KiB, in a namespace of its own; nobody else sees it mounted.
SMALL_DISK = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"']
HEAD = {"lm_head.weight": np.ones((small.VOCABULARY, small.WIDTH), np.float32)}

FAULTS: dict[str, Fault] = {
    # Files.
    "a file cut off": Fault(
        data(SECOND, lambda text: text[:-40]), r"bytes of data; its header describes \d+; truncated or corrupt"
    ),
    "a file cut off in its header": Fault(
        data(SECOND, lambda text: text[:100]), r"claims \d+ bytes of a file of 100; truncated"
    ),
    "an empty file": Fault(data(SECOND, lambda _: b""), "0 bytes; expected at least the 8"),
    "a download that is a web page": Fault(data(SECOND, lambda _: b"<!doctype html>" * 99), "not safetensors at all"),
    "a byte of the header flipped": Fault(data(SECOND, lambda text: text[:9] + b"!" + text[10:]), "header|JSON|index"),
    "a tensor's size changed in the header": Fault(
        data(SECOND, lambda text: text.replace(b'"shape":[8,', b'"shape":[9,', 1)),
        r"bytes for shape \(9, \d+\) of F32; expected",
    ),
    "a missing shard": Fault(
        lambda room: (room / "source" / SECOND).unlink(), f"shard {SECOND} is missing, and with it"
    ),
    "two shards under each other's names": Fault(two_shards_changed_places, "lacks what .*index.json says"),
    "an index that is no JSON": Fault(data(INDEX, lambda text: text[:50]), "not readable as JSON"),
    "an index without a map": Fault(data(INDEX, lambda _: b"{}"), "no weight_map in it"),
    "an index that points up": Fault(
        index("../other/model.safetensors"), r"points to '\.\./other.*expected the plain name"
    ),
    "an index that points to an absolute path": Fault(index("/etc/passwd"), "points to '/etc/passwd'"),
    "an index that points to a number": Fault(index(7), "points to '7'"),
    "a tensor named with ..": Fault(
        data(SECOND, lambda text: text.replace(b'"transformer.h.0', b'"../nsformer.h.0', 1)),
        r"named '\.\./nsformer.*relative name",
    ),
    "a tensor named by an absolute path": Fault(
        data(SECOND, lambda text: text.replace(b'"transformer.h.0', b'"/ransformer.h.0', 1)), "named '/ransformer"
    ),
    "no weights": Fault(
        lambda room: [f.unlink() for f in (room / "source").glob("model*")], "no checkpoint in it; expected one of"
    ),
    "no such folder": Fault(lambda room: shutil.rmtree(room / "source"), "does not exist"),
    # Tensors.
    "a NaN": Fault(value(KERNEL, 5, np.nan), f"tensor {KERNEL} holds NaN"),
    "a NaN in what is only copied": Fault(value("transformer.h.1.mlp.c_fc.bias", 0, np.nan), "c_fc.bias holds NaN"),
    "an infinity": Fault(value(EMBEDDING, 0, -np.inf), f"tensor {EMBEDDING} holds infinity"),
    "a value beyond float16": Fault(
        value(KERNEL, 0, 1e6), "more than float16 holds; take bfloat16", ("--dtype", "float16")
    ),
    "a tensor lost": Fault(
        tensors(
            lambda tree: {name: leaf for name, leaf in tree.items() if name != "transformer.h.1.mlp.c_proj.weight"}
        ),
        r"layer 1 has no transformer.h.\{i\}.mlp.c_proj.weight",
    ),
    "a norm lost": Fault(
        tensors(lambda tree: {name: leaf for name, leaf in tree.items() if "h.1.ln_1" not in name}),
        "layer 1 has no .*ln_1",
    ),
    "a tensor too many": Fault(
        tensors(lambda tree: {**tree, "transformer.h.0.extra": np.ones(8, np.float32)}),
        r"transformer.h.0.extra \(8,\): gpt2 has no",
    ),
    "a writer of another width": Fault(
        tensors(lambda tree: {**tree, "transformer.wpe.weight": np.ones((5, 9), np.float32)}),
        "one main branch has one width",
    ),
    "a norm of another width": Fault(
        tensors(lambda tree: {**tree, "transformer.h.0.ln_1.weight": np.ones(9, np.float32)}),
        r"transformer.h.0.ln_1.weight \(9,\)",
    ),
    "int8 weights": Fault(
        tensors(lambda tree: {**tree, KERNEL: np.ones((32, 8), np.int8)}), "is int8; expected float64"
    ),
    # config.json.
    "no config.json": Fault(lambda room: (room / "source" / "config.json").unlink(), "config.json: is missing"),
    "a config.json that is no JSON": Fault(
        data("config.json", lambda text: text[:20]), "config.json: not readable as JSON"
    ),
    "another width in it": Fault(config(n_embd=16), "n_embd is 16; the tensors have a main branch of 8"),
    "more layers in it": Fault(config(n_layer=3), r"n_layer is 3; layer 2 has no transformer"),
    "fewer layers in it": Fault(config(n_layer=1), "n_layer is 1; the tensors have a layer 1"),
    "another vocabulary in it": Fault(config(vocab_size=12), "vocab_size is 12"),
    "a tied head that differs": Fault(
        tensors(lambda tree: tree | HEAD), "is tied to transformer.wte.weight, and the two differ"
    ),
    "an untied head that is not there": Fault(
        config(tie_word_embeddings=False), "has no such tensor; one of the two is wrong"
    ),
    "heads that don't divide": Fault(config(n_head=3), "n_head is '3'; expected a divisor of n_embd = "),
    "no heads": Fault(config(n_head=0), "n_head is '0'; expected a divisor of n_embd = "),
    "text for a number": Fault(config(n_layer="many"), "n_layer is 'many'; expected a positive integer"),
    "a negative eps": Fault(config(layer_norm_epsilon=-1), "expected a number above 0"),
    "no model_type": Fault(config(model_type=None), "has no model_type"),
    "an unknown model_type": Fault(config(model_type="mystery"), "'mystery' is not known, and nothing is guessed"),
    "a model of RMSNorms": Fault(config(model_type="llama"), "its norms are RMSNorms already"),
    "a Post-LN model": Fault(config(model_type="bert"), r"\(Post-LN\)"),
    "a Post-LN OPT": Fault(
        config(model_type="opt", do_layer_norm_before=False), r"do_layer_norm_before=False can't .*\(Post-LN\)"
    ),
    "an OPT without a last norm": Fault(
        config(model_type="opt", _remove_final_layer_norm=True), "without a final norm"
    ),
    "a BLOOM with its residual behind the norm": Fault(
        config(model_type="bloom", apply_residual_connection_post_layernorm=True), r"\(Post-LN\)"
    ),
    "a quantised model": Fault(config(quantization_config={}), "is quantised"),
    # The destination.
    "converted already": Fault(
        lambda room: (room / "source" / "prenorm.json").write_text("{}"), "is converted already"
    ),
    "a destination that exists": Fault(
        lambda room: (room / "destination").mkdir(), "exists already, and nothing is overwritten"
    ),
    "a destination that is a dangling link": Fault(
        lambda room: (room / "destination").symlink_to("nowhere"), "exists already"
    ),
    "a destination in the source": Fault(
        lambda room: (room / "destination").symlink_to("source/inner"), "in the source|exists"
    ),
    "a file where the destination's folder should be": Fault(
        lambda room: (room / "file").write_text(""), "file: is no folder; make it first", destination="file/destination"
    ),
    "no room on the disk": Fault(
        nothing,
        "needs 0.00 GB, and 0.00 GB are free",
        during="shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 9)",
    ),
    "a disk that fills up with the weights": Fault(
        nothing,
        "File too large before all was written; what had been is removed",
        during="resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))",
    ),
    "a disk that fills up with what is carried over": Fault(
        big_tokenizer,
        "File too large before all was written; what had been is removed",
        during="resource.setrlimit(resource.RLIMIT_FSIZE, (99_999, 99_999))",
    ),
    "an interrupt from the keyboard": Fault(
        nothing,
        "interrupted; nothing was written",
        during="then(lambda: signal.raise_signal(signal.SIGINT))",
        status=130,
    ),
    "a kill in the middle": Fault(
        nothing,
        "told to stop; nothing was written",
        during="then(lambda: signal.raise_signal(signal.SIGTERM))",
        status=143,
    ),
    "a kill -9 in the middle": Fault(
        nothing, "^$", during="then(lambda: os.kill(os.getpid(), signal.SIGKILL))", status=-signal.SIGKILL, leaves=LEFT
    ),
    "a kill -9 before the last step": Fault(
        nothing,
        "^$",
        during="os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
        status=-signal.SIGKILL,
        leaves=LEFT,
    ),
}


if (
    subprocess.run([*SMALL_DISK, "/mnt", "true"], capture_output=True, check=False).returncode == 0
):  # not allowed everywhere
    FAULTS["a full disk"] = Fault(
        lambda room: [big_tokenizer(room), (room / "disk").mkdir()],
        "No space left on device before all was written; what had been is removed",
        during="sys.stderr.flush()",
        destination="disk/destination",
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a fault: exit status, message, whether the rest of the disk is as before, what is left on it."""

    status: int
    message: str
    untouched: bool
    left: frozenset[str]


def contents(room: Room) -> dict[str, str]:
    """Everything on this disk, by its hash."""
    found = {}
    for path in room.rglob("*"):
        what = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b"folder"
        found[str(path.relative_to(room))] = hashlib.sha256(what).hexdigest()
    return found


def attempt(fault: Fault, room: Room) -> Outcome:
    """Spoils a checkpoint in an empty folder, and converts it."""
    small.write(room / "source", shards=3)
    fault.spoil(room)
    before = contents(room)
    arguments = ["convert", str(room / "source"), str(room / fault.destination), "--to", "pre_rmsnorm", *fault.options]
    if fault.during is None:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            status = prenorm(arguments)
        text = said.getvalue()
    else:
        code = PATCHED.format(fault.during)
        on_disk = [*SMALL_DISK, str(room / "disk")] if fault.destination.startswith("disk") else []
        command = [*on_disk, sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        status, text = done.returncode, done.stderr
    message = " ".join(line.removeprefix("prenorm: ") for line in text.split("\n") if line.startswith("prenorm: "))
    after = contents(room)
    left = frozenset(name for name in set(after) - set(before) if "/" not in name)
    kept = {name: what for name, what in after.items() if name.split("/")[0] not in fault.leaves}
    return Outcome(status, message.replace(str(room) + "/", ""), kept == before, left)


def holds(fault: Fault, outcome: Outcome) -> bool:
    """Whether it is what should come of it."""
    told = re.search(fault.says, outcome.message) is not None
    return told and outcome.untouched and (outcome.status, outcome.left) == (fault.status, fault.leaves)


def main() -> None:
    """All of them; exit status 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()
    rows = []
    for name, fault in FAULTS.items():
        with tempfile.TemporaryDirectory() as room:
            outcome = attempt(fault, pathlib.Path(room))
        row = {**dataclasses.asdict(outcome), "left": sorted(outcome.left)}
        rows.append({"fault": name, **row, "holds": holds(fault, outcome)})
        print(
            "ok  " if rows[-1]["holds"] else "FAIL",
            name,
            "|",
            outcome.status,
            "|",
            outcome.message,
            "|",
            *rows[-1]["left"],
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(not all(row["holds"] for row in rows))


if __name__ == "__main__":
    main()
