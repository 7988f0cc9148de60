"""Every architecture in every library: all norms are converted, exactly, with the same gradients, and half of the reductions go."""

import matrix
import pytest
from architectures import ARCHITECTURES
from libraries import LIBRARIES

TOLERANCE = 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_cell(library, architecture):
    wanted, cell = ARCHITECTURES[architecture], matrix.measured(library, architecture)
    assert cell["converted"] == cell["norms"] == wanted.norms
    assert cell["activations"] == wanted.added
    assert cell["difference"] <= TOLERANCE
    assert cell["gradients"] <= TOLERANCE
    assert cell["control"] > 1e-4
    for before, after in (cell["reductions"], cell["in_the_jaxpr"]):
        assert after - wanted.added <= before / 2
    assert cell["reductions"] == [2 * wanted.norms, wanted.norms + wanted.added]


def test_the_table_has_every_cell(tmp_path):
    cell = {"converted": 3, "norms": 3, "reductions": [6, 3], "difference": 1e-15, "gradients": 2e-15, "control": 0.1}
    docs = tmp_path / "docs.md"
    docs.write_text(f"before\n{matrix.START}old{matrix.END}\nafter")
    matrix.write({library: dict.fromkeys(ARCHITECTURES, cell) for library in LIBRARIES}, docs)
    text = docs.read_text()
    assert text.count("3 of 3, 6 -> 3") == len(LIBRARIES) * len(ARCHITECTURES)
    assert text.startswith("before")
    assert "old" not in text
