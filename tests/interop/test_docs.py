import re

import pytest
from tables import PAGE, TABLES, filled, markdown

from prenorm_jax.interop.architectures import ARCHITECTURES
from prenorm_jax.interop.formats import SUFFIXES

TEXT = PAGE.read_text()


@pytest.mark.parametrize("name", TABLES)
def test_its_tables_are_made_from_json(name):
    assert markdown(name) in TEXT
    assert filled(TEXT) == TEXT
    assert filled(re.sub(r"^\|.*\d.*\n", "", TEXT, flags=re.M)) != re.sub(r"^\|.*\d.*\n", "", TEXT, flags=re.M)


def test_no_architecture_is_left_out():
    table = markdown("architectures")
    parts = {"clip_text_model": "clip", "clip_vision_model": "clip", "dinov2_with_registers": "dinov2, registers"}
    for name in ARCHITECTURES:
        assert re.search(rf"^\| {parts.get(name, name)}\b", table, re.M), name
    assert all(suffix in TEXT for suffix in SUFFIXES)
