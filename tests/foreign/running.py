"""Running the two foreign models: as they are, and converted."""

import contextlib
import dataclasses
import functools

import flax.linen as nn
import foreign_linen
import foreign_nnx
import jax
import jax.numpy as jnp
import numpy as np
from architecture import SIDE, VOCABULARY
from flax import nnx
from programs import LinenProgram, NNXProgram, Program

import prenorm_jax as pn
from prenorm_jax.paths import leaves, with_leaves

FORMS = {
    "rms": {"norm": "pre_rmsnorm"},
    "reflect": {"norm": "pre_crmsnorm"},
    "drop": {"norm": "pre_crmsnorm", "basis": "drop"},
    "packed": {"norm": "pre_crmsnorm", "layout": "packed"},
}
TRANSFORMS = {
    "rms": pn.to_pre_rmsnorm,
    "reflect": pn.to_pre_crmsnorm,
    "drop": functools.partial(pn.to_pre_crmsnorm, basis="drop"),
    "packed": lambda params, spec: pn.pack(pn.to_pre_crmsnorm(params, spec), spec),
}


def example(c, batch=2):
    if c.patches:
        return np.random.default_rng(0).normal(size=(batch, SIDE, SIDE, 3))
    return np.arange(batch * c.inputs).reshape(batch, c.inputs) % VOCABULARY


def randomized(shapes, seed=0, dtype=np.float64):
    """Everything random, all means far from 0; norm scales with a zero, a negative and a tiny entry."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        value = 0.3 + rng.normal(size=shape) * (0.5 if len(shape) < 2 else shape[-2] ** -0.5)
        if path.endswith("/scale"):
            value[..., :3] = np.array([0.0, -0.7, 1e-30])[: shape[-1]]
        return jnp.asarray(value, dtype)

    return with_leaves(shapes, {path: leaf(path, struct.shape) for path, struct in leaves(shapes).items()})


class Linen:
    """A Linen model of a config, or of an encoder's and a decoder's."""

    def __init__(self, *configs, **fields):
        self.configs, self.fields = configs, fields
        self.model = self._build(configs)

    def _build(self, configs):
        if isinstance(configs[0], Program):
            return LinenProgram(*configs)
        kind = foreign_linen.Transformer if len(configs) == 1 else foreign_linen.EncoderDecoder
        return kind(*configs, **self.fields)

    def params(self, *inputs, **kwargs):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        return randomized(jax.eval_shape(self.model.init, keys, *inputs)["params"], **kwargs)

    def run(self, params, *inputs):
        return self._apply(self.model, params, *inputs)

    def run_form(self, params, specs, form, *inputs, recentered=True, **fields):
        """Transformed parameters, in a model that is built for them."""
        lanes = 0 if form in ("rms", "packed") else 1
        # Linen's experts declare their biases, and have no use_bias
        declared = {"reader_bias": False} if form == "packed" and self.configs[0].mlp == "experts" else {}
        configs = [dataclasses.replace(c, width=c.width - lanes, **declared) for c in self.configs]
        model = type(self)(*configs, **{**self.fields, **fields}).model
        with contextlib.ExitStack() as stack:
            for spec in specs:
                stack.enter_context(
                    nn.intercept_methods(pn.intercept_norms(spec, recentered=recentered, **FORMS[form]))
                )
            return self._apply(model, params, *inputs)

    def converted(self, specs, form, **fields):
        """fn(Pre-LN parameters, *inputs), through that form."""

        def call(params, *inputs):
            for spec in specs:
                params = TRANSFORMS[form](params, spec)
            return self.run_form(params, specs, form, *inputs, **fields)

        return call

    def control(self, params, specs, *inputs):
        """RMSNorm behind writers that were not recentered."""
        original = written(params, specs)
        for spec in specs:
            params = pn.to_pre_rmsnorm(params, spec)
        params = with_leaves(params, {**leaves(params), **original})
        return self.run_form(params, specs, "rms", *inputs, recentered=False)

    def _apply(self, model, params, *inputs):
        return model.apply({"params": params}, *inputs, rngs={"dropout": jax.random.key(1)})


class NNX:
    """The same in NNX."""

    def __init__(self, *configs, **fields):
        kind = foreign_nnx.Transformer if len(configs) == 1 else foreign_nnx.EncoderDecoder
        self.configs, self.fields = configs, fields
        if isinstance(configs[0], Program):
            model = nnx.eval_shape(lambda: NNXProgram(*configs, nnx.Rngs(0), example(*configs)))
        else:
            model = nnx.eval_shape(lambda: kind(*configs, nnx.Rngs(0), **fields))
        self.graph, self.shapes, rest = nnx.split(model, nnx.Param, ...)
        self.rest = jax.tree.map(_rng_state, rest)

    def params(self, *inputs, **kwargs):
        return randomized(nnx.to_pure_dict(self.shapes), **kwargs)

    def model(self, params):
        flat = leaves(params)
        state = with_leaves(self.shapes, {path: flat.pop(path) for path in leaves(self.shapes)})
        assert not flat
        return nnx.merge(self.graph, state, jax.tree.map(jnp.asarray, self.rest))  # a copy: dropout counts in it

    def run(self, params, *inputs):
        return self.model(params)(*inputs)

    def run_form(self, params, specs, form, *inputs, **fields):
        """Parameters that are said to be transformed, in a model whose norms are swapped."""
        of = type(self)(*self.configs, **{**self.fields, **fields}) if fields else self
        model = of.model(of.params(*inputs))
        for spec in specs:
            model = pn.swap_norms(model, spec, params, **FORMS[form])
        return model(*inputs)

    def control(self, params, specs, *inputs):
        """RMSNorm behind writers that were not recentered."""
        model = self.model(params)
        for spec in specs:
            model = pn.swap_norms(model, spec)
        state = nnx.state(model, nnx.Param)
        nnx.update(model, with_leaves(state, {**leaves(state), **written(params, specs)}))
        return model(*inputs)

    def converted(self, specs, form, **fields):
        """fn(Pre-LN parameters, *inputs), through that form."""

        def call(params, *inputs):
            of = type(self)(*self.configs, **{**self.fields, **fields}) if fields else self
            model = of.model(params)
            for spec in specs:
                model = pn.swap_norms(model, spec, **FORMS[form])
            return model(*inputs)

        return call


def _rng_state(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape) if leaf.shape else jax.random.key(0)
    return jnp.zeros(leaf.shape, leaf.dtype)


def written(params, specs):
    """The leaves that write, as they are."""
    return {path: leaves(params)[path] for spec in specs for path, _ in spec.resolve(params).writers}


def unstacked(params, depth):
    """Stacked blocks -> looped ones: the same model."""
    blocks = {str(k): jax.tree.map(lambda leaf, k=k: leaf[k], params["blocks"]) for k in range(depth)}
    return {**params, "blocks": blocks}


APIS = {"linen": Linen, "nnx": NNX}


def worst(actual, expected):
    """The largest difference, over the largest expected entry."""
    gaps = [
        np.max(np.abs(a - b)) / np.max(np.abs(b))
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    return float(max(gaps))
