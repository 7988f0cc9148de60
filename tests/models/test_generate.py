"""Generation with a cache is the argmax of full forward passes, token by token; all variants say the same; sampling is reproducible."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax import models
from prenorm_jax.models import ConfigError, GPTConfig
from prenorm_jax.models.generate import decode, generate, prefill

VARIANTS = {
    "pre_ln": {"norm": "pre_ln"},
    "pre_rmsnorm": {"norm": "pre_rmsnorm"},
    "reflect packed": {"norm": "pre_crmsnorm"},
    "reflect compact": {"norm": "pre_crmsnorm", "layout": "compact"},
    "drop packed": {"norm": "pre_crmsnorm", "basis": "drop"},
    "drop compact": {"norm": "pre_crmsnorm", "basis": "drop", "layout": "compact"},
}
# 11 tokens padded to 16: an eleventh part of what is drawn blindly would be padding
CONFIG = GPTConfig(
    width=8,
    depth=2,
    heads=2,
    mlp_width=16,
    context=10,
    vocab_size=11,
    vocab_multiple=16,
    dtype="float64",
    param_dtype="float64",
)
PROMPT = jnp.array([[1, 2, 3], [4, 5, 10]], jnp.int32)


def setting(random_params, variant="pre_ln", **fields):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant], **fields)
    params = random_params(dataclasses.replace(config, scan_layers=False))
    # large tables and small biases: otherwise it would always be the same token
    factors = {"bias": 0.05, "table": 5.0}
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * factors.get(path[-1].key, 1.0), params)
    params = models.stack_layers(params) if config.scan_layers else params
    return config, jax.jit(functools.partial(models.running, config=config))(params)


def by_full_passes(config, params):
    """Greedy tokens without a cache: the whole sequence again for each one, padded to the context so that it compiles once."""
    logits = jax.jit(lambda tokens: models.apply(config, params, tokens)[0])
    tokens = np.zeros((2, config.context), np.int32)
    tokens[:, :3] = PROMPT
    for end in range(3, config.context):
        tokens[:, end] = np.argmax(logits(tokens)[:, end - 1, : config.vocab_size], axis=-1)
    return tokens


@pytest.fixture(scope="module")
def expected(random_params):
    return {tied: by_full_passes(*setting(random_params, tied=tied)) for tied in (True, False)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("tied", "scan"), [(True, False), (False, True)], ids=["tied loop", "untied scan"])
def test_greedy_generation_is_the_argmax_of_full_passes_in_every_variant(random_params, expected, variant, tied, scan):
    config, params = setting(random_params, variant, tied=tied, scan_layers=scan)
    np.testing.assert_array_equal(generate(config, params, PROMPT, 7), expected[tied])


@pytest.mark.slow  # on one Python
@pytest.mark.parametrize("fields", [{}, {"scan_layers": True}, {"scan_layers": True, "unroll": True}], ids=str)
@pytest.mark.parametrize("variant", ["pre_ln", "reflect packed"])
def test_one_token_at_a_time_gives_the_logits_of_a_full_pass_and_keeps_the_cache_in_its_memory(
    random_params, variant, fields
):
    config, params = setting(random_params, variant, **fields)
    tokens = jnp.concatenate([PROMPT, PROMPT[:, ::-1], PROMPT], axis=1)
    full = jax.jit(functools.partial(models.apply, config))(params, tokens)[0][..., : config.vocab_size]
    logits, cache = prefill(config, params, tokens[:, :3])
    for position in range(3, 9):
        np.testing.assert_allclose(logits, full[:, position - 1], rtol=0, atol=1e-10)
        before = jax.tree.leaves(cache)
        logits, cache = decode(config, params, tokens[:, position], position, cache)
        assert all(leaf.is_deleted() for leaf in before)
    np.testing.assert_allclose(logits, full[:, 8], rtol=0, atol=1e-10)
    # The control: a token at another's place.
    logits, _ = decode(config, params, tokens[:, 8], 7, cache)
    assert np.max(np.abs(logits - full[:, 8])) > 1e-3


def test_the_tokens_depend_on_prompt_and_model(random_params, expected):
    assert not np.array_equal(expected[True], expected[False])
    config, params = setting(random_params)
    other = generate(config, params, (PROMPT + 3) % config.vocab_size, 7)
    assert not np.array_equal(other[:, 3:], expected[True][:, 3:])
    assert all(len(np.unique(tokens[:, 3:])) > 2 for tokens in expected.values())


def test_sampling_is_reproducible_by_its_key_and_never_leaves_the_vocabulary(random_params):
    config, params = setting(random_params)
    prompt = jnp.tile(PROMPT, (64, 1))
    draw = functools.partial(generate, config, params, prompt, 7, temperature=50.0)
    first = draw(key=jax.random.key(0))
    np.testing.assert_array_equal(first, draw(key=jax.random.key(0)))
    assert np.any(first != draw(key=jax.random.key(1)))
    assert np.unique(first).tolist() == list(range(config.vocab_size))  # hot: all of it, and nothing of the padding
    assert np.array_equal(first[:, :3], prompt)


def test_top_k_draws_among_the_k_likeliest(random_params, expected):
    config, params = setting(random_params)
    draw = functools.partial(generate, config, params, key=jax.random.key(0), temperature=50.0)
    np.testing.assert_array_equal(draw(PROMPT, 7, top_k=1), expected[True])
    logits = jax.jit(functools.partial(models.apply, config))(params, PROMPT)[0]
    allowed = np.argsort(logits[:, -1, : config.vocab_size], axis=-1)[:, -3:]
    drawn = draw(jnp.repeat(PROMPT, 50, axis=0), 1, top_k=3)[:, -1].reshape(2, 50)
    for row in range(2):
        assert set(np.unique(drawn[row]).tolist()) == set(allowed[row].tolist())


def test_top_k_of_equal_logits_takes_k_of_them(random_params):
    config, params = setting(random_params, tied=False)
    params = jax.tree.map(jnp.zeros_like, params)
    tokens = generate(config, params, jnp.tile(PROMPT, (20, 1)), 1, temperature=1.0, top_k=1, key=jax.random.key(0))
    np.testing.assert_array_equal(tokens[:, -1], 0)  # as greedy does


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "kwargs", "message"),
    [
        (PROMPT, 8, {}, "new_tokens: got 8; allowed: at most the context, 10, prompt included"),
        (PROMPT, 0, {}, r"prompt and new_tokens: got \(3, 0\); allowed: at least one token each"),
        (PROMPT[:, :0], 1, {}, r"prompt and new_tokens: got \(0, 1\)"),
        (PROMPT, 1, {"temperature": -1.0}, r"temperature: got -1.0; allowed: 0 \(greedy\), or 1e-6 or more"),
        (PROMPT, 1, {"temperature": 1e-40}, r"temperature: got 1e-40; allowed: 0 \(greedy\), or 1e-6 or more"),
        (PROMPT, 1, {"temperature": 1.0}, "key: got None; allowed: a jax.random key where temperature > 0"),
        (PROMPT, 1, {"top_k": 0}, "top_k: got 0; allowed: None or 1 to 11"),
        (PROMPT, 1, {"top_k": 12}, "top_k: got 12; allowed: None or 1 to 11"),
    ],
)
def test_impossible_requests_are_one_line(prompt, new_tokens, kwargs, message):
    with pytest.raises(ConfigError, match=message) as error:
        generate(CONFIG, {}, prompt, new_tokens, **kwargs)
    assert "\n" not in str(error.value)
