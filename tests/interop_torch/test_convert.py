"""Every architecture: written by the reference library, converted, and run by the reference library again."""

import pytest
from figures import measure
from models import MODELS


@pytest.mark.parametrize("fold", [False, True], ids=["", "fold"])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_checkpoint_is_the_same_function(name, fold, tmp_path):
    figures = measure(name, tmp_path, fold=fold)
    assert figures["layer_norm"] < 1e-9
    assert figures["rms_norm"] < 1e-9
    assert figures["unconverted"] > 1e-3  # RMSNorm on the weights as they were is another function
    assert figures.get("not_recentered", 1) > 1e-3
    assert figures["float32_after"] < 2 * figures["float32_before"]
