"""Pictures: folders as ImageNet's, what an evaluation and a training batch see of them, and faults that name the file."""

import dataclasses
import os
import pathlib
import pickle

import numpy as np
import pictures_on_disk as disk
import pytest
from PIL import Image, ImageEnhance, ImageOps

from prenorm_jax.models.config import ConfigError, ViTConfig
from prenorm_jax.training import augment, data, image_folder
from prenorm_jax.training.data import DataError
from prenorm_jax.training.experiment import Data, Experiment
from prenorm_jax.training.pictures import IMAGENET, Preprocessing
from prenorm_jax.training.tasks import task_of

VIT = ViTConfig(width=8, depth=1, heads=2, mlp_width=8, image_size=16, patch_size=8, channels=3, classes=3)
RECIPE = Data(
    name="image_folder", crop="resized", three_augment=True, colour_jitter=0.3, mixup=0.8, cutmix=1.0, threads=1
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return disk.write_tree(tmp_path_factory.mktemp("pictures"))


def experiment_on(root, **fields):
    return Experiment(
        task="image_classification", model=VIT, data=dataclasses.replace(RECIPE, root=str(root), **fields)
    )


def test_classes_are_the_folders_in_alphabetical_order(tree):
    splits = data.load(experiment_on(tree))
    assert (len(splits.train), len(splits.held_out)) == (12, 6)
    batch = splits.train.batch(np.arange(12), None)
    assert batch["targets"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert batch["inputs"].shape == (12, 16, 16, 3)
    assert batch["inputs"].dtype == np.uint8


def test_an_evaluation_sees_the_centre_resized_as_usual_for_imagenet(tree):
    batch = data.load(experiment_on(tree, eval_crop=0.5)).held_out.batch(np.array([0]), None)
    with Image.open(tree / "val" / "n01" / "n01_0.JPEG") as picture:
        shorter = picture.resize((42, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(shorter)[8:24, 13:29]
    np.testing.assert_array_equal(batch["inputs"][0], expected)
    prepared = task_of(experiment_on(tree)).prepare(batch)["inputs"]
    mean, std = np.array(IMAGENET[3].mean), np.array(IMAGENET[3].std)
    np.testing.assert_allclose(prepared[0], (expected / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_training_pictures_follow_from_their_seeds_alone(tree):
    train = data.load(experiment_on(tree)).train
    seeds = train.draws(np.random.default_rng(0), 6)
    together = train.batch(np.arange(6), seeds)["inputs"]
    alone = np.concatenate([train.batch(np.array([i]), seeds[i : i + 1])["inputs"] for i in range(6)])
    np.testing.assert_array_equal(together, alone)
    others = train.batch(np.arange(6), seeds + 1)["inputs"]
    assert (together != others).any(axis=(1, 2, 3)).all()


def test_a_whole_recipe_gives_batches_that_a_task_prepares(tree):
    experiment = experiment_on(tree, repeats=2)
    batch = next(data.train_batches(data.load(experiment).train, experiment.data, 8))
    prepared = task_of(experiment).prepare(batch)
    assert prepared["inputs"].shape == (8, 16, 16, 3)
    assert prepared["targets"].shape == (8, 3)
    np.testing.assert_allclose(prepared["targets"].sum(-1), 1, atol=1e-6)


def test_a_checkpoint_s_own_preprocessing_mirrors_and_no_more(tree):
    train = data.load(experiment_on(tree, crop="centre", three_augment=False, colour_jitter=0.0)).train
    plain = train.batch(np.array([0]), None)["inputs"][0]
    drawn = {train.batch(np.array([0]), np.array([seed]))["inputs"].tobytes() for seed in range(20)}
    assert drawn == {plain.tobytes(), plain[:, ::-1].tobytes()}


def test_grey_models_get_grey_pictures(tree):
    experiment = experiment_on(tree)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(VIT, channels=1))
    batch = next(data.train_batches(data.load(experiment).train, experiment.data, 8))
    assert batch["inputs"].shape == (8, 16, 16, 1)
    assert task_of(experiment).prepare(batch)["inputs"].shape == (8, 16, 16, 1)


# --- augmentation


def test_a_resized_crop_is_a_part_of_the_picture_within_its_bounds():
    rng, areas, ratios = np.random.default_rng(0), [], []
    for _ in range(2000):
        left, top, width, height = augment._box(300, 200, rng, 0.08)
        assert left >= 0
        assert top >= 0
        assert left + width <= 300
        assert top + height <= 200
        areas.append(width * height / 60000)
        ratios.append(width / height)
    assert min(areas) >= 0.079
    assert max(areas) > 0.85  # 4:3 of a picture of 3:2 is 8/9
    assert 0.74 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.35
    assert augment._box(1000, 10, rng, 0.5) == (493, 0, 13, 10), "the widest part that the bounds allow, in the middle"


def test_a_resized_crop_s_pixels_are_those_of_its_box():
    picture = disk.picture(3, 400, 300)
    left, top, width, height = augment._box(400, 300, np.random.default_rng(5), 0.08)
    expected = picture.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BICUBIC)
    found = augment.resized_crop(picture, "RGB", (16, 16), np.random.default_rng(5), 0.08)
    difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
    # A crop that is resized, up to rounding; at its edges the filter sees what lies beyond.
    assert difference[2:-2, 2:-2].max() <= 1
    assert difference.max() <= 5


def test_a_jpeg_decoded_smaller_gives_nearly_the_same_pixels(tmp_path):
    disk.picture(3, 640, 480).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as small, Image.open(tmp_path / "a.jpg") as whole:
        found = augment.resized_crop(small, "RGB", (16, 16), np.random.default_rng(5), 0.5)
        expected = augment.resized_crop(whole.convert("RGB"), "RGB", (16, 16), np.random.default_rng(5), 0.5)
        assert small.size != whole.size, "it was not decoded at its full size"
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < 2


def test_a_simple_crop_is_the_picture_moved_by_at_most_the_margin():
    picture = disk.picture(3, 30, 20)
    rng = np.random.default_rng(0)
    covering = np.asarray(picture.resize((24, 16), Image.Resampling.BICUBIC))
    framed = np.pad(covering, [(4, 4), (4, 4), (0, 0)], mode="reflect")
    allowed = {framed[i : i + 16, j : j + 16].tobytes() for i in range(9) for j in range(17)}
    drawn = {np.asarray(augment.simple_crop(picture, (16, 16), rng)).tobytes() for _ in range(2000)}
    assert drawn == allowed


def test_one_of_three_is_grey_solarized_or_blurred():
    picture, rng = disk.picture(3), np.random.default_rng(0)
    grey, solarized, blurred = (np.asarray(change(picture, rng)) for change in augment.THREE)
    assert (grey == grey[..., :1]).all()
    np.testing.assert_array_equal(solarized, np.asarray(ImageOps.solarize(picture)))
    assert np.abs(np.diff(blurred.astype(int), axis=0)).sum() < np.abs(np.diff(np.asarray(picture, int), axis=0)).sum()
    plain = augment.Augmentation((30, 40), "simple", flip=False)
    three = dataclasses.replace(plain, three=True)
    seen = [three(picture, "RGB", np.random.default_rng(seed)) for seed in range(300)]
    greys = sum((image == image[..., :1]).all() for image in seen)
    assert 60 < greys < 140


def test_colours_change_by_at_most_the_strength():
    picture = Image.fromarray(np.full((4, 4, 3), 100, np.uint8))  # one colour: contrast and saturation leave it alone
    values = {
        int(np.asarray(augment.colour_jitter(picture, np.random.default_rng(seed), 0.3))[0, 0, 0])
        for seed in range(400)
    }
    assert min(values) in (70, 71, 72)
    assert max(values) in (128, 129, 130)
    np.testing.assert_array_equal(
        np.asarray(ImageEnhance.Brightness(picture).enhance(0.7)), np.full((4, 4, 3), 70, np.uint8)
    )


# --- faults


def test_an_unreadable_picture_is_named(tmp_path):
    root = disk.write_tree(tmp_path)
    whole = (root / "train" / "n02" / "n02_1.JPEG").read_bytes()
    (root / "train" / "n02" / "n02_1.JPEG").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "n03" / "n03_0.JPEG").write_bytes(b"no picture")
    train = data.load(experiment_on(root)).train
    with pytest.raises(DataError, match=r"^cannot read .*train/n02/n02_1\.JPEG: .*[Tt]runcated"):
        train.batch(np.array([5]), None)
    with pytest.raises(DataError, match=r"^cannot read .*train/n02/n02_1\.JPEG: .*[Tt]runcated"):
        train.batch(np.array([5]), np.array([0]))
    with pytest.raises(DataError, match=r"^cannot read .*train/n03/n03_0\.JPEG: cannot identify"):
        train.batch(np.array([8]), None)
    (root / "train" / "n01" / "n01_0.JPEG").unlink()
    with pytest.raises(DataError, match=r"^cannot read .*train/n01/n01_0\.JPEG: .*No such file"):
        train.batch(np.array([0]), None)


def test_hidden_files_and_folders_are_no_pictures_and_no_classes(tmp_path):
    root = disk.write_tree(tmp_path)
    (root / "train" / "n01" / "._n01_0.JPEG").write_bytes(b"an archiver's")
    (root / "train" / ".thumbnails").mkdir()
    splits = data.load(experiment_on(root))
    assert (len(splits.train), len(splits.held_out)) == (12, 6)


def test_a_picture_as_long_as_a_street_is_named(tmp_path):
    """Its shorter edge as long as a model wants it, it would take gigabytes."""
    preprocessing = Preprocessing(size=256, crop=(224, 224))
    with pytest.raises(ValueError, match=r"^3 x 30000 pixels, which .* resized to 256 are 256 x 2560000; at most"):
        preprocessing(Image.new("RGB", (3, 30000)))
    assert preprocessing(Image.new("RGB", (3, 300))).shape == (224, 224, 3)


def test_sixteen_bits_a_pixel_are_as_bright_as_eight(tmp_path):
    root = disk.write_tree(tmp_path)
    grey = disk.picture(3).convert("L")
    for side in ("train", "val"):
        grey.save(root / side / "n01" / "n01_0.png")
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(root / side / "n01" / "n01_1.png")
    for side in (data.load(experiment_on(root)).train, data.load(experiment_on(root)).held_out):
        names = [side.source.where(index).rpartition("/")[2] for index in range(len(side))]
        eight, sixteen = (side.batch(np.array([names.index(f"n01_{i}.png")]), None)["inputs"] for i in (0, 1))
        np.testing.assert_array_equal(sixteen, eight)


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_pixels_without_a_range_are_named(tmp_path, mode, dtype):
    root = disk.write_tree(tmp_path)
    for file in (root / "train" / "n01").iterdir():
        file.unlink()
    Image.fromarray(np.asarray(disk.picture(3).convert("L")).astype(dtype)).save(root / "train" / "n01" / "wide.tif")
    train = data.load(experiment_on(root)).train
    with pytest.raises(
        DataError, match=rf"wide\.tif: its pixels are '{mode}', numbers without a range; expected 8 or 16 bits"
    ):
        train.batch(np.arange(len(train)), None)


def test_a_folder_within_a_class_is_named(tmp_path):
    root = disk.write_tree(tmp_path)
    (root / "train" / "n01" / "more").mkdir()
    with pytest.raises(DataError, match=r"n01/more: a folder within a class; expected its pictures in .*n01$"):
        data.load(experiment_on(root))


def test_a_link_that_leads_nowhere_but_to_itself_is_named(tmp_path):
    root = disk.write_tree(tmp_path)
    (root / "train" / "n01" / "loop.jpg").symlink_to(root / "train" / "n01" / "loop.jpg")
    with pytest.raises(DataError, match=r"^cannot read .*train/n01/loop\.jpg: Too many levels of symbolic links$"):
        data.load(experiment_on(root))


def test_two_folders_of_one_number_are_named():
    with pytest.raises(DataError, match="another folder is number 1, as 01 is"):
        image_folder.class_numbers(["01", "1", "2"], {}, 3, pathlib.Path("base"))


def test_an_empty_folder_and_one_that_is_no_class_are_named(tmp_path):
    root = disk.write_tree(tmp_path)
    for file in (root / "train" / "n02").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"train/n02: no pictures in it; expected files with \.jpg"):
        data.load(experiment_on(root))
    disk.write_tree(tmp_path / "other")
    (tmp_path / "other" / "val" / "n02").rename(tmp_path / "other" / "val" / "n04")
    with pytest.raises(DataError, match=r"val/n04: no such class among the training pictures"):
        data.load(experiment_on(tmp_path / "other"))


def test_a_root_without_folders_or_with_too_many_is_named(tmp_path):
    with pytest.raises(DataError, match=r"config.data.root: got ''"):
        data.load(experiment_on(""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no folders in it"):
        data.load(experiment_on(tmp_path / "empty"))
    for name in ("a", "b", "c", "d"):
        (tmp_path / "four" / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"4 folders for a model of 3 classes"):
        data.load(experiment_on(tmp_path / "four"))


def test_colours_need_a_random_crop():
    with pytest.raises(ConfigError, match=r"data.crop: got 'centre'; allowed: resized or simple, with changed colours"):
        Data(three_augment=True)


def test_a_listing_is_small_and_knows_odd_names(tmp_path):
    root = disk.write_tree(tmp_path)
    odd = root / "train" / "n01" / os.fsdecode("bild \xe4 \u2713 1.jpg".encode())
    odd.write_bytes(disk.jpeg(0))
    (root / "train" / "n01" / "notes.txt").write_text("no picture")
    listing = image_folder.list_pictures(root / "train", {"n01": 0, "n02": 1, "n03": 2})
    assert len(listing) == 13
    assert listing.where(0) == str(odd)
    picture, label = listing.read(0)
    picture.close()
    assert label == 0
    assert pickle.loads(pickle.dumps(listing)).where(12) == str(root / "train" / "n03" / "n03_3.JPEG")


def test_preprocessing_without_a_step_leaves_the_picture_alone():
    picture = disk.picture(1)
    np.testing.assert_array_equal(Preprocessing()(picture), np.asarray(picture))
