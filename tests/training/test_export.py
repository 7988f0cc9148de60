"""Every form of a ViT and a GPT lowers for a TPU, in both coordinates; what has no rule there is found."""

import dataclasses

import jax
import pytest

from prenorm_jax.models import attention
from prenorm_jax.training import export

SMALL = {"width": 64, "depth": 1, "heads": 2, "mlp_width": 128}


@pytest.mark.slow
@pytest.mark.parametrize("coordinates", ["pre_ln", "native"])
@pytest.mark.parametrize("size", ["S/16", "small"])
def test_every_form_lowers_for_a_tpu(size, coordinates):
    fields = {"image_size": 32} if "/" in size else {"context": 32, "vocab_size": 300}
    for index, (name, config) in enumerate(export.shipped((size,), **SMALL, **fields)):
        # Looped and stacked layers in turn: three forms each, which differ in more than that.
        lowered = export.lower(dataclasses.replace(config, scan_layers=index % 2 == 1), coordinates)
        for step in lowered.values():
            assert step.platforms == ("tpu",), name
            assert "stablehlo.dot_general" in step.mlir_module()


def test_what_a_tpu_has_no_rule_for_is_found(monkeypatch, capsys):
    def attend(q, k, v, **_):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    monkeypatch.setattr(attention, "attend", attend)
    one = next(export.shipped(("S/16",), **SMALL, image_size=32))
    monkeypatch.setattr(export, "shipped", lambda **_: [one])
    assert export.main([]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_word_that_no_line_holds_is_one_line(capsys):
    assert export.main(["--only", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("prenorm_jax.training.export: --only: got 'nothing'; allowed:")
