"""One device against several: every case is there and finite, sets of options are read, what can't be is one line."""

import json

import pytest

from prenorm_jax.measure import __main__ as command
from prenorm_jax.measure import devices
from prenorm_jax.models import config

TINY = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32}


@pytest.mark.slow
def test_two_devices_against_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(config.VIT_SIZES, "tiny", TINY)
    path = tmp_path / "devices.json"
    flags = ["devices", "vit", "tiny/112", "--per-device", "2", "--windows", "2", "--window-seconds", "0.01"]
    assert command.main([*flags, "--json", str(path)]) == 0
    [result] = json.loads(path.read_text())["on_devices"]
    assert list(result["rows"]) == [
        "one device",
        "one device again",
        "each by itself",
        "data, default",
        "fsdp, default",
    ]
    assert "all-reduce" in result["rows"]["data, default"]["collectives"]
    assert "all-gather" in result["rows"]["fsdp, default"]["collectives"]
    assert not result["rows"]["one device"]["collectives"]
    assert devices.table(result) in capsys.readouterr().out
    assert command.main(["print", str(path)]) == 0
    assert devices.table(result) in capsys.readouterr().out


def test_sets_of_options_are_joined():
    assert devices.chosen("overlap+memcpy") == devices.OPTIONS["overlap"] | devices.OPTIONS["memcpy"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "9"], "--devices: got 9; allowed: at most the 8 there are"),
        (["--options", "fast"], "--options: got 'fast'; allowed: default, overlap"),
        (["--meshes", "model"], "--meshes: got 'model'; allowed: data, fsdp, tensor"),
    ],
)
def test_what_can_not_be_is_one_line(flags, message, capsys):
    assert command.main(["devices", "gpt", "small", "--per-device", "1", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"prenorm_jax.measure: {message}")
