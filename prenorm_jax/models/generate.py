"""Text from a GPT, one token at a time, with a cache of the keys and values: the same in every variant.

`generate` is one compiled program. Who chooses tokens otherwise, or serves them as they come, has its two halves:

    logits, cache = prefill(config, params, prompt)                       # (B, V), once a prompt
    logits, cache = decode(config, params, token, position, cache)        # (B, V), once a token; the cache stays where it is in memory
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from prenorm_jax.models import apply, empty_cache
from prenorm_jax.models.config import GPTConfig, require
from prenorm_jax.paths import Tree

Array = jax.Array


def generate(
    config: GPTConfig,
    params: Tree,
    prompt: Array,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: Array | None = None,
) -> Array:
    """Continues each prompt by `new_tokens` tokens.

    Args:
      params: running parameters (`models.running`).
      prompt: (B, L) int token ids, L >= 1, all of one length.
      temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
      top_k: draws among the k likeliest tokens only.
      key: a jax.random key; needed where temperature > 0.

    Returns: (B, L + new_tokens) token ids; ids of the padded vocabulary never occur.
    Raises: ConfigError for a prompt and continuation longer than the context, a negative temperature, a missing key, top_k < 1.
    """
    length = prompt.shape[1]
    require(length >= 1 and new_tokens >= 1, "prompt and new_tokens", (length, new_tokens), "at least one token each")
    limit = f"at most the context, {config.context}, prompt included"
    require(length + new_tokens <= config.context, "new_tokens", new_tokens, limit)
    # Logits over less than that leave float32.
    fits = temperature == 0 or 1e-6 <= temperature < math.inf
    require(fits, "temperature", temperature, "0 (greedy), or 1e-6 or more, finite")
    require(top_k is None or 1 <= top_k <= config.vocab_size, "top_k", top_k, f"None or 1 to {config.vocab_size}")
    require(temperature == 0 or key is not None, "key", key, "a jax.random key where temperature > 0")
    keys = jax.random.split(jax.random.key(0) if key is None else key, new_tokens)
    return _generate(config, params, prompt, keys, temperature, top_k)


@functools.partial(jax.jit, static_argnums=0)
def prefill(config: GPTConfig, params: Tree, prompt: Array) -> tuple[Array, Any]:
    """Reads prompts (B, L), all of one length. Returns the logits (B, vocab_size) of what follows, and the cache that holds them.

    Args:
      params: running parameters (`models.running`), fastest in config.dtype.
    """
    logits, intermediates = apply(config, params, prompt, cache=empty_cache(config, len(prompt)), only_last=True)
    return logits[:, 0, : config.vocab_size], intermediates["cache"]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def decode(config: GPTConfig, params: Tree, token: Array, position: Array | int, cache: Any) -> tuple[Array, Any]:
    """Reads one token more of each sequence, (B,). Returns the logits (B, vocab_size) of the next one, and the cache with the token in it.

    Args:
      position: how many tokens the cache holds, fewer than the context.
      cache: from `prefill` or `decode`; its memory is taken.
    """
    logits, intermediates = apply(config, params, token[:, None], cache=cache, position=position)
    return logits[:, 0, : config.vocab_size], intermediates["cache"]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _generate(
    config: GPTConfig, params: Tree, prompt: Array, keys: Array, temperature: float, top_k: int | None
) -> Array:
    choose = functools.partial(_choose, temperature=temperature, top_k=top_k)
    logits, cache = prefill(config, params, prompt)
    first = choose(logits, keys[0]).astype(prompt.dtype)

    def step(carry: tuple[Array, Array, Any], key: Array) -> tuple[tuple[Array, Array, Any], Array]:
        token, position, cache = carry
        logits, cache = decode(config, params, token, position, cache)
        token = choose(logits, key).astype(token.dtype)
        return (token, position + 1, cache), token

    _, rest = jax.lax.scan(step, (first, jnp.int32(prompt.shape[1]), cache), keys[1:])
    return jnp.concatenate([prompt, first[:, None], rest.T], axis=1)


def _choose(logits: Array, key: Array, *, temperature: float, top_k: int | None) -> Array:
    """The next token (B,) of logits (B, V)."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    if top_k is None:
        return jax.random.categorical(key, logits / temperature)
    likeliest, tokens = jax.lax.top_k(logits, top_k)
    chosen = jax.random.categorical(key, likeliest / temperature)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=1)[:, 0]
