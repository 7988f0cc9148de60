"""What is restored where: a damaged checkpoint gives way to the one before; another mesh, variant or coordinates give the same function."""

import dataclasses
import io
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
import small_experiment as small

from prenorm_jax import models
from prenorm_jax.fingerprints import fingerprint
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import charts, checkpoints, data, items, loop, metrics
from prenorm_jax.training.experiment import Experiment, Mesh

# Where a file of a checkpoint can't be read, TensorStore's threads report to an event loop that Orbax has closed by then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def train(experiment, workdir):
    console = rich.console.Console(file=io.StringIO(), width=300)
    return loop.train(experiment, workdir, console), console.file.getvalue()


def changed(experiment: Experiment, **sections) -> Experiment:
    return dataclasses.replace(
        experiment,
        **{name: dataclasses.replace(getattr(experiment, name), **fields) for name, fields in sections.items()},
    )


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A run of 12 steps with checkpoints at 5, 10 and 12."""
    root = tmp_path_factory.mktemp("finished")
    experiment = small.experiment(root / "library")
    params, _ = train(experiment, root / "run")
    return experiment, root / "run", params


@pytest.fixture
def run(finished, tmp_path):
    experiment, workdir, params = finished
    return experiment, shutil.copytree(workdir, tmp_path / "run"), params


# --- damage


def arrays(workdir: pathlib.Path, step: int) -> list[pathlib.Path]:
    """The files that hold the parameters' values, largest first."""
    found = (checkpoints.folder(workdir) / str(step) / "parameters").rglob("d/*")
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def flip_a_bit(path: pathlib.Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit flipped in each file": lambda run: [flip_a_bit(path, path.stat().st_size // 2) for path in arrays(run, 12)],
    "cut off": lambda run: [path.write_bytes(path.read_bytes()[:-20]) for path in arrays(run, 12)],
    "files gone": lambda run: [path.unlink() for path in arrays(run, 12)],
    "optimizer gone": lambda run: shutil.rmtree(checkpoints.folder(run) / "12" / "optimizer"),
    "stamp spoilt": lambda run: (checkpoints.folder(run) / "12" / "stamp" / "metadata").write_text("{"),
    "another position": lambda run: [
        path.write_text(path.read_text().replace('"step": 12', '"step": 11'))
        for path in (checkpoints.folder(run) / "12" / "position").iterdir()
        if path.is_file()
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_is_kept(run, how):
    experiment, workdir, params = run
    rows = metrics.read(workdir)
    DAMAGE[how](workdir)
    again, output = train(experiment, workdir)
    line = f"it is kept as {workdir / 'damaged' / '12'}, and the run goes on from 10"
    assert [
        said for said in output.splitlines() if said.startswith("warning: checkpoint 12 is damaged (") and line in said
    ]
    assert "resuming at step 10 of 12" in output
    assert (workdir / "damaged" / "12").is_dir()
    # And the run ends as if nothing had been.
    assert_same_bits(again, params)
    assert_same_bits(checkpoints.load(workdir).params, params)
    timings = {"step_seconds", "tokens_per_second"}
    clean = [
        [{k: v for k, v in row.items() if k not in timings} for row in some] for some in (rows, metrics.read(workdir))
    ]
    assert clean[0] == clean[1]


def test_evaluation_passes_over_a_damaged_checkpoint_and_moves_nothing(run):
    _, workdir, _ = run
    DAMAGE["a bit flipped in each file"](workdir)
    with pytest.warns(UserWarning, match=r"checkpoint 12 is damaged \(.*\); read is 10"):
        assert checkpoints.load(workdir).step == 10
    assert (checkpoints.folder(workdir) / "12").is_dir()


def test_where_none_can_be_read_nothing_is_moved_and_nothing_begins_anew(run):
    experiment, workdir, _ = run
    for step in (5, 10, 12):
        for path in arrays(workdir, step):
            path.unlink()
    with pytest.raises(
        ConfigError, match=r"none of the checkpoints of .* can be read \(12: .*; 10: .*; 5: .*\); left as they are"
    ):
        train(experiment, workdir)
    assert sorted(path.name for path in checkpoints.folder(workdir).iterdir()) == ["10", "12", "5"]


@pytest.mark.slow
def test_a_single_flipped_bit_is_seen_and_by_fingerprints_alone(run, monkeypatch):
    """The control: the format's own reader takes it for another weight."""
    _, workdir, params = run
    for step in (5, 10):
        shutil.rmtree(checkpoints.folder(workdir) / str(step))
    seen = 0
    for path in arrays(workdir, 12):
        content = path.read_bytes()
        for place in random.Random(0).sample(range(len(content)), 4):
            flip_a_bit(path, place)
            with monkeypatch.context() as blind:
                blind.setattr(items, "require_as_written", lambda *arguments: None)
                try:
                    assert_same_bits(checkpoints.load(workdir).params, params)
                except AssertionError:
                    seen += 1
                except ConfigError:  # its reader saw it
                    continue
                else:  # nothing is read from there
                    path.write_bytes(content)
                    continue
            with pytest.raises(ConfigError, match=r"can be read \(12: parameters/.* is not what was written"):
                checkpoints.load(workdir)
            path.write_bytes(content)
        path.write_bytes(content)
    assert seen >= 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int32", "bool"])
def test_a_fingerprint_sees_any_bit_and_not_the_mesh(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 6)) * 100, dtype)
    value = int(fingerprint(x))
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b")))
    assert int(fingerprint(split)) == value
    bits = np.array(x).view(np.uint8).reshape(-1)
    for place in rng.integers(len(bits), size=20):
        other = bits.copy()
        other[place] ^= 1 if dtype == "bool" else 1 << rng.integers(8)
        again = jnp.asarray(other.view(np.asarray(x).dtype).reshape(x.shape))
        assert int(fingerprint(again)) != value
    swapped = x.at[0, 0].set(x[5, 3]).at[5, 3].set(x[0, 0])
    assert int(fingerprint(swapped)) != value or bool(x[0, 0] == x[5, 3])


# --- another mesh


@pytest.mark.slow
def test_a_run_goes_on_over_eight_four_and_one_devices(tmp_path):
    def on(steps: int, **mesh: int) -> Experiment:
        experiment = small.experiment(tmp_path / "library", steps=steps, batch_size=8, eval_batch_size=8)
        optimizer = dataclasses.replace(experiment.optimizer, average=0.5)
        return dataclasses.replace(experiment, mesh=Mesh(**mesh), optimizer=optimizer)

    losses = []
    stages = [on(4, data=2, fsdp=2, tensor=2), on(8, data=1, fsdp=4), on(12, data=1)]
    workdir = tmp_path / "run"
    for experiment in stages:
        params, output = train(experiment, workdir)
        if losses:
            assert "resuming at step" in output
        loaded = checkpoints.load(workdir)
        # What was saved from this mesh is, on one device, bit for bit what it held.
        assert_same_bits(loaded.params, params)
        held_out = data.load(experiment).held_out
        found = loop.evaluate(on(12, data=1), held_out, models.running(loaded.params, experiment.model))
        losses.append((metrics.read(workdir)[-1]["loss"], found["loss"]))
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-6)
    train(on(12, data=1), tmp_path / "whole")
    rows = [
        [row["loss"] for row in metrics.read(path) if row["kind"] == "train"] for path in (workdir, tmp_path / "whole")
    ]
    assert len(rows[0]) == 12
    # The learning rate of a shorter run is another one, so the first stage alone is comparable.
    assert rows[0][0] == pytest.approx(rows[1][0], rel=1e-6)
    assert losses[-1][0] != losses[0][0]


# --- other variants and coordinates


PACKED = {"norm": "pre_crmsnorm", "basis": "reflect", "layout": "packed"}


def held_out_loss(experiment: Experiment, loaded: checkpoints.Loaded) -> float:
    running = models.running(loaded.params, experiment.model, loaded.coordinates)
    return loop.evaluate(experiment, data.load(experiment).held_out, running)["loss"]


@pytest.mark.slow
def test_in_pre_ln_coordinates_the_variant_changes_and_the_run_goes_on_exactly(tmp_path):
    experiment = small.experiment(tmp_path / "library", steps=12, checkpoint_every=4)
    plain = changed(experiment, model={"norm": "pre_ln"})
    train(plain, tmp_path / "whole")
    workdir, losses = tmp_path / "run", []
    variants = ({"norm": "pre_ln"}, PACKED, {"norm": "pre_ln"})
    for steps, variant in zip((4, 8, 12), variants, strict=True):
        here = changed(experiment, model=variant)
        if workdir.exists():
            before = checkpoints.load(workdir)
            losses.append((held_out_loss(here, before), held_out_loss(plain, before)))
            assert losses[-1][0] == pytest.approx(losses[-1][1], rel=1e-6)
        _until(here, workdir, steps)  # on the schedule of the whole
    rows = [
        [row["loss"] for row in metrics.read(path) if row["kind"] == "train"] for path in (workdir, tmp_path / "whole")
    ]
    np.testing.assert_allclose(rows[0], rows[1], rtol=2e-5)
    assert len(rows[0]) == 12
    # The control: other moments are another trajectory.
    assert abs(rows[0][0] - rows[0][-1]) > 0.1


def _until(experiment: Experiment, workdir: pathlib.Path, steps: int) -> None:
    """Trains up to a step as if a signal had come there."""
    from prenorm_jax.training.interrupts import Interrupted, Interrupts

    class Stop(Interrupts):
        def stop_behind(self, step):
            return 15 if step == steps else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Interrupts", Stop)
        if steps == experiment.train.steps:
            train(experiment, workdir)
        else:
            with pytest.raises(Interrupted):
                train(experiment, workdir)
    assert checkpoints.load(workdir).step == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "now"),
    [
        (({"norm": "pre_ln"}, "pre_ln"), (PACKED, "native")),
        ((PACKED, "native"), ({"norm": "pre_ln"}, "pre_ln")),
    ],
    ids=["to packed pre_crmsnorm", "and back"],
)
def test_other_coordinates_are_refused_and_mapped_where_that_is_asked_for(tmp_path, then, now):
    experiment = small.experiment(tmp_path / "library", checkpoint_every=0)
    first = changed(experiment, model=then[0], train={"coordinates": then[1]})
    other = changed(experiment, model=now[0], train={"coordinates": now[1], "steps": 16})
    workdir = tmp_path / "run"
    train(first, workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"in other coordinates \(trained are .*config.train.restart_optimizer=True"
    ) as error:
        train(other, workdir)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before

    as_it_was = held_out_loss(first, checkpoints.load(workdir))
    mapped = checkpoints.load(workdir, into=other)
    assert held_out_loss(other, mapped) == pytest.approx(as_it_was, rel=1e-5)
    again = changed(other, train={"restart_optimizer": True})
    params, output = train(again, workdir)
    assert "optimizer begins anew at step 12: trained are the parameters of" in output
    assert checkpoints.load(workdir).step == 16
    assert jax.tree.structure(params) == jax.tree.structure(models.init(other.model, 0, other.train.coordinates))
    # The learning rate goes on: it is that of the 13th step.
    row = next(row for row in metrics.read(workdir) if row["kind"] == "train" and row["step"] == 13)
    whole = loop._Run(again, data.load(again)).learning_rates
    assert row["learning_rate"] == pytest.approx(float(whole[12]))
    # It is new once: what goes on from here goes on with its own moments.
    _, output = train(changed(again, train={"steps": 18}), workdir)
    assert "begins anew" not in output


CHARTS = {
    "pre_ln": ({"norm": "pre_ln"}, "native"),
    "pre_rmsnorm": ({"norm": "pre_rmsnorm"}, "native"),
    "reflect": (PACKED, "native"),
    "drop": ({"norm": "pre_crmsnorm", "basis": "drop"}, "native"),
    "theta": ({"norm": "pre_rmsnorm"}, "pre_ln"),
}


def test_from_any_coordinates_to_any_others_the_function_stays(random_params, tmp_path):
    experiment = small.experiment(tmp_path / "library")
    experiments = {
        name: changed(
            experiment, model={**model, "dtype": "float64", "param_dtype": "float64"}, train={"coordinates": c}
        )
        for name, (model, c) in CHARTS.items()
    }
    theta = random_params(experiments["theta"].model)
    tokens = np.arange(32).reshape(2, 16)

    def logits(params, where):
        model = where.model
        return models.apply(model, models.running(params, model, where.train.coordinates), tokens)[0]

    expected = logits(theta, experiments["theta"])
    for then in experiments.values():
        params = charts.mapped(theta, experiments["theta"], then)
        for now in experiments.values():
            there = charts.mapped(params, then, now)
            np.testing.assert_allclose(logits(there, now), expected, atol=1e-10)
            assert (charts.differ(then, now) is None) == (there is params)
    # The control: parameters under another chart's name are another function.
    wrong = logits(charts.mapped(theta, experiments["theta"], experiments["drop"]), experiments["reflect"])
    assert np.abs(wrong - expected).max() > 1e-3


@pytest.mark.slow
def test_parameters_of_pre_rmsnorm_that_left_the_zero_mean_have_no_equal(tmp_path):
    experiment = changed(small.experiment(tmp_path / "library"), train={"coordinates": "native"})
    train(experiment, tmp_path / "run")
    other = changed(experiment, train={"coordinates": "pre_ln", "restart_optimizer": True})
    with pytest.raises(
        ConfigError, match=r"config.train.coordinates: the checkpoint's parameters are pre_rmsnorm's own, and can't"
    ):
        train(other, tmp_path / "run")


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_another_in_its_own_coordinates(run, tmp_path):
    experiment, workdir, _ = run
    other = changed(experiment, model=PACKED, train={"coordinates": "native", "init_from": str(workdir), "steps": 20})
    loaded = checkpoints.load(workdir)
    begun = loop._Run(other, data.load(other)).initial_state()
    there = held_out_loss(other, checkpoints.Loaded(other, "native", begun.params, 0))
    assert there == pytest.approx(held_out_loss(experiment, loaded), rel=1e-5)
    assert int(begun.step) == 0
    wider = changed(other, model={"mlp_width": 48})
    with pytest.raises(ConfigError, match=r"config.train.init_from: config.model.mlp_width: 32 -> 48"):
        loop._Run(wider, data.load(wider)).initial_state()


def test_a_run_goes_on_without_what_it_began_with(run, tmp_path):
    experiment, workdir, _ = run
    shutil.copytree(workdir, tmp_path / "first")
    begun = changed(experiment, train={"init_from": str(tmp_path / "first"), "steps": 4})
    train(begun, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    train(changed(begun, train={"steps": 6}), tmp_path / "second")
    assert checkpoints.load(tmp_path / "second").step == 6
    with pytest.raises(ConfigError, match=r"config\.train\.init_from: "):
        train(begun, tmp_path / "third")


def test_another_optimizer_is_refused_and_begins_anew_where_that_is_asked_for(run):
    experiment, workdir, _ = run
    for fields, said in (({"name": "lamb"}, "lamb"), ({"average": 0.9}, "adamw with a moving average")):
        now = changed(experiment, optimizer=fields, train={"steps": 13})
        message = (
            rf"holds the state of another optimizer \(adamw, and now would be {said}\).*train\.restart_optimizer=True"
        )
        with pytest.raises(ConfigError, match=message):
            train(now, workdir)
    _, out = train(changed(now, train={"restart_optimizer": True}), workdir)
    assert "optimizer begins anew at step 12: " in out
    assert metrics.read(workdir)[-1]["step"] == 13


def test_a_restarted_optimizer_has_no_moments_and_its_learning_rate_goes_on(tmp_path):
    experiment = changed(small.experiment(tmp_path / "library"), optimizer={"average": 0.9})
    tx = loop._Run(experiment, data.load(experiment)).tx
    params = models.init(experiment.model, 0)
    other = jax.tree.map(lambda x: x + 1, params)
    state = charts.restarted(tx.init(params), other, 7)
    counts = optax.tree_utils.tree_get_all_with_path(state, "count")
    assert sorted(int(value) for _, value in counts) == [0, 7]
    assert_same_bits(optax.tree.get(state, "average"), other)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(optax.tree.get(state, "mu")))
