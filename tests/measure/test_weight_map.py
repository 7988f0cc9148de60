"""The maps that are timed are those of a step, on trees that the shipped layouts cover, and the figures are where the tables say."""

import json

import jax
import numpy as np
import pytest

from prenorm_jax import models, transforms
from prenorm_jax.measure import weight_map
from prenorm_jax.measure.works import Work

pytestmark = pytest.mark.slow  # on one Python

CONFIG = models.ViTConfig(width=8, depth=1, heads=2, mlp_width=16, image_size=8, patch_size=4, classes=3)
GPT = models.GPTConfig(width=8, depth=1, heads=2, mlp_width=16, context=8, vocab_size=16)

WINDOWS = {"warmup_steps": 1, "window_steps": 1, "windows": 2}


@pytest.fixture(scope="module")
def result():
    jax.config.update("jax_disable_most_optimizations", True)  # 17 programs, each run four times
    try:
        steps = weight_map.measure_steps(Work("ViT-tiny", CONFIG, 2, "training"), **WINDOWS)
        baseline_ms = steps["steps"][weight_map.BASELINE]["ms"]
        return steps | {"maps": weight_map.measure_maps(CONFIG, baseline_ms, **WINDOWS)}
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("config", [CONFIG, GPT], ids=["vit", "gpt"])
def test_every_map_covers_its_tree_and_changes_it(config):
    for name, change, tree in weight_map.maps_of(config):
        params = weight_map.drawn(tree)
        mapped = jax.tree.map(np.asarray, change(params))
        assert jax.tree.map(np.shape, mapped) != jax.tree.map(np.shape, params) or any(
            np.any(a != b) for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(params), strict=True)
        ), name


def test_the_foreign_tree_has_as_many_parameters_as_ours():
    foreign = sum(leaf.size for leaf in jax.tree.leaves(weight_map.foreign_tree(CONFIG)))
    assert foreign == models.count(CONFIG)


def test_the_pull_back_that_is_timed_is_the_gradient():
    params = weight_map.drawn(models.abstract(CONFIG))
    spec = models.main_branch(CONFIG)
    case = weight_map.map_and_pull_back_case(lambda params: transforms.recenter(params, spec), params)
    mapped, pulled = case.step(case.carry)
    # Recentering is a projection, so its pull-back leaves alone what is recentered.
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(pulled), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert any(
        np.abs(a - b).max() > 1e-3 for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(mapped), strict=True)
    )


def test_each_row_is_held_against_its_native_step(result):
    steps = result["steps"]
    assert list(steps) == [
        "pre_ln, native",
        *(
            f"{norm}, {what}"
            for norm in weight_map.VARIANTS
            for what in ("native", "native again", "pre_ln coordinates")
        ),
    ]
    for norm in weight_map.VARIANTS:
        native, mapped = (steps[f"{norm}, {what}"] for what in ("native", "pre_ln coordinates"))
        assert native["ratio"] == (1, 1, 1)
        ratios = np.array(mapped["windows_s"]) / np.array(native["windows_s"])
        assert mapped["ratio"] == (pytest.approx(np.median(ratios)), ratios.min(), ratios.max())
    row = result["maps"]["foreign, to_pre_rmsnorm"]
    assert row["share"] == pytest.approx(row["ms"] / steps["pre_ln, native"]["ms"])
    assert f"| foreign, to_pre_rmsnorm | {row['ms']:.3f} | {row['share']:.2%} |" in weight_map.table(result)


def test_it_writes_what_it_measured(result, monkeypatch, tmp_path, capsys):
    path, steps = tmp_path / "found.json", {name: value for name, value in result.items() if name != "maps"}

    def measure_maps(config, baseline_ms, **windows):
        assert "maps" not in json.loads(path.read_text())  # the steps are safe by now
        assert baseline_ms == result["steps"][weight_map.BASELINE]["ms"]
        return result["maps"]

    monkeypatch.setattr(weight_map, "measure_steps", lambda timed, **windows: steps)
    monkeypatch.setattr(weight_map, "measure_maps", measure_maps)
    assert weight_map.main(["vit", "Ti/16", "--batch", "2", "--json", str(path)]) == 0
    assert json.loads(path.read_text()).keys() == result.keys()
    assert "| training step | ms |" in capsys.readouterr().out


def test_a_size_that_is_none_is_refused_in_one_line(capsys):
    assert weight_map.main(["gpt", "tiny", "--batch", "2"]) == 2
    assert "allowed: small" in capsys.readouterr().err
