"""Every family that our models run: written by the reference library, imported, run by ours, and exported again."""

import pytest
from import_figures import REFERENCES, measure


@pytest.mark.parametrize("name", REFERENCES)
def test_an_import_is_the_reference_librarys_function_and_exports_bit_for_bit(name, tmp_path):
    figures = measure(name, tmp_path, variants=False)
    assert figures["float64"] <= 1e-9
    assert figures["float32, ours"] <= 2 * figures["float32, reference"]
    assert figures["bit for bit"]
