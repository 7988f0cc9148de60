import numpy as np
import pytest
import small

from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.plan import RefusedError, make_plan
from prenorm_jax.main_branch import LayoutError


def plan(folder, tensors=None, config=None, **options):
    return make_plan(open_checkpoint(small.write(folder, tensors, config)), **options)


def without(name):
    return {key: value for key, value in small.gpt2().items() if not key.startswith(name)}


def replaced(name, value):
    return {**small.gpt2(), name: value}


OTHER_HEAD = {**small.gpt2(), "lm_head.weight": np.ones((small.VOCABULARY, small.WIDTH), np.float32)}
REFUSALS = {
    "llama": (None, {"model_type": "llama"}, "its norms are RMSNorms already"),
    "bert": (None, {"model_type": "bert"}, r"\(Post-LN\)"),
    "opt-350m": (
        None,
        {"model_type": "opt", "do_layer_norm_before": False},
        r"do_layer_norm_before=False can't be converted",
    ),
    "opt without a last norm": (None, {"model_type": "opt", "_remove_final_layer_norm": True}, "without a final norm"),
    "bloom": (None, {"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, r"\(Post-LN\)"),
    "unknown": (None, {"model_type": "mystery"}, "'mystery' is not known, and nothing is guessed"),
    "no type": (None, {}, "has no model_type"),
    "quantised": (None, {**small.CONFIG, "quantization_config": {}}, "is quantised"),
    "width": (None, {**small.CONFIG, "n_embd": 16}, "n_embd is 16; the tensors have a main branch of 8"),
    "more layers": (None, {**small.CONFIG, "n_layer": 3}, r"n_layer is 3; layer 2 has no transformer.h.\{i\}"),
    "fewer layers": (None, {**small.CONFIG, "n_layer": 1}, "n_layer is 1; 1 is the layer of a"),
    "vocabulary": (None, {**small.CONFIG, "vocab_size": 12}, "vocab_size is 12"),
    "untied": (None, {**small.CONFIG, "tie_word_embeddings": False}, "has no such tensor; one of the two is wrong"),
    "tied": (OTHER_HEAD, None, "says that lm_head.weight is tied to transformer.wte.weight, and the two differ"),
    "types": (None, {**small.CONFIG, "n_layer": "many"}, "n_layer is 'many'; expected a positive integer"),
    "eps": (None, {**small.CONFIG, "layer_norm_epsilon": -1}, "expected a number above 0"),
    "int8": (
        replaced("transformer.h.0.mlp.c_proj.weight", np.ones((32, 8), np.int8)),
        None,
        "is int8; expected float64",
    ),
    "a norm lost": (without("transformer.h.1.ln_1"), None, "layer 1 has no transformer.h.{i}.ln_1.weight"),
    "a writer lost": (without("transformer.h.1.mlp.c_proj.weight"), None, "layer 1 has no"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_can_t_be_converted_is_refused_with_the_reason(case, tmp_path):
    tensors, config, message = REFUSALS[case]
    with pytest.raises(RefusedError, match=message) as refused:
        plan(tmp_path / "m", tensors, config)
    assert "\n" not in str(refused.value)


def test_a_tensor_without_a_role_is_refused(tmp_path):
    with pytest.raises(LayoutError, match=r"transformer.h.0.extra \(8,\): gpt2 has no such tensor"):
        plan(tmp_path / "m", replaced("transformer.h.0.extra", np.ones(8, np.float32)))


def test_a_writer_of_another_width_is_refused(tmp_path):
    with pytest.raises(LayoutError, match="one main branch has one width"):
        plan(tmp_path / "m", replaced("transformer.wpe.weight", np.ones((5, 9), np.float32)))


def test_no_config_is_refused(tmp_path):
    folder = small.write(tmp_path / "m")
    (folder / "config.json").unlink()
    with pytest.raises(RefusedError, match="is missing"):
        make_plan(open_checkpoint(folder))


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


def test_eps_is_the_config_s(tmp_path):
    found = plan(tmp_path / "m", config={**small.CONFIG, "layer_norm_epsilon": 1e-6})
    assert {norm["eps"] for norm in found.norms.values()} == {1e-6}


def test_the_names_of_the_bare_model_are_known(tmp_path):
    bare = {name.removeprefix("transformer."): value for name, value in small.gpt2().items()}
    assert set(plan(tmp_path / "m", bare).tensors) == {*small.gpt2(), "lm_head.weight"}
