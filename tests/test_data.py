"""Data sets and splits: in memory, and in their files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from replib.errors import UserError
from replib.training import data
from replib.training.data import derive, load, split
from replib.training.loader import Folder, decode


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


def test_digits_are_enlarged_by_whole_pixels():
    small, large = load("digits"), load("digits", image_size=24)
    assert large.test_images.shape == (797, 1, 24, 24)
    for h, w in ((0, 0), (5, 13), (23, 9)):
        assert torch.equal(large.train_images[..., h, w], small.train_images[..., h // 3, w // 3])
    assert small.digest == load("digits", image_size=8).digest != large.digest
    with pytest.raises(UserError, match=r"image_size \(=12\) of the digits must be a multiple"):
        load("digits", image_size=12)


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


def test_tiny_imagenet_as_it_is_distributed(tmp_path):
    """The same images, labels and digest as from a plain tree of the same images."""
    plain = folder(tmp_path / "plain" / "images", classes=("n01", "n02", "n03"))
    theirs = tmp_path / "theirs" / "images"
    lines = []
    for path in sorted((plain / "train").glob("*/*.png")):
        target = theirs / "train" / path.parent.name / "images" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (theirs / "val" / "images").mkdir(parents=True)
    for path in sorted((plain / "val").glob("*/*.png"), reverse=True):
        name = f"val_{path.parent.name}_{path.name}"
        (theirs / "val" / "images" / name).write_bytes(path.read_bytes())
        lines.append(f"{name}\t{path.parent.name}\t0\t0\t62\t62\n")
    annotations = theirs / "val" / "val_annotations.txt"
    annotations.write_text("".join(lines))
    ours, other = load("imagefolder", str(plain)), load("imagefolder", str(theirs))
    assert other.classes == ours.classes == ("n01", "n02", "n03")
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(other, name), getattr(ours, name))
    assert other.digest == ours.digest
    for line, named in (("x.png\n", "line 10"), ("../x.png\tn01\n", "line 10")):
        annotations.write_text("".join(lines) + line)
        data.load.cache_clear()
        with pytest.raises(UserError, match=named):
            load("imagefolder", str(theirs))


def test_the_first_classes_of_a_folder(tmp_path):
    root = folder(tmp_path / "images", classes=("ant", "bee", "cow"))
    two, all_three = (load("imagefolder", str(root), classes=n) for n in (2, 3))
    assert two.classes == ("ant", "bee") and two.digest != all_three.digest
    assert all_three.digest == load("imagefolder", str(root)).digest
    kept = all_three.test_labels < 2
    assert torch.equal(two.test_images, all_three.test_images[kept])
    assert torch.equal(two.test_labels, all_three.test_labels[kept])
    for wrong in (1, 4):
        with pytest.raises(UserError, match=rf"classes \(={wrong}\) must be from 2 to 3"):
            load("imagefolder", str(root), classes=wrong)


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


def test_digests_of_images_in_memory_are_those_of_published_evidence(tmp_path):
    """Computed by the first version of this code; a cell's key contains them."""
    root = folder(tmp_path / "set")
    natural = "b6a4d439f495b039bbce1f3f8ed1e48e49fd20c75c1b67cbb8e25093cb71850e"
    resized = "d96d516bbb42f3af59100038722b1ee74f489ea3b186b63bd2c5a2872534c3b2"
    assert load("imagefolder", str(root)).digest == natural
    assert load("imagefolder", str(root), 4).digest == resized
    coloured = "3792fa23e9012d79b6fbc8587f6ca0893d4c4d056371b33ecba06e69c3a92b2b"
    root = photographs(tmp_path / "photographs", images=2)
    assert load("imagefolder", str(root), 8).digest == coloured


def photographs(root, images=20):
    """A tree of random images of different sizes."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(images):
                shape = (*random.integers(9, 20, 2), 3)
                pixels = random.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i:02d}.png")
    return root


@pytest.mark.parametrize("resize", [None, 11])
def test_resident_and_streamed_images_are_the_same(tmp_path, resize):
    root = photographs(tmp_path / "set")
    resident = load("imagefolder", str(root), 8, resize)
    streamed = load("imagefolder", str(root), 8, resize, resident=False)
    assert isinstance(streamed.train_images, Folder) and streamed.in_channels == 3
    for name in ("train_images", "test_images", "train_labels", "test_labels"):
        assert torch.equal(getattr(streamed, name)[:], getattr(resident, name)), name
    files = sorted((root / "train").glob("*/*"))
    one_by_one = np.stack([decode(file, 8, resize) for file in files]).transpose(0, 3, 1, 2)
    assert np.array_equal(resident.train_images, one_by_one)
    with Image.open(files[7]) as image:
        assert streamed.train_images.sides[7].tolist() == [image.height, image.width]
    assert streamed.name == resident.name and streamed.digest != resident.digest


def test_images_stay_in_their_files_above_the_limit(tmp_path, monkeypatch):
    root = str(folder(tmp_path / "set"))  # 12 images
    for limit, size, resident, kind in (
        (12 * 3 * 4**2, 4, None, torch.Tensor),
        (12 * 3 * 4**2 - 1, 4, None, Folder),
        (12 * 3 * 4**2, 5, None, Folder),
        (0, 4, True, torch.Tensor),
        (1e9, 4, False, Folder),
    ):
        data.load.cache_clear()
        monkeypatch.setattr(data, "RESIDENT_BYTES", limit)
        found = load("imagefolder", root, size, resident=resident)
        assert type(found.train_images) is type(found.test_images) is kind


def test_the_digest_of_files_follows_what_decides_the_pixels(tmp_path):
    def digest(root, *size):
        data.load.cache_clear()
        return load("imagefolder", str(root), *(size or (4,)), resident=False).digest

    def save(pixels, file):
        Image.fromarray(pixels).save(file)

    root = folder(tmp_path / "set")
    before = digest(root)
    assert digest(folder(tmp_path / "moved")) == before
    assert len({before, digest(root, 5), digest(root, 4, 6)}) == 3
    file = root / "val/dog/1.png"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")  # of the same length; the pixels stay
    assert digest(root) != before
    file.write_bytes(content)
    assert digest(root) == before
    (root / "train/cat/2.png").rename(root / "train/cat/3.png")  # the same images in order
    assert digest(root) == before
    (root / "train/cat/3.png").rename(root / "train/cat/00.png")
    assert digest(root) != before
    (root / "train/cat/00.png").rename(root / "train/cat/2.png")
    for part in ("train", "val"):
        (root / part / "dog").rename(root / part / "wolf")
    assert digest(root) != before


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    root = folder(tmp_path / "set")
    read = []
    inspected = data.inspected
    monkeypatch.setattr(data, "inspected", lambda file: read.append(file) or inspected(file))
    for changed, reads in ((None, 12), (None, 0), ("train/dog/1.png", 3)):  # class by class
        if changed:
            Image.fromarray(np.zeros((7, 9, 3), np.uint8)).save(root / changed)
        load("imagefolder", str(root), 4, resident=False)
        data.load.cache_clear()
        assert len(read) == reads
        read.clear()


def test_streamed_folders_name_their_mistakes(tmp_path):
    root = folder(tmp_path / "set")
    with pytest.raises(UserError, match=r"image_resize \(=3\) must be at least image_size \(=4\)"):
        load("imagefolder", str(root), 4, 3)
    (root / "train/dog/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"train/dog/1\.png is not a readable image"):
        load("imagefolder", str(root), 4, resident=False)


def test_two_machines_keep_the_same_at_once(tmp_path, monkeypatch):
    """They share the cache, and their processes have the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    save, written = np.save, []

    def meanwhile(stream, array, allow_pickle):
        written.append(stream.name)
        if len(written) == 1:
            data.kept(["key"], lambda: np.arange(3))
        save(stream, array, allow_pickle=allow_pickle)

    monkeypatch.setattr(np, "save", meanwhile)
    data.kept(["key"], lambda: np.arange(3))
    assert len(set(written)) == 2
    assert data.kept(["key"], lambda: None).tolist() == [0, 1, 2]
    assert len(list((tmp_path / "cache/replib").iterdir())) == 1


def test_a_full_disk_costs_time_only(tmp_path, monkeypatch):
    def full(stream, array, allow_pickle):
        stream.write(b"part")
        raise OSError("no space")

    monkeypatch.setattr(np, "save", full)
    assert len(load("imagefolder", str(folder(tmp_path / "set"))).train_labels) == 6
    assert list((tmp_path / "cache/replib").iterdir()) == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_is_the_plain_formula_to_the_bit(channels, layout):
    """Every grey level of every channel."""
    mean, deviation = (0.4914, 0.4822, 0.4465)[:channels], (0.2470, 0.2435, 0.2616)[:channels]
    empty = torch.empty(0, channels, 16, 16)
    some = data.Dataset("x", empty, empty, empty, empty, (), mean, deviation, "")
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    images = images.contiguous(memory_format=layout)
    before = images.clone()
    x = some.normalised(images)
    shape = (1, -1, 1, 1)
    plain = (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(deviation).view(
        shape
    )
    assert torch.equal(x, plain) and torch.equal(images, before)
    assert x.is_contiguous(memory_format=torch.channels_last)
