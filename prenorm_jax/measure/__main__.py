"""Tables, step times and profiles.

python -m prenorm_jax.measure print FILE [...] [--plot PREFIX] [--into GUIDE]
    the tables of JSON files that train.py, eval.py, `time`, `profile` and benchmarks/peers.py wrote; into a guide: in place of what
    stands between <!-- FILE --> and <!-- end --> there
python -m prenorm_jax.measure time CONFIG[:ARG] --out FILE [--only WORD,...] [--forms FORM,...] [--minutes M] [--threads N]
    times the works of a study, as configs/paper_*.py have them; the same command goes on where it stopped (exit status 3: works are left)
python -m prenorm_jax.measure devices {vit,gpt} SIZE --per-device B [--devices N] [--meshes data,fsdp] [--options SET,...] [--json FILE]
    a step on N devices against one device at the same batch for each (prenorm_jax.measure.devices lists the sets of XLA's options)
python -m prenorm_jax.measure profile {vit,gpt} SIZE --batch B [--norm N] [--basis B] [--coordinates C] [--kind K] [--mesh M] [--json FILE]
    a step's device time by kernel and by part of the model, beside each part's floor; with --mesh, split over all devices along an axis
python -m prenorm_jax.measure track {vit,gpt} SIZE --batch B [--steps N] [--learning-rate R] [--threads N] [--json FILE]
    the losses of the timed steps beside those of a slow reference (exit status 1: some form does not track it)
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from typing import Any

import jax

from prenorm_jax.measure import devices, profile, study, tracking
from prenorm_jax.measure.equivalence import Form, Report
from prenorm_jax.measure.works import FAMILIES, KINDS, work
from prenorm_jax.models.config import BASES, NORMS, ConfigError
from prenorm_jax.training import counts, estimate
from prenorm_jax.training.compilation_cache import use_compilation_cache
from prenorm_jax.training.experiment import COORDINATES, Mesh


def print_tables(given: argparse.Namespace) -> int:
    """Prints the tables of each file, and draws the pictures of a study; exit status 2 where one can't be read."""
    for path in given.files:
        try:
            result = json.loads(pathlib.Path(path).read_text())
            text = "\n\n".join(tables(result))
            print(f"{path}\n\n{text}\n")
            if given.into:
                given.into.write_text(with_tables(given.into.read_text(), path, text))
            if given.plot and "entries" in result:
                from prenorm_jax.measure import pictures

                pictures.study(result, pathlib.Path(f"{given.plot}.png"))
                pictures.roofline(result, pathlib.Path(f"{given.plot}_roofline.png"))
        except (OSError, ValueError, KeyError) as error:
            print(f"{path}: not as train.py, eval.py or `time` writes it ({error!r})", file=sys.stderr)
            return 2
    return 0


def tables(result: dict[str, Any]) -> list[str]:
    """The Markdown tables of what a JSON file holds, by the key that tells its kind. Raises KeyError for another kind."""
    if "entries" in result:
        return [study.table(result), study.details(result)]
    if "peers" in result:
        return [study.peers_table(result)]
    if "estimates" in result:
        compiled = estimate.against_compiled(result["estimates"], pathlib.Path("results/speed"))
        return [estimate.table(result["estimates"]), compiled]
    if "on_devices" in result:
        return [devices.table(each) for each in result["on_devices"]]
    if "tracking" in result:
        return [tracking.table(each) for each in result["tracking"]]
    if "kernels" in result:
        kernels = [profile.Kernel(**row) for row in result["kernels"]]
        head = f"{result['work']}, {result['form']}, {result['device']}, jax {result['jax']}"
        return [head, profile.table(kernels, floors=result["floor_ms_by_part"])]
    from prenorm_jax.measure.comparison import answers_table, times_table

    second = Report.of_json(result).as_markdown() if "errors" in result else times_table(result)
    return [answers_table(result), second]


def with_tables(guide: str, path: str, text: str) -> str:
    """A guide's text with the tables of a file between its marks. Raises ValueError where the guide has none.

    >>> with_tables("a <!-- x.json --> old <!-- end --> b", "x.json", "new")
    'a <!-- x.json -->\\n\\nnew\\n\\n<!-- end --> b'
    """
    before, mark, rest = guide.partition(f"<!-- {path} -->")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ValueError(f"the guide has no <!-- {path} --> with an <!-- end --> behind it")
    return f"{before}{mark}\n\n{text}\n\n{end}{after}"


def time_study(given: argparse.Namespace) -> int:
    """Times what is left of a study; exit status 3 where the minutes did not suffice."""
    wanted = study.read_study(given.config)
    if given.only:
        wanted = wanted.only(tuple(given.only.split(",")))
    if given.forms:
        wanted = dataclasses.replace(wanted, forms=tuple(given.forms.split(",")))
    left = study.run(
        wanted, given.out, seconds=60 * given.minutes, threads=given.threads, say=lambda text: print(text, flush=True)
    )
    if given.out.exists():
        print(study.table(json.loads(given.out.read_text())))
    for key in left:
        print(f"left: {key}")
    return 3 if left else 0


def profile_step(given: argparse.Namespace) -> int:
    """Traces one step and prints its device time by part and by kernel."""
    # As one graph of launches, the step would be one event; the flag is read when the first device is asked for.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    use_compilation_cache()  # but not in time_study, which times compilation
    this, form = (
        work(given.family, given.size, given.batch, given.kind, given.coordinates),
        Form(given.norm, given.basis),
    )
    mesh = Mesh(**{"data": 1, given.mesh: jax.device_count()}) if given.mesh else None
    kernels = profile.profile_work(this, form, given.steps, mesh)
    result = {
        "work": this.key,
        "form": form.name + (f", {given.mesh} over {jax.device_count()} devices" if given.mesh else ""),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "ms_by_part": profile.by_part(kernels),
        "floor_ms_by_part": counts.floors(this.operations(form), counts.device() or counts.FLOOR_DEVICE),
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
    }
    print("\n\n".join(tables(result)))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def track(given: argparse.Namespace) -> int:
    """Trains the timed forms beside the reference; exit status 1 where some form leaves it, or the control does not."""
    use_compilation_cache()
    this = work(given.family, given.size, given.batch, "training", "pre_ln")
    say = functools.partial(print, flush=True)
    result = tracking.measure(this, given.steps, say, given.threads, given.learning_rate)
    print(tracking.table(result))
    if given.json:
        tracking.save(result, given.json)
    return 0 if tracking.passes(result) else 1


def time_devices(given: argparse.Namespace) -> int:
    """Times a step on several devices against one."""
    this = devices.Comparison(
        work(given.family, given.size, given.per_device, "training", given.coordinates),
        Form(given.norm, given.basis),
        tuple(given.meshes.split(",")),
        given.devices,
        tuple(given.options.split(",")),
    )
    result = devices.measure(
        this,
        windows=given.windows,
        window_seconds=given.window_seconds,
        threads=given.threads,
        say=lambda text: print(text, flush=True),
    )
    print(devices.table(result))
    if given.json:
        devices.save(result, given.json)
    return 0


def read_flags(arguments: list[str]) -> argparse.Namespace:
    """The command and its flags."""
    parser = argparse.ArgumentParser(
        prog="prenorm_jax.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{print,time,devices,profile,track}")
    flags = commands.add_parser("print")
    flags.set_defaults(command=print_tables)
    flags.add_argument("files", nargs="+", metavar="FILE")
    flags.add_argument("--plot", metavar="PREFIX", help="draw a study into PREFIX.png and PREFIX_roofline.png")
    flags.add_argument("--into", type=pathlib.Path, metavar="GUIDE", help="a Markdown file to put the tables into")

    flags = commands.add_parser("time")
    flags.set_defaults(command=time_study)
    flags.add_argument("config", metavar="CONFIG[:ARG]")
    flags.add_argument(
        "--out", type=pathlib.Path, required=True, metavar="FILE", help="results; continued where it exists"
    )
    flags.add_argument("--only", metavar="WORD,...", help="works whose names hold all words, as in B/16,training")
    flags.add_argument("--forms", metavar="FORM,...", help="pre_ln first; default: all, and both controls")
    flags.add_argument(
        "--minutes", type=float, default=8.5, help="begin no work that would end later; default %(default)s"
    )
    flags.add_argument(
        "--threads", type=int, default=1, help="forms compiled at a time; default 1, which times compilation"
    )

    flags = commands.add_parser("devices")
    flags.set_defaults(command=time_devices)
    flags.add_argument("family", choices=FAMILIES)
    flags.add_argument("size", help="B/16, small, ...")
    flags.add_argument("--per-device", type=int, required=True, help="examples of a step for each device")
    flags.add_argument("--devices", type=int, default=2)
    flags.add_argument("--meshes", default="data,fsdp", metavar="AXIS,...", help="default %(default)s")
    flags.add_argument("--options", default="default", metavar="SET,...", help="joined by +; default %(default)s")
    flags.add_argument("--norm", choices=NORMS, default="pre_ln")
    flags.add_argument("--basis", choices=BASES, default="reflect")
    flags.add_argument("--coordinates", choices=COORDINATES, default="native")
    flags.add_argument("--windows", type=int, default=7)
    flags.add_argument("--window-seconds", type=float, default=1.0)
    flags.add_argument("--threads", type=int, default=4, help="cases compiled at a time; default %(default)s")
    flags.add_argument("--json", type=pathlib.Path, metavar="FILE", help="a result takes its place among others")

    flags = commands.add_parser("profile")
    flags.set_defaults(command=profile_step)
    flags.add_argument("family", choices=FAMILIES)
    flags.add_argument("size", help="B/16, small, ...")
    flags.add_argument("--batch", type=int, required=True)
    flags.add_argument("--norm", choices=NORMS, default="pre_ln")
    flags.add_argument("--basis", choices=BASES, default="reflect")
    flags.add_argument("--coordinates", choices=COORDINATES, default="native")
    flags.add_argument("--kind", choices=KINDS, default="training")
    flags.add_argument(
        "--mesh", choices=devices.MESHES, help="training on all devices, split along this axis; --batch is each one's"
    )
    flags.add_argument("--steps", type=int, default=3, help="traced")
    flags.add_argument("--json", type=pathlib.Path, metavar="FILE")

    flags = commands.add_parser("track")
    flags.set_defaults(command=track)
    flags.add_argument("family", choices=FAMILIES)
    flags.add_argument("size", help="B/16, small, ...")
    flags.add_argument("--batch", type=int, required=True)
    flags.add_argument("--steps", type=int, default=200)
    flags.add_argument("--learning-rate", type=float, default=tracking.LEARNING_RATE, help="default %(default)s")
    flags.add_argument("--threads", type=int, default=4, help="programs compiled at a time; default %(default)s")
    flags.add_argument("--json", type=pathlib.Path, metavar="FILE", help="a result takes its place among others")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Exit status: 0; 1 where a check fails; 2 for what can't be (one line on stderr); 3 where a study has works left."""
    given = read_flags(arguments)
    try:
        return int(given.command(given))
    except ConfigError as error:
        print(f"prenorm_jax.measure: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
