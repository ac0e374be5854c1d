"""Batches of images: resident and streamed alike, ahead of their use, and nothing left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from replib.errors import UserError
from replib.models import build
from replib.training import data, loader
from replib.training.augmentation import Augmentation
from replib.training.loader import AHEAD, Folder, batches, decode, decode_box
from replib.training.loop import Recipe, Task, fit

SIZE = 8


@pytest.fixture
def files(tmp_path) -> list[str]:
    """30 images of several sizes, kinds of file and colour models."""
    random = np.random.default_rng(0)
    made = []
    for number in range(30):
        height, width = (int(side) for side in random.integers(9, 30, 2))
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        mode, suffix = [("RGB", "jpg"), ("L", "png"), ("P", "png"), ("CMYK", "jpg")][number % 4]
        made.append(str(tmp_path / f"{number:02d}.{suffix}"))
        image.convert(mode).save(made[-1])
    return made


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process and no thread outlives a test."""
    threads = set(threading.enumerate())
    yield
    assert multiprocessing.active_children() == []
    assert set(threading.enumerate()) <= threads


def chunks_of(n: int, seed: int = 0, batch: int = 4) -> tuple[torch.Tensor, ...]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).split(batch)


def boxes_of(n: int) -> torch.Tensor:
    """Random boxes inside the image: top, left, height, width as fractions."""
    one, two = torch.rand(2, n, 2, generator=torch.Generator().manual_seed(1))
    low, high = torch.minimum(one, two), torch.maximum(one, two)
    return torch.cat([low, high - low], dim=1)


def one_by_one(files: list[str], index: torch.Tensor) -> torch.Tensor:
    arrays = np.stack([decode(files[i], SIZE) for i in index])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


# -- one image -----------------------------------------------------------------------------------
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_box_is_what_torchvision_crops_and_resizes(files, interpolation):
    for file, box in zip(files, boxes_of(len(files)).tolist(), strict=True):
        with Image.open(file) as image:
            width, height = image.size
            place = [round(box[0] * height), round(box[1] * width)]
            size = [max(1, round(box[2] * height)), max(1, round(box[3] * width))]
            place = [
                min(p, side - s) for p, s, side in zip(place, size, (height, width), strict=True)
            ]
            mode = InterpolationMode(interpolation)
            theirs = F.resized_crop(image.convert("RGB"), *place, *size, [SIZE, SIZE], mode)
        assert np.array_equal(decode_box(file, SIZE, box, interpolation), np.asarray(theirs))


def test_whole_pixels_survive_as_fractions():
    """Boxes are drawn in whole pixels and come as float32 fractions: no pixel is lost."""
    for extent in (1, 7, 224, 375, 500, 4288):
        for length in {1, extent // 3 or 1, extent}:
            for start in {0, (extent - length) // 2, extent - length}:
                box = (torch.tensor([start, length], dtype=torch.float64) / extent).float()
                assert loader.pixels_of(*box.tolist(), extent) == (start, length)
    assert loader.pixels_of(0.999, 0.001, 10) == (9, 1)  # never empty, never outside


@pytest.mark.parametrize("resize", [None, 12])
def test_without_a_box_the_centre_is_cropped_as_torchvision_does(tmp_path, resize):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = F.resize(Image.fromarray(pixels), resize or SIZE, InterpolationMode.BICUBIC)
    theirs = np.asarray(F.center_crop(image, [SIZE, SIZE]))
    assert np.array_equal(decode(tmp_path / "x.png", SIZE, resize), theirs)


# -- batches -------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [None, 0, 1, 3])
@pytest.mark.parametrize("with_boxes", [False, True], ids=["centre", "boxes"])
def test_content_and_order_do_not_depend_on_the_workers(files, workers, with_boxes):
    """More batches than places for them, of unequal length, two images twice."""
    order = torch.cat([torch.randperm(30), torch.tensor([3, 3])])
    chunks = order.split([9, 4, 1, 9, 2, 5, 2])
    assert len(chunks) > 2 * AHEAD
    boxes = boxes_of(len(order)) if with_boxes else None
    expected = one_by_one(files, order)
    if with_boxes:
        arrays = [decode_box(files[i], SIZE, b) for i, b in zip(order, boxes.tolist(), strict=True)]
        expected = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    got = list(batches(Folder(files, SIZE), chunks, "cpu", boxes, workers=workers))
    assert [len(x) for x in got] == [len(chunk) for chunk in chunks]
    assert torch.equal(torch.cat(got), expected)


def test_boxes_are_taken_by_position_not_by_image(files):
    twice = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    x = next(batches(Folder(files, SIZE), [torch.tensor([2, 2])], "cpu", twice))
    expected = [decode_box(files[2], SIZE, box) for box in twice.tolist()]
    assert np.array_equal(x.permute(0, 2, 3, 1), np.stack(expected))


def test_an_epoch_can_be_entered_in_its_middle(files):
    folder, chunks = Folder(files, SIZE), chunks_of(30)
    whole = list(batches(folder, chunks, "cpu", workers=2))
    rest = list(batches(folder, chunks[5:], "cpu", workers=2))
    assert torch.equal(torch.cat(whole[5:]), torch.cat(rest))


def test_a_batch_stays_when_the_next_one_comes(files):
    """What a consumer holds is its own, also while later batches are decoded."""
    folder, chunks = Folder(files, SIZE), chunks_of(30)
    for workers in (0, 2):
        first = next(stream := batches(folder, chunks, "cpu", workers=workers))
        before = first.clone()
        list(stream)
        assert torch.equal(first, before)


def test_a_folder_acts_as_the_tensor_of_its_pixels(files):
    folder = Folder(files, SIZE)
    everything = one_by_one(files, torch.arange(30))
    assert len(folder) == 30 and folder.shape == everything.shape
    for index in (torch.tensor([7, 0, 7]), slice(3, 20, 4), torch.arange(30) % 2 == 0):
        assert torch.equal(folder[index], everything[index])
    assert folder[:0].shape == (0, 3, SIZE, SIZE)


def test_a_tensor_is_indexed_without_workers(files, monkeypatch):
    monkeypatch.setattr(loader, "pool_of", None)
    images, chunks = one_by_one(files, torch.arange(30)), chunks_of(30)
    for layout in (torch.contiguous_format, torch.channels_last):
        resident = images.contiguous(memory_format=layout)
        got = list(batches(resident, chunks, "cpu"))
        assert torch.equal(torch.cat(got), images[torch.cat(chunks)])
        assert all(x.is_contiguous(memory_format=layout) for x in got)
    with pytest.raises(ValueError, match="boxes are for a Folder"):
        batches(images, chunks, "cpu", boxes_of(30))


def test_no_chunks_no_batches(files):
    for images in (Folder(files, SIZE), torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)):
        assert list(batches(images, [], "cpu")) == []


def test_an_unknown_interpolation_is_named(files):
    with pytest.raises(
        UserError, match=r"interpolation \(='box'\) must be one of bilinear, bicubic"
    ):
        next(batches(Folder(files, SIZE), chunks_of(30), "cpu", interpolation="box"))


def test_training_from_files_is_training_from_memory(files):
    """Two epochs with crops, mirror images and an evaluation: the same losses, to the bit."""

    def trained(images) -> list[dict]:
        labels = torch.arange(30) % 2
        ours = data.Dataset(
            "x", images, labels, images, labels, ("a", "b"), *data.STATISTICS["cifar10"], ""
        )
        torch.manual_seed(0)
        model = build("digits", "repvgg", classes=2, in_channels=3)
        recipe = Recipe(
            phases=1, epochs=2, batch_size=8, learning_rate=0.1, momentum=0.9, nesterov=True,
            weight_decay=0.0, clip_norm=None, clip="all",
            augmentation=Augmentation(crop_padding=1, flip=True), next_start="last",
            select="validation", reseed_each_phase=False,
        )  # fmt: skip
        groups = lambda: [{"params": list(model.parameters())}]  # noqa: E731
        loss = lambda logits, targets, inputs: torch.nn.functional.cross_entropy(logits, targets)  # noqa: E731
        order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
        return fit(Task(model, ours, order[6:], order[:6], recipe, groups, loss, 0)).history

    assert trained(Folder(files, SIZE)) == trained(one_by_one(files, torch.arange(30)))


# -- what goes wrong -----------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["text", "cut short", "absent"])
def test_an_unreadable_file_is_named_at_its_batch(files, tmp_path, workers, damage):
    bad = tmp_path / os.path.basename(files[20])  # noqa: PTH119
    content = bad.read_bytes()
    bad.unlink()
    if damage != "absent":
        bad.write_bytes(b"no image" if damage == "text" else content[: len(content) // 2])
    stream = batches(Folder(files, SIZE), torch.arange(30).split(4), "cpu", workers=workers)
    good = [next(stream) for _ in range(5)]
    assert torch.equal(torch.cat(good), one_by_one(files, torch.arange(20)))
    with pytest.raises(UserError) as error:
        next(stream)
    assert str(error.value).startswith(f"{bad} is not a readable image (")


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, RuntimeError])
def test_a_consumer_that_stops_leaves_nothing_behind(files, stop):
    """Checked again by the fixture; here the pool must be gone as soon as the loop is left."""

    def consume() -> None:
        for _ in batches(Folder(files, SIZE), chunks_of(30), "cpu", workers=2):
            assert len(multiprocessing.active_children()) == 2
            if stop is None:
                break
            raise stop

    if stop is None:
        consume()
    else:
        with pytest.raises(stop):
            consume()
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_is_reported(files):
    stream = batches(Folder(files, SIZE), chunks_of(30, batch=1), "cpu", workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a process that decodes images died"):
        list(stream)


def test_no_more_than_the_bound_is_decoded_ahead(files, tmp_path, monkeypatch):
    """Every decoding leaves a mark; a consumer that takes no more gets AHEAD batches at most."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def marked(file, *rest):
        (marks / os.path.basename(file)).touch()  # noqa: PTH119
        return decode(file, *rest)

    monkeypatch.setattr(loader, "decode", marked)  # the workers inherit it
    stream = batches(Folder(files, SIZE), torch.arange(30).split(2), "cpu", workers=2)
    for taken in (1, 2, 3):
        next(stream)
        for _ in range(50):  # until nothing moves any more
            before = len(list(marks.iterdir()))
            time.sleep(0.02)
            if len(list(marks.iterdir())) == before >= 2 * taken:
                break
        assert before <= 2 * (taken - 1 + AHEAD)
    stream.close()


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(files):
    """They must not stay, and hold a GPU's memory, when the trainer is gone."""
    script = (
        "import multiprocessing, sys, time, torch\n"
        "from replib.training.loader import Folder, batches\n"
        "stream = batches(Folder(sys.argv[1:], 8), torch.arange(30).split(4), 'cpu', workers=3)\n"
        "next(stream)\n"
        "print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 3
        parent.kill()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(map(alive, workers)):
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches(files):
    folder, chunks = Folder(files, SIZE), chunks_of(30)
    boxes = boxes_of(30)
    expected = torch.cat(list(batches(folder, chunks, "cpu", boxes)))
    for _ in range(3):  # the caching allocators hand memory out again
        got = []
        for x in batches(folder, chunks, "cuda", boxes, workers=2):
            torch.cuda._sleep(10_000_000)  # the consumer's stream is behind the copies
            got.append(x.clone())
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(torch.cat(got).cpu(), expected)
