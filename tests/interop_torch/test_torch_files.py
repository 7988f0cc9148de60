"""Torch's own files: read as torch wrote them, never unpickled, converted to the same as their safetensors twins."""

import json
import os
import random

import ml_dtypes
import numpy as np
import pytest
import torch
from figures import convert, loaded
from models import MODELS, perturbed

from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.tensors import FormatError

STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    "b": torch.arange(4, dtype=torch.bfloat16),
    "half": torch.ones(2, dtype=torch.float16),
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
}


class Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [None, "model", "state_dict"])
def test_what_torch_saves_is_read(zipped, inside, tmp_path):
    whole = {inside: STATE, "step": 7, "args": {"lr": 1.0}} if inside else STATE
    torch.save(whole, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    found = checkpoint.read()
    assert set(found) == set(STATE)
    for name, value in STATE.items():
        assert found[name].shape == tuple(value.shape)
        assert np.array_equal(found[name].astype(np.float64), value.double().numpy()), name
    assert found["b"].dtype == ml_dtypes.bfloat16
    assert checkpoint.metadata.get("step") == (7 if inside else None)
    found["a.weight"][:] = 0
    assert checkpoint.tensors["a.weight"].read().any()


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled(zipped, tmp_path):
    torch.save({"a": torch.ones(2), "bomb": Bomb()}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match="can't load it with weights_only=True"):
        open_checkpoint(tmp_path / "x.bin")


def test_a_sparse_tensor_is_refused(tmp_path):
    torch.save({"a": torch.ones(2, 2).to_sparse()}, tmp_path / "x.bin")
    with pytest.raises(FormatError, match=r"sparse or quantised|can't load it"):
        open_checkpoint(tmp_path / "x.bin")


def test_a_dtype_that_numpy_has_not_is_refused(tmp_path):
    torch.save({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "m.bin")
    with pytest.raises(FormatError, match="tensor a is of dtype float8_e4m3fn; expected one that numpy has"):
        open_checkpoint(tmp_path / "m.bin")


def test_a_tensor_without_data_is_refused(tmp_path):
    torch.save({"a": torch.ones(2, device="meta")}, tmp_path / "m.bin")
    with pytest.raises(FormatError, match="tensor a was saved without its data"):
        open_checkpoint(tmp_path / "m.bin")


def test_damaged_files_are_refused(tmp_path):
    rng, messages = random.Random(0), []
    for zipped in (True, False):
        torch.save(STATE, tmp_path / "good.bin", _use_new_zipfile_serialization=zipped)
        good = (tmp_path / "good.bin").read_bytes()
        for number in range(300):
            data = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            if number % 3 == 0:
                del data[rng.randrange(len(data)) :]
            (tmp_path / "x.bin").write_bytes(data)
            try:
                open_checkpoint(tmp_path / "x.bin").read()
            except FormatError as error:
                messages.append(str(error))
    assert len(messages) > 200
    assert not any("\n" in message for message in messages)


def test_shards_of_torch_become_the_same_as_safetensors(tmp_path):
    model = perturbed(MODELS["gpt2"], torch.float32)
    model.save_pretrained(tmp_path / "twin")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((tmp_path / "twin" / "config.json").read_text())
    state = {name: leaf for name, leaf in model.state_dict().items() if name != "lm_head.weight"}
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    shards = [dict(list(state.items())[half::2]) for half in (0, 1)]
    for file, shard in zip(files, shards, strict=True):
        torch.save(shard, source / file)
    table = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    convert(source, tmp_path / "destination")
    convert(tmp_path / "twin", tmp_path / "other")
    found, expected = open_checkpoint(tmp_path / "destination").read(), open_checkpoint(tmp_path / "other").read()
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert len(list((tmp_path / "destination").glob("model-*.safetensors"))) == 2
    loaded("gpt2", tmp_path / "destination", torch.float32)
