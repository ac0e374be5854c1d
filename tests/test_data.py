"""Data sets, splits and augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomCrop

from replib.errors import UserError
from replib.training import data
from replib.training.data import augmented, derive, load, split


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data.load.cache_clear()
    yield
    data.load.cache_clear()


def folder(root, classes=("cat", "dog"), images=3, test="val", size=(9, 7)):
    """A tree of small images whose pixels tell class and number."""
    for part in ("train", test):
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(images):
                pixels = np.full((size[1], size[0], 3), 40 * c + i, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_digits_are_the_bundled_ones_with_a_fixed_test_set():
    digits = load("digits")
    assert digits.train_images.shape == (1000, 1, 8, 8) and len(digits.test_labels) == 797
    assert digits.train_images.dtype == torch.uint8 and digits.train_images.max() == 255
    x = digits.normalised(digits.train_images)
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3


def test_splits_are_disjoint_and_drawn_by_the_seed():
    digits = load("digits")
    one, two = (split(digits, images=200, held_out=50, protocol="clean", seed=s) for s in (0, 1))
    again = split(digits, images=200, held_out=50, protocol="clean", seed=0)
    assert len(one.train) == 150 and len(one.validation) == 50
    assert not set(one.train.tolist()) & set(one.validation.tolist())
    assert torch.equal(one.train, again.train) and not torch.equal(one.train, two.train)


def test_paper_protocol_holds_nothing_out_and_draws_the_same_images():
    digits = load("digits")
    clean = split(digits, images=200, held_out=50, protocol="clean", seed=3)
    paper = split(digits, images=200, held_out=50, protocol="paper", seed=3)
    assert len(paper.validation) == 0
    assert set(paper.train.tolist()) == {*clean.train.tolist(), *clean.validation.tolist()}


@pytest.mark.parametrize("images, held_out", [(2000, 50), (200, 0), (200, 200), (None, 1000)])
def test_impossible_splits(images, held_out):
    with pytest.raises(UserError, match=r"train_images|held_out"):
        split(load("digits"), images=images, held_out=held_out, protocol="clean", seed=0)


def test_seeds_for_different_purposes_differ():
    assert len({derive(s, n) for s in range(20) for n in ("order", "split", "redraw")}) == 60


@pytest.mark.parametrize("test", ["val", "test"])
def test_imagefolder_reads_what_is_there(tmp_path, test):
    found = load("imagefolder", str(folder(tmp_path / "set", test=test)))
    assert found.classes == ("cat", "dog")
    assert found.train_images.shape == (6, 3, 7, 7)  # the shorter side, centre cropped
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.train_images[:, 0, 3, 3].tolist() == [0, 1, 2, 40, 41, 42]


def test_imagefolder_resizes_and_its_digest_follows_the_pixels(tmp_path):
    root = folder(tmp_path / "set")
    before = load("imagefolder", str(root), 4)
    assert before.train_images.shape == (6, 3, 4, 4)
    assert load("imagefolder", str(root), 5).digest != before.digest
    Image.fromarray(np.full((7, 9, 3), 9, np.uint8)).save(root / "train/cat/0.png")
    data.load.cache_clear()
    assert load("imagefolder", str(root), 4).digest != before.digest


def test_a_truncated_cache_is_not_used(tmp_path):
    root = folder(tmp_path / "set")
    before = load("imagefolder", str(root)).digest
    cached = list((tmp_path / "cache/replib").glob("*.npy"))
    assert len(cached) == 2
    for file in cached:
        file.write_bytes(file.read_bytes()[:-20])
    data.load.cache_clear()
    assert load("imagefolder", str(root)).digest == before


def test_imagefolder_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="has no folder 'train'"):
        load("imagefolder", str(tmp_path / "absent"))
    (tmp_path / "empty/train").mkdir(parents=True)
    (tmp_path / "empty/val").mkdir()
    with pytest.raises(UserError, match="0 class folders"):
        load("imagefolder", str(tmp_path / "empty"))
    root = folder(tmp_path / "one", images=1)
    with pytest.raises(UserError, match=r"cat has 1 image: every class needs at\s+least 2"):
        load("imagefolder", str(root))
    root = folder(tmp_path / "broken")
    (root / "train/dog/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="not a readable image"):
        load("imagefolder", str(root))
    root = folder(tmp_path / "strange")
    (root / "val/cat").rename(root / "val/bird")
    with pytest.raises(UserError, match="bird is a class that train does not have"):
        load("imagefolder", str(root))
    with pytest.raises(UserError, match="data_dir is missing"):
        load("imagefolder")
    with pytest.raises(UserError, match="digits, cifar10"):
        load("mnist")


def test_crops_are_those_of_torchvision():
    """Every crop is one that torchvision's padded crop can give, and all are about as likely."""
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    places = {
        tuple(padded[0, 0, i : i + 4, j : j + 4].flatten().tolist()): (i, j)
        for i in range(5)
        for j in range(5)
    }
    n = 5000
    generator = torch.Generator().manual_seed(0)
    ours = augmented(image.expand(n, 1, 4, 4), generator, crop_padding=2, flip=False)
    counts = np.zeros((5, 5))
    for crop in ours:
        counts[places[tuple(crop.flatten().tolist())]] += 1
    assert abs(counts / n - 1 / 25).max() < 0.012  # four standard errors
    torch.manual_seed(0)
    theirs = RandomCrop(4, padding=2)(image[0])
    assert tuple(theirs.flatten().tolist()) in places


def test_flips_are_per_sample_and_half():
    image = torch.arange(8, dtype=torch.uint8).view(1, 1, 2, 4)
    generator = torch.Generator().manual_seed(0)
    out = augmented(image.expand(2000, 1, 2, 4), generator, crop_padding=0, flip=True)
    flipped = (out == image.flip(3)).flatten(1).all(1)
    assert ((out == image).flatten(1).all(1) | flipped).all()
    assert abs(flipped.double().mean() - 0.5) < 0.045


def test_no_augmentation_changes_nothing():
    image = torch.arange(8, dtype=torch.uint8).view(1, 1, 2, 4)
    assert torch.equal(augmented(image, torch.Generator(), crop_padding=0, flip=False), image)
