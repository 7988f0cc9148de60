import small

from prenorm_jax.interop.formats import open_checkpoint
from prenorm_jax.interop.plan import make_plan


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


def test_eps_is_the_config_s(tmp_path):
    found = plan(tmp_path / "m", config={**small.CONFIG, "layer_norm_epsilon": 1e-6})
    assert {norm["eps"] for norm in found.norms.values()} == {1e-6}


def test_the_names_of_the_bare_model_are_known(tmp_path):
    bare = {name.removeprefix("transformer."): value for name, value in small.gpt2().items()}
    assert set(plan(tmp_path / "m", bare).tensors) == {*small.gpt2(), "lm_head.weight"}
