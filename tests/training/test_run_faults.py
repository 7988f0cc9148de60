"""The faults that need processes of their own, in a smaller form than the command's; and its table."""

import json
import pathlib

import pytest
import run_faults as faults

from prenorm_jax.training import lost

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def room():
    with faults.room(kills=2, steps=40) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "picture cut off while training",
        "disk full, inside a save",
        "second process in the workdir",
        "second of two processes killed",
        "SIGTERM to one of two processes",
    ],
)
def test_a_fault_loses_nothing_and_hangs_nobody(room, name):
    outcome = faults.attempt(name, room)
    assert outcome["holds"], outcome


def test_a_peer_that_is_gone_is_told_from_other_errors(monkeypatch):
    gone = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1454")
    for processes, error, expected in (
        (2, gone, lost.ProcessLost),
        (1, gone, ValueError),
        (2, ValueError("x"), ValueError),
    ):
        monkeypatch.setattr(lost.jax, "process_count", lambda processes=processes: processes)
        with pytest.raises(expected) as told, lost.lost_processes_told():
            raise error
        assert (told.value is error) == (expected is ValueError)


def test_a_run_that_differs_is_found_out(tmp_path):
    """The control of the comparison: other rows are not the same rows."""
    for name, loss in (("one", 1.0), ("other", 1.0), ("third", 1.0000001)):
        (tmp_path / name).mkdir()
        row = {"kind": "train", "step": 1, "loss": loss, "step_seconds": len(name)}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert faults.rows(tmp_path / "one") == faults.rows(tmp_path / "other")
    assert faults.rows(tmp_path / "one") != faults.rows(tmp_path / "third")
    with pytest.raises(AssertionError):
        faults.require_continued(8, "resuming at step 4 of 12")
    faults.require_continued(8, "resuming at step 8 of 12")


def test_the_table_is_in_the_guide_and_all_of_it_holds():
    result = json.loads((ROOT / "results/training/faults.json").read_text())
    assert [row["fault"] for row in result["rows"]] == list(faults.FAULTS)
    assert all(row["holds"] for row in result["rows"])
    assert faults.table(result) in (ROOT / "docs/running.md").read_text()
