"""Mixup and CutMix against their definitions written out in numpy."""

import jax
import numpy as np
import pytest

from prenorm_jax.training.mixing import draw_mix, mix
from prenorm_jax.training.tasks import ImageClassification


def pair_of_images():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 8, 6, 3)).astype(np.float32)
    return images, np.array([1, 3, 0, 3], np.int32)


def blended(blend):
    images, labels = pair_of_images()
    mixed, targets = jax.jit(mix)(
        images, jax.nn.one_hot(labels, 5, dtype=np.float32), np.repeat([blend], 4, axis=0).astype(np.float32)
    )
    return images, labels, np.asarray(mixed), np.asarray(targets)


def test_mixup_is_a_convex_combination_of_neighbours():
    images, _, mixed, targets = blended([0.7, 0, 0, 0, 0])
    np.testing.assert_allclose(mixed[0], 0.7 * images[0] + 0.3 * images[1], atol=1e-6)
    np.testing.assert_allclose(mixed[3], 0.7 * images[3] + 0.3 * images[2], atol=1e-6)
    np.testing.assert_allclose(targets[0], [0, 0.7, 0, 0.3, 0], atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)


def test_cutmix_pastes_the_neighbour_s_box_and_shares_labels_by_pixels():
    images, _, mixed, targets = blended([1, 0.25, 0.0, 0.75, 0.5])
    expected = images[0].copy()
    expected[2:6, 0:3] = images[1][2:6, 0:3]
    np.testing.assert_array_equal(mixed[0], expected)
    share = 1 - 12 / 48
    np.testing.assert_allclose(targets[0], [0, share, 0, 1 - share, 0], atol=1e-6)


def test_a_share_of_all_changes_nothing():
    images, labels, mixed, targets = blended([1, 0, 0, 0, 0])
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(targets.argmax(-1), labels)


def test_draws_are_boxes_of_the_drawn_area_or_shares():
    rng = np.random.default_rng(0)
    blends = np.stack([draw_mix(rng, 0.8, 1.0) for _ in range(4000)])
    boxes = blends[blends[:, 0] == 1]
    assert abs(len(boxes) / 4000 - 0.5) < 0.03
    assert (boxes[:, 3:] >= boxes[:, 1:3]).all()
    assert boxes[:, 1:].min() >= 0
    assert boxes[:, 1:].max() <= 1
    areas = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
    # Uncut, the area is uniform with mean 1/2; the edges of the picture take a part of it.
    assert 0.2 < areas.mean() < 0.4
    shares = blends[blends[:, 0] != 1, 0]
    assert abs(shares.mean() - 0.5) < 0.03
    assert shares.var() == pytest.approx(0.25 / (2 * 0.8 + 1), rel=0.1)


def batch_of(blend=None):
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.integers(0, 256, (4, 8, 6, 3), dtype=np.uint8),
        "targets": np.array([1, 3, 0, 3], np.int32),
        "weights": np.ones(4, np.float32),
    }
    return batch if blend is None else {**batch, "mix": np.repeat([blend], 4, axis=0).astype(np.float32)}


def test_a_task_mixes_what_the_batch_says_and_nothing_else():
    task = ImageClassification(classes=5)
    plain, mixed = task.prepare(batch_of()), task.prepare(batch_of([0.7, 0, 0, 0, 0]))
    assert plain["targets"].shape == (4,)
    assert mixed.keys() == plain.keys() == {"inputs", "targets", "weights"}
    np.testing.assert_allclose(mixed["inputs"][0], 0.7 * plain["inputs"][0] + 0.3 * plain["inputs"][1], rtol=1e-4)
    assert mixed["targets"].shape == (4, 5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_mixed_labels_are_their_definitions(smoothing):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 5))
    shares = np.array([[0, 0.7, 0, 0.3, 0], [1, 0, 0, 0, 0]])
    smooth = (1 - smoothing) * shares + smoothing / 5
    softmax = ImageClassification(smoothing, classes=5).judge(jax.numpy.asarray(logits), jax.numpy.asarray(shares))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(softmax["loss"], -(smooth * log_p).sum(-1), rtol=1e-6)
    assert softmax["accuracy"].tolist() == (logits.argmax(-1) == [1, 0]).astype(float).tolist()

    present = (1 - smoothing) * (shares > 0) + smoothing / 5
    sigmoid = ImageClassification(smoothing, "sigmoid", 5).judge(jax.numpy.asarray(logits), jax.numpy.asarray(shares))
    p = 1 / (1 + np.exp(-logits))
    expected = -(present * np.log(p) + (1 - present) * np.log(1 - p)).mean(-1)
    np.testing.assert_allclose(sigmoid["loss"], expected, rtol=1e-6)
    # Whole labels are shares of 1: the losses of both spellings agree.
    for loss in ("softmax", "sigmoid"):
        task = ImageClassification(smoothing, loss, 5)
        whole = task.judge(jax.numpy.asarray(logits), np.array([1, 0], np.int32))
        spelled = task.judge(jax.numpy.asarray(logits), jax.nn.one_hot(np.array([1, 0]), 5))
        np.testing.assert_allclose(whole["loss"], spelled["loss"], rtol=1e-6)
