"""Losses and metrics against formulas written out."""

import math

import jax
import numpy as np
import optax
import pytest

from prenorm_jax.training.cross_entropy import cross_entropy
from prenorm_jax.training.tasks import ImageClassification, LanguageModelling, without_smoothing


def logits_and_targets(shape=(4, 3), classes=7):
    rng = np.random.default_rng(0)
    return jax.numpy.asarray(5 * rng.normal(size=(*shape, classes))), rng.integers(classes, size=shape).astype(np.int32)


def test_cross_entropy_is_optax_s():
    logits, targets = logits_and_targets()
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(cross_entropy(logits, targets, 7), expected, rtol=1e-12)


def test_label_smoothing_mixes_in_the_uniform_distribution():
    logits, targets = logits_and_targets()
    soft = optax.smooth_labels(jax.nn.one_hot(targets, 7, dtype=logits.dtype), 0.1)
    expected = optax.safe_softmax_cross_entropy(logits, soft)
    np.testing.assert_allclose(cross_entropy(logits, targets, 7, 0.1), expected, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padded_columns_count_for_nothing(smoothing):
    logits, targets = logits_and_targets()
    padded = np.pad(logits, [(0, 0), (0, 0), (0, 2)], constant_values=50.0)

    def loss(logits):
        return cross_entropy(logits, targets, 7, smoothing).sum()

    np.testing.assert_allclose(loss(jax.numpy.asarray(padded)), loss(logits), rtol=1e-12)
    gradient = jax.grad(loss)(jax.numpy.asarray(padded))
    np.testing.assert_allclose(gradient[..., :7], jax.grad(loss)(logits), rtol=1e-9, atol=1e-12)
    assert not np.asarray(gradient[..., 7:]).any()
    assert abs(cross_entropy(jax.numpy.asarray(padded), targets, 9, smoothing).sum() - loss(logits)) > 1


def test_accuracy_and_per_example_shapes():
    logits = jax.numpy.asarray([[1.0, 2.0, 0.0], [3.0, 1.0, 2.0]])
    values = ImageClassification().judge(logits, np.array([1, 2], np.int32))
    assert values["accuracy"].tolist() == [1.0, 0.0]
    tokens, targets = logits_and_targets((4, 3))
    assert LanguageModelling(7).judge(tokens, targets)["loss"].shape == (4,)


def test_summaries():
    assert ImageClassification().summary({"loss": 1.0, "accuracy": 0.5}) == {"loss": 1.0, "accuracy": 0.5}
    summary = LanguageModelling(256, unit="byte").summary({"loss": math.log(4)})
    assert summary == pytest.approx({"loss": math.log(4), "perplexity": 4.0, "bits_per_byte": 2.0})
    assert LanguageModelling(256).summary({"loss": 1e4})["perplexity"] == math.inf


def test_evaluation_has_no_label_smoothing():
    assert without_smoothing(ImageClassification(0.1)) == ImageClassification(0.0)
    assert without_smoothing(LanguageModelling(5, 0.1, "byte")) == LanguageModelling(5, 0.0, "byte")
