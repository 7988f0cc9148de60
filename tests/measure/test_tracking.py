"""The timed forms follow the reference's losses, and what should not follow them is seen."""

import json

import pytest

from prenorm_jax import models
from prenorm_jax.measure import __main__ as command
from prenorm_jax.measure import tracking, works
from prenorm_jax.models.config import ConfigError

pytestmark = pytest.mark.slow

GPT = models.GPTConfig(
    width=32, depth=2, heads=2, mlp_width=64, context=16, vocab_size=50, dtype="bfloat16", scan_layers=True, unroll=True
)
WORK = works.Work("GPT Tiny", GPT, 8, "training", "pre_ln")


@pytest.fixture(scope="module")
def tracked():
    return tracking.measure(WORK, 40, say=print, threads=2, learning_rate=3e-4)


def test_every_form_follows_the_reference_and_the_control_does_not(tracked):
    assert tracked["losses"].keys() == {
        "reference",
        *tracking.PLAIN,
        *(form.name for form in tracking.FORMS),
        "control",
    }
    # Nudged by less than a rounding: other draws of one size, no other model (the control is twenty times as far).
    found = tracking.misses(tracked["losses"])
    draws = [found[name] for name in tracking.PLAIN]
    assert len(set(draws)) == len(draws)
    assert max(draws) < 3 * min(draws)
    first, *_, last = tracked["losses"]["reference"]
    assert last < first - 0.03  # it learns
    assert tracking.passes(tracked)


def test_a_form_that_leaves_the_reference_is_seen(tracked):
    losses = {**tracked["losses"], "pre_rmsnorm": tracked["losses"]["control"]}
    assert not tracking.passes({**tracked, "losses": losses})
    losses = {**tracked["losses"], "control": tracked["losses"]["plain, nudged"]}  # a check that sees nothing
    assert not tracking.passes({**tracked, "losses": losses})


def test_results_are_kept_beside_each_other_and_printed(tracked, tmp_path):
    path = tmp_path / "tracking.json"
    tracking.save({**tracked, "tracked": "another"}, path)
    tracking.save(tracked, path)
    tracking.save(tracked, path)
    held = json.loads(path.read_text())
    assert [each["tracked"] for each in held["tracking"]] == ["another", WORK.key]
    text = command.tables(held)[1]
    assert text == tracking.table(tracked)
    assert "| pre_crmsnorm-reflect |" in text


@pytest.mark.parametrize(
    ("work", "steps", "line"),
    [
        (works.Work("GPT Tiny", GPT, 8, "inference"), 40, r"work\.kind: got 'inference'"),
        (WORK, 3, "--steps: got 3"),
    ],
)
def test_what_can_not_be_tracked_is_one_line(work, steps, line):
    with pytest.raises(ConfigError, match=line):
        tracking.measure(work, steps, say=print)
