"""train.py as a user meets it: one line for each mistake, a clean interrupt, and the quickstart's accuracy."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import train
from prenorm_jax.training import checkpoints, metrics

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}"
TINY = {"model.width": 8, "model.heads": 2, "model.mlp_width": 8, "model.depth": 1, "train.batch_size": 8}


def child(*arguments: object, cwd: pathlib.Path) -> subprocess.Popen[str]:
    # One device, as a user has it, and not the eight of these tests.
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "error", str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


MISTAKES = [
    ([], "the following arguments are required: --config"),
    (["--config=nowhere.py"], "--config: got 'nowhere.py'; allowed: an existing Python file"),
    ([f"{QUICKSTART}:bert"], "config arg: got 'bert'; allowed: vit, gpt"),
    ([QUICKSTART, "--steps=3"], "--steps=3: no such flag; allowed: --config=FILE[:ARG], --workdir=DIR"),
    ([QUICKSTART, "now"], "now: no such flag"),
    (
        [QUICKSTART, "--config.train.stepz=3"],
        "config.train.stepz: no such field (did you mean steps?); allowed: accumulate",
    ),
    ([QUICKSTART, "--config.train.steps=many"], "config.train.steps: got 'many'; allowed: an integer"),
    ([QUICKSTART, "--config.train.steps=-5"], "config.train.steps: got -5; allowed: 1 or more"),
    (
        [QUICKSTART, "--config.train.steps=4", "--config.train.profile=100:200"],
        "config.train.profile: got '100:200'; allowed: steps up",
    ),
    (
        [QUICKSTART, "--config.model.width=4000000000"],
        "config.model.width: got 4000000000; allowed: an integer > 0, below 2**31",
    ),
    (
        [QUICKSTART, "--config.data.root=there"],
        "config.data.root: got 'there'; allowed: none for config.data.name = digits",
    ),
    ([QUICKSTART, "--config.model.heads=5"], "config.model.heads: got 5; allowed: a divisor of model.width = 96"),
    ([QUICKSTART, "--config.model.patch_size=3"], "config.model.patch_size: got 3; allowed: a divisor of"),
    ([QUICKSTART, "--config.model.norm=post_ln"], "config.model.norm: got 'post_ln'; allowed: pre_ln, pre_rmsnorm"),
    ([QUICKSTART, "--config.model.norm=no_norm"], "config.model.norm: got 'no_norm'; allowed: a norm"),
    ([QUICKSTART, "--config.data.name=imagenet"], "config.data.name: got 'imagenet'; allowed: digits, stdlib"),
    (
        [f"--config={ROOT / 'configs' / 'pretrained.py'}:x"],
        "config arg: x: no model.json and parameters in it; expected what",
    ),
    ([f"{QUICKSTART}:gpt", "--config.data.root=nowhere"], "cannot read nowhere: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=[line[:50] for _, line in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"train.py: {line}")
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_every_config_reads_and_names_its_own_workdir(monkeypatch):
    for path in sorted((ROOT / "configs").glob("*.py")):
        # Studies are not trained, and the imported models' needs an arg.
        if path.name not in ("__init__.py", "options.py", "pretrained.py") and "def get_study" not in path.read_text():
            experiment, workdir = train.read_flags([f"--config={path}"])
            assert workdir == pathlib.Path("runs", path.stem)
            assert experiment.model.norm in ("pre_ln", "pre_rmsnorm", "pre_crmsnorm")
    _, workdir = train.read_flags([f"--config={ROOT}/configs/vit_i1k.py:variant=Ti/16,norm=pre_ln"])
    assert workdir == pathlib.Path("runs", "vit_i1k-variant-Ti-16-norm-pre_ln")


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("config.py", "def (", "SyntaxError: invalid syntax (config.py, line 1)"),
        (
            "config.py",
            "\nimport nowhere_to_be_found",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found', line 2",
        ),
        (
            "config.py",
            "def get_config(arg):\n    return arg.nothing",
            "AttributeError: 'str' object has no attribute 'nothing', line 2",
        ),
        (
            "config.py",
            "def get_config():\n    pass",
            "TypeError: get_config() takes 0 positional arguments but 1 was given",
        ),
        ("config.py", "def get_config(arg):\n    return {}", "config.py: got {}; allowed: a ConfigDict"),
        ("config.txt", "", "allowed: an existing Python file"),
    ],
)
def test_a_config_that_is_none_is_one_line(name, text, line, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert train.main([f"--config={tmp_path / name}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("train.py: --config: ")
    assert line in err


def test_a_line_break_in_a_name_makes_no_second_line(tmp_path, capsys):
    assert train.main([f"{QUICKSTART}:gpt", "--config.data.root=no\nwhere", f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_workdir_that_cannot_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for workdir in ("file", "file/run"):
        assert train.main([QUICKSTART, f"--workdir={tmp_path / workdir}", *fields(train__steps=200)]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"train.py: --workdir: cannot make {tmp_path / workdir} (")
        assert (out, err.count("\n")) == ("", 1)
    assert (tmp_path / "file").read_text() == "kept"


def fields(**more: object) -> list[str]:
    settings = {**TINY, "compare.enabled": False, **{name.replace("__", "."): value for name, value in more.items()}}
    return [f"--config.{name}={value}" for name, value in settings.items()]


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def allocate(*_):
        raise MemoryError("Unable to allocate 2 PiB\nfor an array")

    monkeypatch.setattr(train.loop, "train", allocate)
    assert train.main([QUICKSTART, f"--workdir={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("train.py: out of memory (Unable to allocate 2 PiB); train.accumulate")
    assert err.count("\n") == 1


def test_status_and_stderr_of_the_process_itself(tmp_path):
    with child(QUICKSTART, "--config.model.depth=0", cwd=tmp_path) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert (out, err) == ("", "train.py: config.model.depth: got 0; allowed: an integer > 0, below 2**31\n")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_is_one_line_behind_a_checkpoint(tmp_path, number, status):
    arguments = [
        QUICKSTART,
        "--workdir=run",
        *fields(train__steps=4000, train__log_every=1, train__checkpoint_every=20),
    ]
    with child(*arguments, cwd=tmp_path) as process:
        deadline = time.monotonic() + 120
        while not (rows := metrics.read(tmp_path / "run")) or rows[-1]["step"] < 30:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    last = metrics.read(tmp_path / "run")[-1]["step"]
    assert err == f"train.py: interrupted; step {last} is saved, and the same command continues there\n"
    found = checkpoints.latest(tmp_path / "run")
    assert found is not None
    assert found[0] == last


def test_a_workdir_of_another_model_is_refused_and_left_alone(tmp_path, capsys):
    arguments = [QUICKSTART, f"--workdir={tmp_path / 'run'}"]
    assert train.main([*arguments, *fields(train__steps=2, optimizer__warmup_steps=1)]) == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for more in ([], ["--config.compare.only=True"]):
        assert train.main([*arguments, *more]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(
            f"train.py: workdir: {tmp_path / 'run'} holds a checkpoint of another model (config.model.depth: 1 -> "
        )
        assert (out, err.count("\n")) == ("", 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_quickstart_learns_digits(tmp_path):
    with child(QUICKSTART, "--config.compare.enabled=False", cwd=tmp_path) as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert err == ""
    rows = [json.loads(line) for line in (tmp_path / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "eval"
    assert rows[-1]["accuracy"] >= 0.96
    assert "held out: accuracy" in out.splitlines()[-1]
