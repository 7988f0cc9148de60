import numpy as np
import pytest
import small

from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.plan import RefusedError, make_plan
from prenorm_jax.main_branch import LayoutError


def plan(folder, tensors=None, config=None, **options):
    return make_plan(open_checkpoint(small.write(folder, tensors, config)), **options)


def test_a_tied_table_gets_a_head_of_its_own(tmp_path):
    found = plan(tmp_path / "m")
    assert found.untied == ("lm_head.weight", "transformer.wte.weight")
    assert found.config["tie_word_embeddings"] is False
    assert "transformer.wte.weight" in found.recenters
    assert "lm_head.weight" not in found.recenters


def test_or_stays_and_what_it_looks_up_is_recentered(tmp_path):
    found = plan(tmp_path / "m", keep_tied=True)
    assert found.untied is None
    assert found.recentered == {
        "transformer.h.0": "the embedding table is tied to the head, so that it can't be recentered"
    }
    assert not {"transformer.wte.weight", "transformer.wpe.weight"} & set(found.recenters)


def test_a_model_without_a_head_says_that_its_table_is_none(tmp_path):
    """A language model made of it later would read the recentered table as its head."""
    config = {**small.CONFIG, "architectures": ["GPT2Model"]}
    found = plan(tmp_path / "m", config=config)
    assert found.untied is None
    assert "transformer.wte.weight" in found.recenters
    assert found.config["tie_word_embeddings"] is False
    kept = plan(tmp_path / "n", config=config, keep_tied=True)
    assert "tie_word_embeddings" not in kept.config
    assert "transformer.wte.weight" not in kept.recenters


def test_eps_is_the_config_s(tmp_path):
    found = plan(tmp_path / "m", config={**small.CONFIG, "layer_norm_epsilon": 1e-6})
    assert {norm["eps"] for norm in found.norms.values()} == {1e-6}


def test_the_names_of_the_bare_model_are_known(tmp_path):
    bare = {name.removeprefix("transformer."): value for name, value in small.gpt2().items()}
    assert set(plan(tmp_path / "m", bare).tensors) == {*small.gpt2(), "lm_head.weight"}


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_a_wrapper_s_names_are_told_from_another_architecture_s(wrapper, tmp_path):
    wrapped = {wrapper + name: value for name, value in small.gpt2().items()}
    with pytest.raises(RefusedError, match=f"all names begin with '{wrapper}', .*; save the tensors without it"):
        plan(tmp_path / "m", wrapped)


def test_two_names_of_one_tensor_are_refused(tmp_path):
    names = ("decoder.decoder_encoder.layer.0.x", "decoder.decoder_layers.0.x")
    config = {"model_type": "vit_mae"}
    with pytest.raises(LayoutError, match="are two names of one tensor"):
        plan(tmp_path / "m", {"vit.y": np.ones(2), **dict.fromkeys(names, np.ones(2))}, config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "beit", "architectures": ["BeitBackbone"]},
        {"model_type": "dinov2", "architectures": ["Dinov2Backbone"], "apply_layernorm": False},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_backbone_that_returns_its_main_branch_is_refused(config, tmp_path):
    with pytest.raises(RefusedError, match="the feature maps that it returns are its main branch as it is"):
        plan(tmp_path / "m", config=config)


@pytest.mark.parametrize("name", ["phimoe", "xlm-roberta-xl"])
def test_no_reason_is_given_that_is_not_so(name, tmp_path):
    with pytest.raises(RefusedError, match="is not known"):  # Pre-LN models, both of them
        plan(tmp_path / "m", config={**small.CONFIG, "model_type": name})


def test_a_config_that_says_null_for_a_quantisation_has_none(tmp_path):
    assert plan(tmp_path / "m", config={**small.CONFIG, "quantization_config": None}).recenters
