"""What goes wrong where LayerNorm is turned into RMSNorm elsewhere, fault by fault, and what happens here.

The faults were found in public tools by reading and running them; each test names the tool and its public thread where there is one.
They are about what the tools do, not about who wrote them.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import prenorm_jax as pn
from prenorm_jax import MainBranch, Norm, Reader, Writer
from prenorm_jax.transforms import require_recentered

D, V = 8, 7
TOKENS = jnp.array([[1, 2, 6, 3], [5, 1, 0, 2]])
EXACT = 1e-10


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The programs are small and run once: compiling them is what takes the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


DRAWS = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def draws(monkeypatch):
    """Every test draws the same numbers, whatever ran before it."""
    monkeypatch.setitem(globals(), "DRAWS", np.random.default_rng(0))


def normal(*shape):
    return jnp.asarray(0.3 + DRAWS.normal(size=shape))


def linear(rows, columns):
    return {"kernel": normal(rows, columns), "bias": normal(columns)}


def affine():
    return {"scale": normal(D), "bias": normal(D)}


def block():
    return {"norm": affine(), "up": linear(D, 9), "down": linear(9, D)}


def tree():
    """Two blocks between a table and a head, every leaf with a mean."""
    return {"embed": normal(V, D), "0": block(), "1": block(), "norm": affine(), "head": linear(D, 3)}


BLOCK = Norm([Reader("{i}/up/kernel", bias="{i}/up/bias")], scale="{i}/norm/scale", bias="{i}/norm/bias")
WRITERS = [Writer("embed"), Writer("{i}/down/kernel"), Writer("{i}/down/bias")]
SPEC = MainBranch(WRITERS, [BLOCK, Norm([Reader("head/kernel", bias="head/bias")], "norm/scale", "norm/bias")], width=D)


def row(leaf):
    return leaf[None, None]


def apply_affine(y, p):
    y = y * row(p["scale"]) if "scale" in p else y
    return y + row(p["bias"]) if "bias" in p else y


def layer_norm(x, p=None, eps=1e-5):
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps)
    return apply_affine(y, p or {})


def rms_norm(x, p=None, eps=1e-5):
    return apply_affine(x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps), p or {})


def dense(p, x):
    y = x @ p["kernel"]
    return y + row(p["bias"]) if "bias" in p else y


def blocks(params, x, norm):
    for i in ("0", "1"):
        p = params[i]
        x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(x, p.get("norm")))))
    return x


def gpt(params, tokens, norm=layer_norm):
    return dense(params["head"], norm(blocks(params, params["embed"][tokens], norm), params.get("norm")))


def missed(actual, expected):
    """The largest difference, relative to the largest entry; NaN where there is one."""
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def same(actual, expected):
    return missed(actual, expected) <= EXACT


def test_a_gamma_of_zero():
    """Brevitas, and two tools with the same rule, divide beta by gamma: one zero makes every output NaN. Nothing is divided here."""
    params = tree()
    for norm in (params["0"]["norm"], params["1"]["norm"], params["norm"]):
        norm["scale"] = norm["scale"].at[:2].set(jnp.array([0.0, -1e-300]))
    expected = gpt(params, TOKENS)
    assert same(gpt(pn.to_pre_rmsnorm(params, SPEC), TOKENS, rms_norm), expected)
    out = pn.convert(gpt, params, TOKENS, fold=True)
    assert out.report.folded
    assert same(out.fn(out.params, TOKENS), expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        divided = np.asarray(params["norm"]["bias"]) / np.asarray(params["norm"]["scale"])
    assert not np.all(np.isfinite(divided))  # what dividing would have met


def test_a_layer_norm_behind_the_embedding():
    """Brevitas (and Quark and LightCompress, on BLOOM) drop the beta of a norm behind the embedding: outputs are wrong by 2.2. Its affine
    output has a mean that no weight can lose; one explicit recentering of that activation is exact."""
    params = {**tree(), "first": affine()}

    def fn(params, tokens, norm=layer_norm, start=lambda x: x):
        x = start(layer_norm(params["embed"][tokens], params["first"]))
        return dense(params["head"], norm(blocks(params, x, norm), params.get("norm")))

    expected = fn(params, TOKENS)
    out = pn.convert(fn, params, TOKENS)
    assert out.report.converted == 4  # the one behind the embedding, too: the table can be recentered
    assert len(out.report.activations) == 1
    assert same(out.fn(out.params, TOKENS), expected)

    spec = MainBranch(WRITERS[1:], SPEC.norms, others=["embed", "first/*"], width=D)
    described = pn.to_pre_rmsnorm(params, spec)
    recentered = functools.partial(fn, norm=rms_norm, start=lambda x: x - x.mean(-1, keepdims=True))
    assert same(recentered(described, TOKENS), expected)
    assert missed(fn(described, TOKENS, rms_norm), expected) > 1e-3  # without that recentering


def test_a_relu_between_writer_and_norm():
    """Brevitas converts Linear -> ReLU -> LayerNorm by a rule for scale invariance; the ReLU's output has a mean again. Refused here, with
    the reason."""
    params = {"in": linear(5, D), "head": linear(D, 3)}

    def fn(params, x, norm=layer_norm):
        return dense(params["head"], norm(jnp.maximum(dense(params["in"], x), 0.0)))

    x = normal(2, 3, 5)
    with pytest.raises(pn.ConversionError, match=r"no LayerNorm was converted(.|\n)*kept .*it does not pay"):
        pn.convert(fn, params, x)
    with pytest.raises(pn.ConversionError, match=r"no LayerNorm was converted(.|\n)*max"):
        pn.convert(fn, params, x, activations="never")
    wrong = MainBranch([Writer("in/kernel"), Writer("in/bias")], [Norm([Reader("head/kernel", bias="head/bias")])])
    assert missed(fn(pn.to_pre_rmsnorm(params, wrong), x, rms_norm), fn(params, x)) > 1e-3  # what is refused
    with pytest.raises(pn.LayoutError, match=r"in/(kernel|bias) .*described as a writer"):
        wrong.check(fn, params, x)


def test_writers_that_are_no_linear_layer():
    """Brevitas converts nothing, and says nothing, where a position parameter, a concatenated class token, a convolution or a LayerScale
    writes. Converted here, and the report says so norm by norm."""
    params = {
        "patch": {"kernel": normal(2, 2, 3, D), "bias": normal(D)},
        "class": normal(1, 1, D),
        "position": normal(1, 5, D),
        "0": {**block(), "lambda": normal(D)},
        "norm": affine(),
        "head": linear(D, 3),
    }

    def fn(params, images):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(images, params["patch"]["kernel"], (2, 2), "VALID", dimension_numbers=dims)
        x = (x + row(params["patch"]["bias"])[None]).reshape(len(images), -1, D)
        x = jnp.concatenate([jnp.broadcast_to(params["class"], (len(x), 1, D)), x], 1) + params["position"]
        p = params["0"]
        h = dense(p["down"], jax.nn.gelu(dense(p["up"], layer_norm(x, p["norm"]))))
        return dense(params["head"], layer_norm(x + row(p["lambda"]) * h, params["norm"])[:, :1])

    images = normal(2, 4, 4, 3)
    out = pn.convert(fn, params, images)
    assert [site.converted for site in out.report.sites] == [True, True]
    assert {path for path, _ in out.report.leaves} >= {"patch/kernel", "patch/bias", "class", "position"}
    assert out.report.absorbed == ("0/lambda",)
    assert same(out.fn(out.params, images), fn(params, images))
    assert missed(out.fn(params, images), fn(params, images)) > 1e-3


@pytest.mark.parametrize("leaves", [("scale",), ("bias",), ()])
def test_a_norm_without_bias_or_affine(leaves):
    """Brevitas stops with an exception at a LayerNorm that has no bias, or neither scale nor bias."""
    params = tree()
    for holder in (params["0"], params["1"], params):
        holder["norm"] = {name: holder["norm"][name] for name in leaves}
    expected = gpt(params, TOKENS)
    assert same(gpt(pn.to_pre_rmsnorm(params, SPEC), TOKENS, rms_norm), expected)
    assert missed(gpt(pn.fold_affine(params, SPEC), TOKENS, rms_norm), expected) > 1e-3
    compact = pn.compress(params, SPEC)
    crms_norm = functools.partial(pn.crms_norm, eps=1e-5)
    assert same(gpt(compact, TOKENS, lambda x, p: crms_norm(x)), expected)


def test_a_tied_head():
    """QuaRot left a tied head tied and outputs changed (issue 30, mended by PR 17). Tied is a choice here, exact either way; a table
    described as writer and reader at once is refused."""
    params = tree()
    del params["head"]

    def tied(params, tokens, norm=layer_norm, start=lambda x: x):
        return norm(blocks(params, start(params["embed"][tokens]), norm), params.get("norm")) @ params["embed"].T

    expected = tied(params, TOKENS)
    kept = Norm(scale="norm/scale", bias="norm/bias", keep="tied table")
    stays = MainBranch(WRITERS[1:], [BLOCK, kept], others=["embed"], width=D)
    recentered = functools.partial(tied, norm=rms_norm, start=lambda x: x - x.mean(-1, keepdims=True))
    assert same(recentered(pn.to_pre_rmsnorm(params, stays), TOKENS), expected)

    untied = {**params, "head": {"kernel": params["embed"].T}}
    assert same(gpt(pn.to_pre_rmsnorm(untied, SPEC), TOKENS, rms_norm), expected)

    both = MainBranch(WRITERS, [BLOCK, Norm([Reader("embed", axis=-1)], "norm/scale", "norm/bias")], width=D)
    with pytest.raises(pn.LayoutError, match=r"embed .*covered by writer .* and by reader .*untie it, or keep"):
        pn.to_pre_rmsnorm(params, both)

    out = pn.convert(tied, params, TOKENS)
    assert out.report.converted == 3
    assert same(out.fn(out.params, TOKENS), expected)


def test_a_model_that_has_rms_norms_already():
    """QuaRot and SpinQuant recenter the embeddings of LLaMA, whose RMSNorm sees the mean: the function changes (perplexity 6.8 where 6.5
    was right, as a user measured). Its main branch is not behind LayerNorm: refused."""
    params = tree()
    llama = functools.partial(gpt, norm=rms_norm)
    with pytest.raises(pn.ConversionError, match="no LayerNorm was converted"):
        pn.convert(llama, params, TOKENS)
    out = pn.convert(llama, params, TOKENS, partial=True)
    assert out.report.sites == ()
    assert out.report.leaves == ()
    assert same(out.fn(out.params, TOKENS), llama(params, TOKENS))
    with pytest.raises(
        pn.LayoutError, match=r"its mean along the main branch is .*only a recentered model has a Pre-LN"
    ):
        require_recentered(params, SPEC)
    with pytest.raises(pn.LayoutError, match="is it an RMSNorm model already"):
        SPEC.check(llama, params, TOKENS)
    with pytest.raises(pn.ManifestError, match="chart: got pre_rmsnorm, but"):
        pn.manifest(params, SPEC, "pre_rmsnorm", eps=1e-5)
    assert missed(llama(pn.recenter(params, SPEC), TOKENS), llama(params, TOKENS)) > 1e-3  # what is refused


class OfTwoEps(nnx.Module):
    """One main branch, two norms, each with an eps of its own."""

    def __init__(self, rngs, eps=(1e-3, 1e-12)):
        self.write = nnx.Linear(5, D, rngs=rngs)
        self.n0, self.n1 = (nnx.LayerNorm(D, epsilon=e, use_bias=False, rngs=rngs) for e in eps)
        self.r0, self.r1 = (nnx.Linear(D, 3, use_bias=False, rngs=rngs) for _ in eps)

    def __call__(self, x):
        y = self.write(x)
        return self.r0(self.n0(y)) + self.r1(self.n1(y))


def test_every_norm_keeps_its_eps_and_statistics_are_wide():
    """SliceGPT's and QuaRot's RMSNorm have eps = 1e-5 written in, and QuaRot takes statistics in bfloat16. Here eps belongs to each norm,
    and statistics are float32 or wider."""
    params = tree()

    def fn(params, tokens):
        x = params["embed"][tokens] * 0.01  # small, so that eps shows
        p = params["0"]
        x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], layer_norm(x, p["norm"], 1e-3))))
        return dense(params["head"], layer_norm(x, params["norm"], 1e-12))

    out = pn.convert(fn, params, TOKENS)
    assert same(out.fn(out.params, TOKENS), fn(params, TOKENS))
    norms = [Norm(n.readers, n.scale, n.bias, eps=eps) for n, eps in zip(SPEC.norms, (1e-3, 1e-12), strict=True)]
    made = pn.manifest(params, MainBranch(WRITERS, norms))
    assert [made["norms"][f"{name}/scale"]["eps"] for name in ("0/norm", "1/norm", "norm")] == [1e-3, 1e-3, 1e-12]

    model, z = OfTwoEps(nnx.Rngs(0)), 0.01 * normal(2, 5)
    spec = MainBranch(
        [Writer("write/kernel"), Writer("write/bias")], [Norm([Reader(f"r{i}/kernel")], f"n{i}/scale") for i in (0, 1)]
    )
    assert missed(pn.swap_norms(model, spec)(z), model(z)) < 1e-5
    assert missed(model(z), OfTwoEps(nnx.Rngs(0), eps=(1e-5, 1e-5))(z)) > 1e-3  # so that eps shows

    x = jnp.full((1, 4096), 3.0, jnp.bfloat16).at[0, :64].set(200.0)
    exact = np.asarray(x, np.float64) / np.sqrt(np.square(np.asarray(x, np.float64)).mean())
    assert missed(np.asarray(pn.rms_norm(x, eps=0.0), np.float64), exact) < 2**-8  # one rounding, of the result
    one_by_one = jax.lax.scan(lambda total, entry: (total + entry * entry, None), jnp.bfloat16(0), x[0])[0]
    assert float(jnp.abs(one_by_one - 64 * 200.0**2 - 4032 * 9.0)) > 0.01 * 64 * 200.0**2  # a sum in bfloat16 stalls


def test_an_unknown_architecture():
    """auto-round and llm-compressor fall back to a LLaMA layout where they don't know a model. An error here, naming the leaves."""
    for layout in (pn.layouts.GPT, pn.layouts.HF_FLAX_GPT2, pn.layouts.HAIKU_GPT, pn.layouts.vision_transformer()):
        with pytest.raises(pn.LayoutError, match=r"matches nothing in the tree; its paths are like 0/down/bias"):
            pn.to_pre_rmsnorm(tree(), layout)
    with pytest.raises(pn.LayoutError, match=r"2/adapter .*no rule covers it; name it as a writer"):
        pn.to_pre_rmsnorm({**tree(), "2": {"adapter": normal(D)}}, SPEC)


def test_the_orientation_of_a_kernel():
    """A kernel taken the wrong way round was folded silently in TransformerLens (PR 1580), and QuaRot's users ask which axis it is (issue
    57). The axis is part of the description here; a wrong one is shown by the shape, and where the kernel is square by the check."""
    wrong = MainBranch([*WRITERS[:1], Writer("{i}/down/kernel", axis=-2), *WRITERS[2:]], SPEC.norms, width=D)
    with pytest.raises(pn.LayoutError, match=r"found several: 8 in .*; 9 in 0/down/kernel .9, 8. axis -2"):
        pn.to_pre_rmsnorm(tree(), wrong)

    square = tree()
    for i in ("0", "1"):
        square[i] |= {"up": linear(D, D), "down": linear(D, D)}
    assert missed(gpt(pn.to_pre_rmsnorm(square, wrong), TOKENS, rms_norm), gpt(square, TOKENS)) > 1e-3
    with pytest.raises(
        pn.LayoutError, match=r"down/kernel .8, 8.: described as a writer along axis -2.*axis -1: is that"
    ):
        wrong.check(gpt, square, TOKENS)
    SPEC.check(gpt, square, TOKENS)


def test_a_layer_that_is_skipped():
    """Some layers of a model were left out without a word (TransformerLens PR 1670). Here a report says what became of each norm, and
    nothing converted at all is an error unless that was asked for."""
    params = {**tree(), "pooled": affine(), "pool": linear(D, D), "end": linear(D, 3)}

    def fn(params, tokens):
        x = blocks(params, params["embed"][tokens], layer_norm)
        pooled = jax.nn.relu(dense(params["pool"], layer_norm(x, params["norm"])))
        return dense(params["end"], layer_norm(pooled, params["pooled"]))

    out = pn.convert(fn, params, TOKENS)
    assert [site.converted for site in out.report.sites] == [True, True, True, False]
    assert "it does not pay" in out.report.sites[-1].reason
    assert same(out.fn(out.params, TOKENS), fn(params, TOKENS))

    def bare(params, tokens):
        return layer_norm(jax.nn.relu(params["embed"][tokens]))

    with pytest.raises(pn.ConversionError, match="partial=True accepts that"):
        pn.convert(bare, {"embed": normal(V, D)}, TOKENS)
    assert pn.convert(bare, {"embed": normal(V, D)}, TOKENS, partial=True).report.converted == 0
    first = MainBranch([Writer("embed"), Writer("0/down/kernel"), Writer("0/down/bias")], SPEC.norms)
    with pytest.raises(pn.LayoutError, match=r"1/down/bias .*no rule covers it"):
        pn.to_pre_rmsnorm(tree(), first)


def test_twice_and_back():
    """Applied twice, TransformerLens's processing changes weights again, and there is no way back (its own documentation says so). Here
    twice is once, and `to_pre_ln` goes back."""
    params = tree()
    once = pn.to_pre_rmsnorm(params, SPEC)
    twice = pn.to_pre_rmsnorm(once, SPEC)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-15 * D)
    for converted in (once, pn.to_pre_crmsnorm(params, SPEC), pn.to_pre_crmsnorm(once, SPEC)):
        assert same(gpt(pn.to_pre_ln(converted, SPEC), TOKENS), gpt(params, TOKENS))
    with pytest.raises(pn.LayoutError, match=r"the main branch has 7 lanes; expected the nominal width 8"):
        pn.to_pre_crmsnorm(pn.to_pre_crmsnorm(params, SPEC), SPEC)


def test_what_a_checkpoint_holds():
    """Whether a checkpoint was folded already is not known from its file (TransformerLens issues 223, 526, 557, 693; SAELens issue 279).
    A manifest says it here, and is held against the tree. (That each file carries one is tested where files are written.)"""
    params = tree()
    charts = {
        "pre_ln": params,
        "pre_rmsnorm": pn.to_pre_rmsnorm(params, SPEC),
        "pre_crmsnorm": pn.to_pre_crmsnorm(params, SPEC),
    }
    made = {chart: json.dumps(pn.manifest(of, SPEC, chart, eps=1e-5)) for chart, of in charts.items()}
    for chart, text in made.items():
        pn.check_manifest(json.loads(text), charts[chart], SPEC)
        for other in set(charts) - {chart}:
            with pytest.raises(pn.ManifestError):
                pn.check_manifest(json.loads(text), charts[other], SPEC)
    assert set(json.loads(made["pre_ln"])) >= {"chart", "coordinates", "norms", "computation", "storage", "prenorm_jax"}


def test_a_mean_in_low_precision():
    """Folded models collapsed in bfloat16 (QuaRot issue 8), and users asked how far rounding drifts (TransformerLens issues 104, 496).
    Here the converted forms don't see the mean, and the drift is measured and published, dtype by dtype."""
    params = tree()
    params["embed"] = params["embed"] - params["embed"].mean(-1, keepdims=True) + 100.0
    expected = gpt(params, TOKENS)

    def in_bfloat16(params, norm):
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return np.asarray(gpt(low, TOKENS, lambda x, p: norm(x, p["scale"], p["bias"], eps=1e-5)), np.float64)

    error = {
        form: missed(in_bfloat16(of, norm), expected)
        for form, of, norm in [
            ("pre_ln", params, pn.layer_norm),
            ("pre_rmsnorm", pn.to_pre_rmsnorm(params, SPEC), pn.rms_norm),
        ]
    }
    assert error["pre_rmsnorm"] < 0.02
    assert error["pre_ln"] > 5 * error["pre_rmsnorm"]

    published = sorted((Path(__file__).parents[1] / "results/drift").glob("*.json"))
    rows = [row for path in published for study in json.loads(path.read_text())["studies"] for row in study["rows"]]
    assert {row["dtype"] for row in rows} >= {"float32", "bfloat16", "float16"}
