import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow  # on one Python


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return fuzz.Room(tmp_path_factory.mktemp("room"))


@given(kind=st.sampled_from(list(fuzz.KINDS)), source=st.randoms(use_true_random=False))
@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
def test_a_hostile_file_is_read_whole_or_refused(room, kind, source):
    room.check(kind, fuzz.KINDS[kind](source.randrange))


def test_random_ones_are_of_both_sorts(room):
    counts = fuzz.run(1000, seed=1, room=room)
    assert all(count["accepted"] > 5 and count["refused"] > 50 for count in counts.values())


def test_the_check_sees_memory_and_crashes(room, monkeypatch):
    good = fuzz.safetensors_file(
        *[made if i == 0 else bytes(made) for i, made in enumerate(fuzz.header_of({"a": (2, 3)}))]
    )
    assert room.check("safetensors", good)
    opened = fuzz.open_checkpoint
    monkeypatch.setattr(fuzz, "open_checkpoint", lambda path: (bytearray(4 << 20), opened(path))[1])
    with pytest.raises(AssertionError, match="bytes for a file of"):
        room.check("safetensors", good)
    monkeypatch.setattr(fuzz, "open_checkpoint", lambda path: {}["a crash"])
    with pytest.raises(KeyError):
        room.check("safetensors", good)
