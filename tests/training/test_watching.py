"""What a run says of itself: boards, traces, the summary, full disks, and the overlay of several runs."""

import dataclasses
import errno
import io
import json
import math
import os
import pathlib
import shutil
import sys
import types

import jax
import numpy as np
import pytest
import rich.console
import small_experiment as small
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from prenorm_jax import models
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import boards, counts, disk, loop, metrics, overlay, summary
from prenorm_jax.training.disk import DiskFull
from prenorm_jax.training.step import main_branch_mean


def train(experiment, workdir):
    console = rich.console.Console(file=io.StringIO(), width=300)
    return loop.train(experiment, workdir, console), console.file.getvalue()


def changed(experiment, **sections):
    return dataclasses.replace(
        experiment,
        **{name: dataclasses.replace(getattr(experiment, name), **fields) for name, fields in sections.items()},
    )


def events(folder: pathlib.Path) -> list[Event]:
    """What TensorBoard reads: each record is its length (8 bytes), a checksum (4), itself, a checksum (4)."""
    found = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            found.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += size + 16
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """Runs of 6 steps: Pre-LN with two seeds, Pre-RMSNorm of the first; the last one is traced and kept on a stub of wandb."""
    root = tmp_path_factory.mktemp("runs")
    base = changed(
        small.experiment(root / "library", steps=6, eval_every=2, checkpoint_every=0), optimizer={"warmup_steps": 2}
    )
    logged: list[dict[str, float]] = []
    stub = types.ModuleType("wandb")
    started = []

    def init(**arguments):
        started.append(arguments)
        return types.SimpleNamespace(
            define_metric=lambda *names, **more: None, log=logged.append, finish=lambda: logged.append({"finished": 1})
        )

    stub.init = init  # type: ignore[attr-defined]
    settings = {
        "pre_ln": {"model": {"norm": "pre_ln"}},
        "other": {"model": {"norm": "pre_ln"}, "train": {"seed": 1}},
        "rms": {"train": {"profile": "3:5", "wandb": "offline", "wandb_project": "tests"}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", stub)
        outputs = {name: train(changed(base, **fields), root / name)[1] for name, fields in settings.items()}
    return types.SimpleNamespace(root=root, base=base, outputs=outputs, logged=logged, started=started)


@pytest.mark.slow
def test_tensorboard_has_the_rows(runs):
    found = events(runs.root / "rms" / "tensorboard")
    scalars = {(value.tag, event.step): value.simple_value for event in found for value in event.summary.value}
    for row in metrics.read(runs.root / "rms"):
        for name in set(row) - {"kind", "step"}:
            assert scalars[f"{row['kind']}/{name}", row["step"]] == pytest.approx(row[name], rel=1e-6)
    assert len({tag for tag, _ in scalars}) >= 8


def test_wandb_gets_the_rows_where_it_is_asked_for(runs):
    [arguments] = runs.started
    assert (arguments["mode"], arguments["project"]) == ("offline", "tests")
    assert arguments["id"] == (runs.root / "rms" / "wandb_id").read_text()
    rows = metrics.read(runs.root / "rms")
    assert [row.get("step") for row in runs.logged] == [row["step"] for row in rows] + [None]
    assert runs.logged[0]["train/loss"] == rows[0]["loss"]
    assert not (runs.root / "pre_ln" / "wandb_id").exists()


def test_a_missing_wandb_is_one_line_and_nothing_is_written(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"^config.train.wandb: needs the library wandb; pip install wandb, or"
    ) as error:
        train(changed(runs.base, train={"wandb": "online"}), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_chosen_steps_are_traced_and_no_others(runs):
    folder = runs.root / "rms" / "profile"
    assert f"steps 3 to 4 are traced in {folder}" in runs.outputs["rms"]
    assert list(folder.rglob("*.xplane.pb"))
    assert not (runs.root / "pre_ln" / "profile").exists()


def test_the_summary_says_what_came_of_it(runs):
    found = json.loads((runs.root / "pre_ln" / "summary.json").read_text())
    rows = [row for row in metrics.read(runs.root / "pre_ln") if row["kind"] == "eval"]
    assert found["last"] == {name: value for name, value in rows[-1].items() if name != "kind"}
    assert found["best"]["loss"] == min(row["loss"] for row in rows)
    assert found["median"]["tokens_per_second"] > 0
    text = (runs.root / "pre_ln" / "summary.md").read_text()
    assert f"| last | 6 | {rows[-1]['loss']:.5g} |" in text
    with Image.open(runs.root / "pre_ln" / "curves.png") as picture:
        assert picture.size[0] > 1000
    worse = [*rows, {**rows[-1], "step": 7, "loss": 99.0}]
    assert summary.of(worse, runs.base)["best"] == found["best"]


def test_the_best_evaluation_is_a_number_where_one_is(runs):
    rows = [
        {"kind": "eval", "step": step, "loss": loss}
        for step, loss in ((1, math.nan), (2, 0.3), (3, math.nan), (4, 0.5))
    ]
    assert summary.of(rows, runs.base)["best"] == {"step": 2, "loss": 0.3}


def test_mfu_is_of_the_known_peak_and_not_of_an_unknown_one(monkeypatch):
    model = models.gpt_config("small")
    # 6 operations a parameter and token (the table is the head as well; positions are looked up), 12 L D a layer and token for attention.
    tokens, looked_up = 4 * model.context, model.context * model.width
    expected = tokens * (6 * (models.count(model) - looked_up) + 12 * model.depth * model.context * model.width)
    assert counts.flops_per_step(model, 4) == pytest.approx(expected, rel=0.01)
    device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    assert counts.peak_flops([device, device]) == 2 * 989e12
    assert counts.peak_flops([device, types.SimpleNamespace(device_kind="abacus")]) is None
    assert counts.peak_flops(jax.devices()) is None


def test_the_mean_of_the_main_branch_is_pre_lns_and_not_pre_rmsnorms(runs):
    means = {
        name: [row["main_branch_mean"] for row in metrics.read(runs.root / name) if row["kind"] == "train"]
        for name in ("pre_ln", "rms")
    }
    assert max(means["rms"]) < 1e-6
    assert min(means["pre_ln"]) > 1e-3
    x = np.random.default_rng(0).normal(size=(2, 3, 8)) + 0.5
    expected = (np.abs(x.mean(-1)) / np.sqrt((x**2).mean(-1))).mean(-1)
    np.testing.assert_allclose(main_branch_mean(jax.numpy.asarray(x)), expected, rtol=1e-5)


# --- a full disk


@pytest.mark.parametrize("part", [0, 30])
def test_a_row_is_written_whole_or_not_at_all(runs, tmp_path, monkeypatch, part):
    """The disk takes `part` bytes of the second row."""
    write, calls = os.write, []

    def full(file: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) < 2:
            return write(file, data)
        if len(calls) == 2 and part:
            return write(file, data[:part])
        raise OSError(errno.ENOSPC, "No space left on device")

    with metrics.Metrics(tmp_path, 0, runs.base) as written:
        monkeypatch.setattr(os, "write", full)
        written.write("train", 1, {"loss": 1.0})
        with pytest.raises(OSError, match="No space left"):
            written.write("train", 2, {"loss": 2.0})
        monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps({"kind": "train", "step": 1, "loss": 1.0}) + "\n"


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_another_error_is_itself(runs, tmp_path, monkeypatch):
    for error, expected in (
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"), DiskFull),
        (OSError(errno.EIO, "Input/output error"), OSError),
    ):

        def fails(*arguments, error=error):
            raise error

        monkeypatch.setattr(boards.TensorBoard, "write", fails)
        with pytest.raises(expected) as told:
            train(runs.base, tmp_path / type(error).__name__ / expected.__name__)
        if expected is DiskFull:
            assert "no space left on the disk; stopped" in str(told.value)
            assert "\n" not in str(told.value)
        else:
            assert told.value is error


def test_a_checkpoint_that_would_not_fit_is_not_begun(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "x").write_bytes(b"x" * 5000)
    assert 5000 <= disk.taken(folder) < 20000
    disk.require_room(folder, 1000)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=999_999))
    with (
        pytest.raises(DiskFull, match=r"stopped \(1.0 MB are free, a checkpoint takes about 3.0 MB\)"),
        disk.full_disks_told(tmp_path),
    ):
        disk.require_room(folder, 3_000_000)


# --- several runs


def test_runs_are_overlaid_and_judged_by_two_seeds(runs, tmp_path, capsys):
    workdirs = [str(runs.root / name) for name in ("pre_ln", "other", "rms")]
    assert overlay.main([f"--out={tmp_path / 'curves'}", *workdirs]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"curves.json", "curves.md", "curves.png"}
    found = json.loads((tmp_path / "curves.json").read_text())
    assert [run["within"] for run in found["runs"]] == [None, None, True]
    assert [run["curve_within"] for run in found["runs"]] == [None, None, True]
    assert abs(found["runs"][2]["difference"]) < 1e-4 < found["spread"]
    text = (tmp_path / "curves.md").read_text()
    assert text == capsys.readouterr().out[:-1]
    assert "| pre_rmsnorm, pre_ln coordinates, seed 0/1 |" in text
    assert found["seeds_rms"] == pytest.approx(found["spread"])  # of one pair
    assert found["variants_rms"] == {"pre_ln": pytest.approx(abs(found["runs"][2]["difference"])), "native": None}
    assert f"two seeds end {found['seeds_rms']:.4f} apart" in text


def test_variants_come_behind_pre_ln_in_whatever_order_they_are_named(runs):
    found = overlay.read([runs.root / name for name in ("rms", "other", "pre_ln")])
    assert [run["norm"] for run in found["runs"]] == ["pre_ln", "pre_ln", "pre_rmsnorm"]
    assert [run["seed"] for run in found["runs"][:2]] == sorted(run["seed"] for run in found["runs"][:2])


def test_a_variant_that_learns_something_else_is_outside(runs, tmp_path):
    """The control: the same with the variant's last loss a spread and a bit away."""
    found = overlay.read([runs.root / name for name in ("pre_ln", "other", "rms")])
    found["runs"][2]["last"]["loss"] += 1.1 * found["spread"]
    last = overlay.compared(found["runs"])["runs"][2]
    assert (last["within"], last["curve_within"]) == (False, True)
    found["runs"][2]["eval"] = [[step, loss + 1.1 * found["curve_spread"]] for step, loss in found["runs"][2]["eval"]]
    assert overlay.compared(found["runs"])["runs"][2]["curve_within"] is False
    assert "| no |" in overlay.table({**found, **overlay.compared(found["runs"])})
    alone = overlay.compared([found["runs"][0], found["runs"][2]])
    assert (alone["spread"], alone["runs"][1]["within"]) == (None, None)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("optimizer", {"learning_rate": 0.5}, r"config\.optimizer\.learning_rate: .* -> 0\.5"),
        ("data", {"root": "elsewhere"}, r"config\.data\.root: .* -> elsewhere"),
        ("train", {"batch_size": 8}, r"config\.train\.batch_size: 4 -> 8"),
    ],
)
def test_runs_that_learn_something_else_are_not_compared(runs, tmp_path, section, fields, message):
    shutil.copytree(runs.root / "rms", tmp_path / "rms")
    tree = json.loads((tmp_path / "rms/config.json").read_text())
    tree[section] |= fields
    (tmp_path / "rms/config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=message):
        overlay.read([runs.root / "pre_ln", tmp_path / "rms"])


def test_an_overlay_that_can_not_be_written_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert overlay.main([f"--out={tmp_path / 'file/x'}", str(runs.root / "pre_ln")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_that_can_not_be_compared_are_refused(runs, tmp_path, capsys):
    other = changed(runs.base, model={"width": 32}, train={"eval_every": 0})
    train(other, tmp_path / "wider")
    assert overlay.main([f"--out={tmp_path / 'x'}", str(runs.root / "rms"), str(tmp_path / "wider")]) == 2
    assert "wider: another model than the first run's (config.model.width: 16 -> 32)" in capsys.readouterr().err
    assert overlay.main([f"--out={tmp_path / 'x'}", str(tmp_path)]) == 2
    assert "no run of train.py" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
