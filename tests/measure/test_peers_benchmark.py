"""benchmarks/peers.py: both sides take turns, one process each, and the file holds what they answered. Torch is not needed here."""

import json

import pytest

from benchmarks import peers
from prenorm_jax.measure.study import peers_table


@pytest.fixture
def turns(monkeypatch):
    """Sides that answer at once; the turns in which they were asked."""
    asked = []

    class Side:
        def __init__(self, name, arguments):
            self.name = name
            library = {"torch": "2"} if name == "theirs" else {"jax": "0"}
            self.hello = {"seconds": 1.0, "work": arguments[1], "device": "d", "versions": library}

        def take(self, steps):
            asked.append((self.name, steps))
            return {"timm x": 0.02 * len(asked)} if self.name == "theirs" else {"pre_ln": 0.01 * len(asked)}

        def close(self):
            asked.append((self.name, "closed"))

    monkeypatch.setattr(peers, "Side", Side)
    return asked


def test_sides_take_turns_and_every_work_is_written(turns, tmp_path, capsys):
    out = tmp_path / "peers.json"
    assert peers.main(["--works", "vit_b,vit_s", "--rounds", "3", "--steps", "7", "--out", str(out)]) == 0
    one = [("theirs", 7), ("ours", 7)] * 3 + [("theirs", "closed"), ("ours", "closed")]
    assert turns == one * 2
    result = json.loads(out.read_text())
    assert [entry["work"] for entry in result["peers"]] == ["vit_b", "vit_s"]
    assert result["peers"][0]["theirs"]["windows_s"] == pytest.approx([0.02, 0.06, 0.10])
    assert result["peers"][0]["ours"]["pre_ln"]["windows_s"] == pytest.approx([0.02, 0.04, 0.06])
    assert result["versions"] == {"jax": "0", "torch": "2"}
    assert peers_table(result) in capsys.readouterr().out


def test_what_it_does_not_know_is_refused(capsys):
    with pytest.raises(SystemExit):
        peers.main(["--works", "resnet"])
    assert "--works: resnet; allowed: vit_b, vit_s, gpt_small" in capsys.readouterr().err


def test_a_side_that_dies_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers.sys, "executable", "false")
    assert peers.main(["--works", "vit_b", "--tiny"]) == 1
    assert "ended with status 1" in capsys.readouterr().err
