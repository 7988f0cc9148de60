"""The loop in one process: what it writes, what it says, what it refuses. Kills and resumes are in test_resume.py."""

import dataclasses
import errno
import io
import json
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import rich.console
import small_experiment as small
from PIL import Image

from prenorm_jax import models
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import checkpoints, data, loop, metrics
from prenorm_jax.training.disk import DiskFull
from prenorm_jax.training.interrupts import Interrupted
from prenorm_jax.training.tasks import task_of


def train(experiment, workdir):
    console = rich.console.Console(file=io.StringIO(), width=200)
    params = loop.train(experiment, workdir, console)
    return params, console.file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("run")
    experiment = small.experiment(root / "library")
    return experiment, root / "run", *train(experiment, root / "run")


def test_rows_are_those_that_the_settings_ask_for(run):
    experiment, workdir, *_ = run
    rows = metrics.read(workdir)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [4, 8, 12]
    names = {"loss", "grad_norm", "main_branch_mean", "learning_rate", "step_seconds", "tokens_per_second"}
    assert all(names <= row.keys() for row in rows if row["kind"] == "train")
    assert rows[0]["learning_rate"] == pytest.approx(experiment.optimizer.learning_rate / 3)
    assert rows[-1].keys() == {"kind", "step", "loss", "perplexity", "bits_per_byte"}
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_the_workdir_holds_what_the_docstring_says(run):
    _, workdir, params, _ = run
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints",
        "config.json",
        "curves.png",
        "lock",
        "metrics.jsonl",
        "summary.json",
        "summary.md",
        "tensorboard",
    }
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 12
    with Image.open(workdir / "curves.png") as picture:
        assert picture.size[0] > 500
    loaded = checkpoints.load(workdir)
    assert loaded.step == 12
    for kept, returned in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(kept, returned)


def test_the_guides_example_of_text_from_a_run(run, capsys):
    _, workdir, *_ = run
    guide = (pathlib.Path(__file__).parents[2] / "docs/running.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert example.count('"runs/stdlib"') == 1
    exec(example.replace('"runs/stdlib"', repr(str(workdir))), {})
    assert capsys.readouterr().out.startswith("def ")


def test_plain_lines_where_there_is_no_terminal(run):
    *_, output = run
    lines = output.splitlines()
    assert lines[0].startswith("stdlib: ")
    assert "parameters in pre_ln coordinates" in lines[0]
    row = r"step 7/12  loss [\d.]+  lr [\d.]+  gradient norm [\d.]+  main-branch mean \S+  [\d,]+ tokens/s  \d:\d\d:\d\d left"
    assert any(re.fullmatch(row, line) for line in lines), lines
    assert lines[-1].startswith("step 12/12  held out: loss")


def test_evaluation_is_the_mean_over_held_out_examples(run):
    experiment, _, params, _ = run
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, eval_examples=0))
    held_out = data.load(experiment).held_out
    running = models.running(params, experiment.model)
    found = loop.evaluate(experiment, held_out, running)
    examples = held_out.batch(np.arange(len(held_out)), None)
    inputs, targets = examples["inputs"], examples["targets"]
    logits, _ = jax.jit(lambda running, inputs: models.apply(experiment.model, running, inputs))(running, inputs)
    expected = float(task_of(experiment).judge(logits, targets)["loss"].mean())
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected / np.log(2), rel=1e-5)


def test_a_finished_run_is_said_to_be_finished_and_trains_no_further(run):
    experiment, workdir, params, _ = run
    rows = metrics.read(workdir)
    again, output = train(experiment, workdir)
    assert "holds a finished run (12 steps)" in output
    assert metrics.read(workdir) == rows
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_finished_run_that_is_started_with_other_settings_keeps_its_record(run, tmp_path):
    experiment, workdir, *_ = run
    shutil.copytree(workdir, tmp_path / "run")
    files = ("config.json", "summary.json", "summary.md")
    before = [(tmp_path / "run" / name).read_bytes() for name in files]
    other = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=8, seed=7))
    assert "changed since that checkpoint: " in train(other, tmp_path / "run")[1]
    assert [(tmp_path / "run" / name).read_bytes() for name in files] == before


def test_fewer_steps_than_an_unfinished_run_has_made_are_refused(run, tmp_path):
    experiment, workdir, *_ = run
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    fewer = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=8))
    with pytest.raises(ConfigError, match=r"config\.train\.steps: got 8; allowed: 12 or more, the step that .*run has"):
        train(fewer, tmp_path / "run")


def test_the_record_of_a_finished_run_outlives_its_checkpoints(run, tmp_path):
    experiment, workdir, *_ = run
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    rows = metrics.read(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--workdir: got .*run'\); allowed: .* record of a finished run, but none"):
        train(experiment, tmp_path / "run")
    assert metrics.read(tmp_path / "run") == rows
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").write_text("a file")
    with pytest.raises(ConfigError, match=r"--workdir: got .*checkpoints'\); allowed: a folder of that name, or none"):
        train(experiment, tmp_path / "other")


@pytest.mark.parametrize("step", [4, 12])
def test_an_evaluation_that_fails_costs_no_step_and_is_made_when_the_run_goes_on(run, tmp_path, monkeypatch, step):
    experiment, workdir, params, _ = run
    evaluate = loop.evaluate

    def failing(*arguments):
        if len([row for row in metrics.read(tmp_path) if row["kind"] == "train"]) == step:
            raise data.DataError("cannot read a picture")
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", failing)
    with pytest.raises(data.DataError, match="cannot read a picture"):
        train(experiment, tmp_path)
    assert checkpoints.latest(tmp_path)[0] == step
    monkeypatch.setattr(loop, "evaluate", evaluate)
    again, _ = train(experiment, tmp_path)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    evals = [[row for row in metrics.read(of) if row["kind"] == "eval"] for of in (tmp_path, workdir)]
    assert evals[0] == evals[1]
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("step", [4, 12])
def test_a_signal_in_an_evaluation_leaves_it_and_it_is_made_when_the_run_goes_on(run, tmp_path, monkeypatch, step):
    experiment, workdir, *_ = run
    evaluate = loop.evaluate

    def interrupted(*arguments):
        if len([row for row in metrics.read(tmp_path) if row["kind"] == "train"]) == step:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(Interrupted, match=f"step {step} is saved") as stopped:
        train(experiment, tmp_path)
    assert stopped.value.status == 128 + signal.SIGTERM
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(loop, "evaluate", evaluate)
    train(experiment, tmp_path)
    evals = [[row for row in metrics.read(of) if row["kind"] == "eval"] for of in (tmp_path, workdir)]
    assert evals[0] == evals[1]


def test_a_signal_behind_the_last_evaluation_stops_what_would_follow_the_run(run, tmp_path, monkeypatch):
    experiment, *_ = run
    write = loop.summary.write

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return write(*arguments)

    monkeypatch.setattr(loop.summary, "write", interrupted)
    with pytest.raises(Interrupted, match="step 12 is saved"):
        train(experiment, tmp_path)
    assert (tmp_path / "summary.json").exists()


def test_a_summary_that_could_not_be_written_is_written_by_the_next_start(run, tmp_path, monkeypatch):
    experiment, workdir, *_ = run
    write_whole = loop.summary.write_whole

    def full(path, content):
        if path.name == "summary.md":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_whole(path, content)

    monkeypatch.setattr(loop.summary, "write_whole", full)
    with pytest.raises(DiskFull, match="no space left"):
        train(experiment, tmp_path)
    monkeypatch.setattr(loop.summary, "write_whole", write_whole)
    assert "holds a finished run" in train(experiment, tmp_path)[1]
    for name in ("summary.json", "summary.md", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert (
        json.loads((tmp_path / "summary.json").read_text())["last"]
        == json.loads((workdir / "summary.json").read_text())["last"]
    )


def test_rows_beyond_the_restored_step_are_dropped(run, tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "step": step, "loss": 1.0} for step in range(1, 8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    assert metrics.read(tmp_path) == rows
    with metrics.Metrics(tmp_path, 5, run[0]) as written:
        written.write("train", 6, {"loss": 2.0})
    assert metrics.read(tmp_path) == [*rows[:5], {"kind": "train", "step": 6, "loss": 2.0}]
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_a_damaged_row_costs_no_other(run, tmp_path):
    lines = (run[1] / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    rows = metrics.read(run[1])
    lines[2:5] = [b'{"kind": "tr\xff\n', b"[1, 2]\n", b'{"step": "five", "kind": "train"}\n']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    assert metrics.read(tmp_path) == [*rows[:2], *rows[5:]]
    with metrics.Metrics(tmp_path, 12, run[0]):
        pass
    assert metrics.read(tmp_path) == [*rows[:2], *rows[5:]]


def test_the_control_without_norms_is_not_trained(run, tmp_path):
    experiment, *_ = run
    control = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, norm="no_norm"))
    with pytest.raises(ConfigError, match=r"config\.model\.norm: got 'no_norm'"):
        train(control, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("train", {"init_from": "nowhere"}, r"config\.train\.init_from: "),
        ("model", {"dtype": "float16"}, r"config\.model\.dtype: got 'float16'; allowed: .* on cpu"),
        ("model", {"attention": "cudnn"}, r"config\.model\.attention: got 'cudnn'; allowed: .* on cpu"),
    ],
)
def test_what_can_not_begin_leaves_nothing_behind(run, tmp_path, section, fields, message):
    experiment, *_ = run
    given = dataclasses.replace(getattr(experiment, section), **fields)
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(experiment, **{section: given}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
def test_float64_that_jax_would_not_compute_in_is_refused(run, tmp_path, field):
    experiment, *_ = run
    wide = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **{field: "float64"}))
    with (
        jax.enable_x64(False),
        pytest.raises(ConfigError, match=rf"config\.model\.{field}: got 'float64'; .*JAX_ENABLE_X64"),
    ):
        train(wide, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_removed_under_a_run_is_one_line(run, tmp_path, monkeypatch):
    experiment, *_ = run
    evaluated = loop.Log.evaluated

    def removing(*arguments):
        shutil.rmtree(tmp_path / "run")
        return evaluated(*arguments)

    monkeypatch.setattr(loop.Log, "evaluated", removing)
    with pytest.raises(FileNotFoundError, match=r"^.*run: its checkpoints are gone; stopped\. Something removed"):
        train(experiment, tmp_path / "run")


def test_unreadable_data_leaves_nothing_behind(run, tmp_path):
    experiment, *_ = run
    lost = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, root=str(tmp_path / "nowhere")))
    with pytest.raises(data.DataError, match="nowhere"):
        train(lost, tmp_path / "run")
    assert not (tmp_path / "run").exists()
