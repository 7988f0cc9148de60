"""Windows are interleaved and compared within a round; the comparison at the end of a run says what it should and times what trains."""

import dataclasses
import io
import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from prenorm_jax import measure, models
from prenorm_jax.measure import comparison, step_time
from prenorm_jax.training.experiment import Compare, Data, Experiment, Optimizer, Train

EXPERIMENT = Experiment(
    task="language_modelling",
    model=models.GPTConfig(width=16, depth=1, heads=2, mlp_width=32, context=8, vocab_size=20, vocab_multiple=8),
    data=Data(name="synthetic", examples=16),
    optimizer=Optimizer(warmup_steps=1),
    train=Train(steps=4, batch_size=4, eval_batch_size=4),
    compare=Compare(warmup_steps=1, window_steps=2, windows=3),
)


def test_windows_take_turns_and_chain_their_state(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: next(clock))
    calls = []

    def step(name):
        return lambda carry: calls.append((name, carry)) or carry + 1

    cases = {name: step_time.Case(step(name), 0) for name in "AB"}
    times = step_time.interleaved(cases, warmup_steps=1, window_steps=2, windows=2)
    assert calls == [("A", 0), ("B", 0), *[(n, c) for w in (1, 3) for n in "AB" for c in (w, w + 1)]]
    assert times["A"].windows == (0.5, 0.5)


def test_ratios_are_taken_within_a_round():
    slow_second_round = step_time.Times((1.0, 10.0, 1.0)), step_time.Times((0.5, 5.0, 0.6))
    median, least, greatest = slow_second_round[1].against(slow_second_round[0])
    assert (median, least, greatest) == (0.5, 0.5, 0.6)


def test_what_is_timed_is_the_step_that_trains():
    params = models.init(EXPERIMENT.model, 0)
    kept = jax.tree.map(np.array, params)
    for coordinates in ("pre_ln", "native"):
        config = dataclasses.replace(EXPERIMENT.model, norm="pre_crmsnorm")
        tx = comparison.make_optimizer(EXPERIMENT.optimizer, 4)
        batch = next(comparison.data.train_batches(comparison.data.load(EXPERIMENT).train, EXPERIMENT.data, 4))
        own = models.native(params, config) if coordinates == "native" else params
        case = step_time.training_case(config, own, comparison.task_of(EXPERIMENT), tx, batch, coordinates=coordinates)
        before = jax.tree.map(np.array, case.carry.params)
        case.run(2)
        assert int(case.carry.step) == 2
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, case.carry.params)
        assert all(jax.tree.leaves(moved["blocks"]["0"]["mlp"]))
    # The parameters that a case begins from are the caller's still, though the step takes its state's memory.
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), kept, params)))


@pytest.mark.slow
def test_compare_writes_the_answers_and_the_times(tmp_path, capsys):
    result = measure.compare_variants(EXPERIMENT, models.init(EXPERIMENT.model, 0), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.md", "compare.png"}
    assert json.loads((tmp_path / "compare.json").read_text())["answers"] == result["answers"]
    assert list(result["answers"]) == ["pre_ln", "pre_rmsnorm", "pre_crmsnorm-reflect", "pre_crmsnorm-drop"]
    for row in result["answers"].values():
        assert row["same_predictions"] == row["predictions"] == 2 * 8
    assert list(result["times"]) == list(comparison.WORKS)
    for row in result["times"].values():
        assert list(row) == list(step_time.TIMED)
        assert all(len(found["windows_s"]) == 3 for found in row.values())
        assert row["pre_ln"]["ratio"] == (1.0, 1.0, 1.0)
    printed = capsys.readouterr().out
    assert (tmp_path / "compare.md").read_text() in printed
    with Image.open(io.BytesIO((tmp_path / "compare.png").read_bytes())) as picture:
        assert picture.size[0] > 1000


def test_a_model_that_left_zero_mean_is_not_called_a_pre_ln_model(tmp_path, capsys, monkeypatch):
    canned = {"inference": {name: step_time.Times((1.0, 1.0)) for name in step_time.TIMED}}
    monkeypatch.setattr(comparison, "timings", lambda experiment, params: canned)
    train = dataclasses.replace(EXPERIMENT.train, coordinates="native")
    config = dataclasses.replace(EXPERIMENT.model, norm="pre_rmsnorm")
    experiment = dataclasses.replace(EXPERIMENT, model=config, train=train)
    params = models.init(config, 0, "native")
    comparison.params_in_pre_ln(experiment, params)  # as converted: fine
    params["position"]["table"] = params["position"]["table"] + 1.0
    result = measure.compare_variants(experiment, params, tmp_path)
    assert result["answers"] == {}
    assert "position/table" in result["no_answers"]
    assert "No equivalence table" in capsys.readouterr().out
