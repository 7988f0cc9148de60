"""The drift study measures what it says: exact in float64, converted forms that do not see the mean, baselines that do; its document is
made from its JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

from prenorm_jax import transforms
from prenorm_jax.measure import drift, drift_document
from prenorm_jax.norms import rms_norm

pytestmark = pytest.mark.slow  # on one Python

ROOT = Path(__file__).parents[2]
STUDY = drift.Study(16, (1, 2), tokens=4, vocabulary=8, head_dim=8, means=(0, 30), dtypes=("float64", "float32"))


@pytest.fixture(scope="module")
def rows():
    """(question, dtype, form, mean) -> row, with a form more: the control, whose writers keep their means."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(drift.FORMS, "control", drift.Form(transforms.fold_affine, rms_norm))
        patch.setattr(drift, "FORMS_OF", {question: tuple(drift.FORMS) for question in drift.FORMS_OF})
        patch.setattr(drift, "WITH_A_MEAN", [*drift.WITH_A_MEAN, "control"])
        found = drift.run(STUDY)
    return {(row["question"], row["dtype"], row["form"], row["mean"]): row for row in found}


CONVERTED = [name for name in drift.FORMS if not name.startswith("pre_ln")]


def test_in_float64_every_form_is_the_oracle_and_the_control_is_not(rows):
    for (_, dtype, form, mean), row in rows.items():
        if dtype == "float64" and form != "control":
            assert max(row["logits_max"]) < 1e-11, (form, mean)
            assert min(row["agreement"]) == 1
    assert min(rows["computation", "float64", "control", 30]["logits_rms"]) > 0.1


def test_converted_forms_do_not_see_the_mean_and_layer_norm_does(rows):
    def error(form, mean):
        return rows["computation", "float32", form, mean]["logits_rms"][-1]

    for form in CONVERTED:
        assert error(form, 30) < 2 * error(form, 0) < 1e-5
    assert error("pre_ln", 30) > 3 * error("pre_rmsnorm", 30)
    assert error("pre_ln, fast variance", 30) > 3 * error("pre_ln", 30)


def test_the_mean_is_where_it_was_put_after_every_layer(rows):
    for dtype in STUDY.dtypes:
        assert rows["computation", dtype, "pre_ln", 30]["stream_mean"] == pytest.approx([30] * 3, rel=0.5)
        rounding = {"float64": 1e-14, "float32": 1e-6}[dtype]
        assert max(rows["computation", dtype, "pre_rmsnorm", 30]["stream_mean"]) < rounding
    assert rows["computation", "float32", "pre_crmsnorm-reflect", 0]["stream_mean"] is None


def test_converting_a_stored_checkpoint_costs_one_rounding(rows):
    for form in CONVERTED:
        for mean in STUDY.means:
            assert 2**-30 < rows["checkpoint", "float32", form, mean]["logits_rms"][-1] < 2**-20
    assert rows["checkpoint", "float32", "pre_ln", 0]["logits_rms"][-1] == 0


def test_the_document_is_made_from_the_result(rows, tmp_path, capsys):
    study = {**dataclasses.asdict(STUDY), "rows": [row for row in rows.values() if row["form"] != "control"]}
    result = {"preset": "small", "device": "a device", "seconds": 1.0, "studies": [study]}
    (tmp_path / "small.json").write_text(json.dumps(result))
    assert drift.main(["--read", str(tmp_path / "small.json"), "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "drift.png").stat().st_size > 1000
    text = (tmp_path / "drift.md").read_text()
    error = rows["computation", "float32", "pre_crmsnorm-drop", 30]
    assert f"{error['logits_rms'][-1]:.1e}, {100 * error['agreement'][-1]:.1f} % |" in text
    assert "written" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["small", "--read", "x"], ["large"]])
def test_words_that_it_does_not_know(words, capsys):
    with pytest.raises(SystemExit):
        drift.main(words)
    assert "usage" in capsys.readouterr().err


def test_the_published_document_is_that_of_the_published_result():
    text = (ROOT / "docs/drift.md").read_text()
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "results/drift").glob("*.json"))]
    assert text in [drift_document.markdown(result, "drift.png") for result in results]
