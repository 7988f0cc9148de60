"""Every architecture: written by the reference library, converted, and run by the reference library again."""

import pytest
from figures import holds, measure
from models import MODELS


@pytest.mark.parametrize("fold", [False, True], ids=["", "fold"])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_checkpoint_is_the_same_function(name, fold, tmp_path):
    figures = measure(name, tmp_path, fold=fold)
    assert holds(figures), figures
