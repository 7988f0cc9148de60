"""A study's file: what it holds, that it goes on where it stopped, what its tables say; a profile by part beside its floors."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import models
from prenorm_jax.measure import __main__ as command
from prenorm_jax.measure import pictures, profile, study, works
from prenorm_jax.measure.equivalence import PRE_LN, Form
from prenorm_jax.models.config import ConfigError
from prenorm_jax.training import counts
from prenorm_jax.training.experiment import Mesh

pytestmark = pytest.mark.slow  # on one Python

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {"width": 8, "depth": 1, "heads": 2, "mlp_width": 16}
GPT = models.GPTConfig(**SIZES, context=4, vocab_size=11, vocab_multiple=4, dtype="bfloat16")
VIT = models.ViTConfig(**SIZES, image_size=4, patch_size=2, channels=1, classes=3, dtype="bfloat16")
TRAINING = works.Work("GPT Tiny", GPT, 2, "training")
INFERENCE = works.Work("ViT-Tiny", VIT, 1, "inference")
DECODING = works.Work("GPT Tiny", GPT, 1, "decoding")
FORMS = ("pre_ln", "pre_ln again", "pre_crmsnorm-reflect")
STUDY = study.Study("tiny", (INFERENCE, TRAINING), FORMS, windows=3, window_seconds=0.001, latency_calls=2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of two calls, the first of which had time for one work, and what the first left."""
    out = tmp_path_factory.mktemp("study") / "speed" / "tiny.json"
    left = study.run(study.dataclasses.replace(STUDY, works=(INFERENCE,)), out, say=lambda text: None)
    first = out.read_text()
    said = []
    assert study.run(STUDY, out, threads=2, say=said.append) == left == []
    assert [line for line in said if line.endswith(" ...")] == [f"{TRAINING.key} ..."]  # the other was there already
    result = json.loads(out.read_text())
    assert result["entries"][0] == json.loads(first)["entries"][0]
    return out, result


def test_an_entry_says_what_was_measured_and_how(measured):
    _, result = measured
    assert {"device", "versions", "xla_flags", "compiler_options", "commands"} <= set(result)
    inference, training = result["entries"]
    assert (inference["key"], training["key"]) == (INFERENCE.key, TRAINING.key)
    assert (training["per_step"], training["unit"]) == (8, "tokens")
    for entry in result["entries"]:
        assert list(entry["rows"]) == list(FORMS)
        assert entry["rows"]["pre_ln"]["ratio"] == [1.0, 1.0, 1.0]
        for row in entry["rows"].values():
            assert len(row["windows_s"]) == 3
            assert row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2]
            assert row["peak_bytes"] > 1000
            assert row["compile_s"] > 0
            assert row["finite"]
            assert row["mfu"] is None  # nobody knows this CPU's peak
            assert row["per_second"] == pytest.approx(entry["per_step"] / np.median(row["windows_s"]))
    assert "latency_s" not in training["rows"]["pre_ln"]
    single = inference["rows"]["pre_ln"]["latency_s"]
    assert 0 < single["p50"] <= single["p95"]


def test_the_tables_and_pictures_of_a_file(measured, tmp_path, capsys):
    out, result = measured
    assert command.main(["print", str(out), "--plot", str(tmp_path / "tiny")]) == 0
    printed = capsys.readouterr().out
    assert study.table(result) in printed
    assert study.details(result) in printed
    assert f"| {TRAINING.key} | pre_crmsnorm-reflect |" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.png", "tiny_roofline.png"}
    guide = tmp_path / "guide.md"
    guide.write_text(f"# Guide\n\n<!-- {out} -->\nold\n<!-- end -->\n")
    assert command.main(["print", str(out), "--into", str(guide)]) == 0
    assert study.table(result) in guide.read_text()
    assert "old" not in guide.read_text()
    guide.write_text("no place for it")
    assert command.main(["print", str(out), "--into", str(guide)]) == 2
    known = {**result, "device": "NVIDIA H200"}  # with roofs
    pictures.roofline(known, tmp_path / "roofs.png")


def test_decoding_is_one_token_of_each_sequence_in_the_memory_of_its_cache():
    entry = study.measure(DECODING, STUDY)
    assert (entry["key"], entry["per_step"]) == ("GPT Tiny, batch 1 x 4, decoding", 1)
    assert all("latency_s" in row for row in entry["rows"].values())
    case = DECODING.case(PRE_LN)
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(models.empty_cache(GPT, 1)))
    assert case.compiled.memory_analysis().alias_size_in_bytes >= cache
    products = 2 * 1 * (4 * 8 * 8 + 2 * 8 * 16 + 8 * 12)
    found = DECODING.operations(PRE_LN)
    assert sum(each.full for each in found) == sum(each.causal for each in found) == products + 4 * 8 * 4
    assert [each.bytes for each in found if each.part == "attention"] == [(2 + 2 * 4) * 8 * 2]
    with pytest.raises(ConfigError, match=r"work\.kind: got 'decoding'; allowed: decoding for a GPT"):
        works.Work("ViT-Tiny", VIT, 1, "decoding")


def test_a_file_of_another_device_is_not_continued(measured, tmp_path):
    _, result = measured
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**result, "device": "another"}))
    with pytest.raises(ConfigError, match="was measured with device = 'another'"):
        study.run(STUDY, other, say=print)


def test_a_profile_and_the_peers_print_too(tmp_path):
    row = {"instruction": "gemm", "part": "matrix products", "ms": 2.0, "calls": 1.0, "scope": "mlp"}
    floors = {"matrix products": 1.5, "GELU": 0.25}
    found = {"work": "w", "form": "f", "device": "d", "jax": "0", "kernels": [row], "floor_ms_by_part": floors}
    head, text = command.tables(found)
    assert head == "w, f, d, jax 0"
    assert "| matrix products | 2.00 | 100.0% | 1.50 |" in text
    assert "| GELU | 0.00 | 0.0% | 0.25 |" in text
    rows = {"theirs": {"name": "p", "windows_s": [0.02, 0.03]}, "ours": {"pre_ln": {"windows_s": [0.01, 0.01]}}}
    (text,) = command.tables({"device": "d", "versions": {"jax": "0"}, "peers": [{"work": "w", **rows}]})
    assert text.endswith("| w | p | 25.00 | pre_ln | 10.00 | 2.500 (2.000 to 3.000) |")


def test_no_work_is_begun_that_would_end_too_late(tmp_path):
    assert study.run(STUDY, tmp_path / "none.json", seconds=-1, say=print) == [INFERENCE.key, TRAINING.key]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path",
    sorted(path for path in (ROOT / "configs").glob("*.py") if "def get_study" in path.read_text()),
    ids=lambda path: path.stem,
)
def test_the_studies_in_configs(path):
    found = study.read_study(str(path))
    keys = [work.key for work in found.works]
    assert len(set(keys)) == len(keys)
    assert found.forms[1] == "pre_ln again"
    assert found.forms[-1] == "no_norm"
    first = found.only((found.works[0].name,))
    assert {work.name for work in first.works} == {found.works[0].name}
    one = found.only((found.works[0].name, f"batch {found.works[0].batch}", found.works[0].kind))
    assert {work.batch for work in one.works} == {found.works[0].batch}
    with pytest.raises(ConfigError, match="--only"):
        found.only(("no such work",))


@pytest.mark.parametrize("coordinates", ["native", "pre_ln"])
@pytest.mark.parametrize("form", [Form("pre_ln"), Form("pre_crmsnorm", "drop"), Form("no_norm")], ids=lambda f: f.name)
def test_random_parameters_have_the_shapes_of_the_real_ones(form, coordinates):
    work = works.Work("GPT Tiny", GPT, 2, "training", coordinates)
    real = jax.eval_shape(lambda: models.init(work.config(form), 0, coordinates))
    found = work.params(form)
    assert jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(jnp.float32)), real) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), found
    )
    assert all(len(np.unique(np.asarray(leaf))) > leaf.size // 2 for leaf in jax.tree.leaves(found))


def test_operations_are_those_of_the_shapes():
    """Against sums written out by hand for a GPT of width 8, 4 tokens, one layer, two sequences; attention by both conventions."""
    found = counts.operations(GPT, 2)
    products = 2 * 8 * (4 * 8 * 8 + 2 * 8 * 16 + 8 * 12)  # 8 rows; the vocabulary padded to 12
    assert sum(each.full for each in found) == 3 * (products + 4 * 8 * 2 * 16)
    assert sum(each.causal for each in found) == 3 * (products + 4 * 8 * 2 * 10)
    norms = [each.bytes for each in found if each.part == "norms and residuals"]
    assert norms == [2 * 3 * 8 * 8 * 2, 4 * 3 * 8 * 8 * 2]
    assert {each.part for each in found} <= {part for part, _ in profile.PARTS}
    without = counts.operations(Form("no_norm").of(GPT), 2)
    assert sum(each.bytes for each in found) - sum(each.bytes for each in without) > sum(
        norms
    )  # the affine's parameters
    one = counts.Operation("loss", causal=790e12, bytes=8.6e12)
    assert counts.floors([one, one]) == {"loss": pytest.approx(4000)}


def test_a_profile_sums_the_kernels_of_a_step():
    kernels = profile.profile_work(TRAINING, PRE_LN, steps=2)
    assert kernels
    assert all(kernel.ms > 0 for kernel in kernels)
    parts = profile.by_part(kernels)
    assert sum(parts.values()) == pytest.approx(sum(kernel.ms for kernel in kernels))
    assert {"matrix products", "optimizer"} <= set(parts)
    exchange = "exchange between devices"
    assert exchange not in parts
    assert exchange in profile.by_part(profile.profile_work(TRAINING, PRE_LN, steps=1, mesh=Mesh(data=8)))
    text = profile.table(kernels, floors=counts.floors(TRAINING.operations(PRE_LN)))
    assert "| part | ms | share | floor, ms |" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["time", "nowhere.py", "--out", "x.json"], "CONFIG: got 'nowhere.py'; allowed: an existing Python file"),
        (["time", f"{ROOT}/configs/digits.py", "--out", "x.json"], "CONFIG: got "),
        (["profile", "vit", "Q/16", "--batch", "1"], "model.variant's size: got 'Q'"),
        (["print", "nowhere.json"], "nowhere.json: not as train.py, eval.py or `time` writes it"),
    ],
)
def test_a_mistake_is_one_line(arguments, line, capsys):
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.removeprefix("prenorm_jax.measure: ").startswith(line)
    assert err.count("\n") == 1
