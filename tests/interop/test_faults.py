import pytest
import small
from faults import FAULTS, LEFT, attempt, holds

from prenorm_jax.interop.__main__ import main

pytestmark = pytest.mark.slow  # on one Python


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_is_touched(name, tmp_path):
    outcome = attempt(FAULTS[name], tmp_path)
    assert holds(FAULTS[name], outcome), outcome


def test_without_one_the_destination_is_all_that_is_new(tmp_path, capsys):
    small.write(tmp_path / "source", shards=3)
    before = {path: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "destination"), "--to", "pre_rmsnorm"]) == 0
    assert "LayerNorms that RMSNorm may replace" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"source", "destination"}
    assert {path: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


def test_what_a_killed_run_left_is_swept_away_by_the_next(tmp_path):
    assert attempt(FAULTS["a kill -9 in the middle"], tmp_path).left == LEFT
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "destination"), "--to", "pre_rmsnorm"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "destination"}


def test_two_runs_with_one_destination_do_not_meet(tmp_path):
    from prenorm_jax.interop.destination import destination

    with destination(tmp_path / "d", 0):
        for _ in range(2):  # the one that is refused leaves the other's lock alone
            with pytest.raises(OSError, match="another run is writing it"), destination(tmp_path / "d", 0):
                pass
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
