"""Data sets as tensors, with seeded splits.

    digits       scikit-learn's handwritten digits, 8x8 grey, bundled with the library
    cifar10/100  through torchvision, downloaded on first use into the data folder
    imagefolder  any tree train/CLASS/*, val/CLASS/* (or test/CLASS/*)
    shapes       three outlines in any colours, 32x32, drawn by replib.training.shapes

Images are decoded into memory, up to RESIDENT_BYTES for training and test images together; a larger
image folder stays on disk, as a `loader.Folder`. The rule asks the data, not the machine, so that a
cell is the same everywhere; `resident` overrides it.

The test split is fixed. Training images are drawn from the training split anew for every seed, or,
by a `split_seed`, the same for all; under the `clean` protocol a part of them is held out and
selects the checkpoint, under `paper` (as RepAn published) nothing is held out and the test split
selects.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replib.errors import UserError
from replib.foreign import text_of
from replib.training.checkpoint import draft_of
from replib.training.loader import Folder, batches, cores, header, readable

DATA = {
    "digits": "scikit-learn's bundled handwritten digits, 8x8; nothing to download",
    "cifar10": "torchvision's CIFAR-10, downloaded on first use",
    "cifar100": "torchvision's CIFAR-100, downloaded on first use",
    "imagefolder": "a folder with train/CLASS/* and val/CLASS/*",
    "shapes": "three outlines drawn by a program, 32x32; nothing to download",
}
RESIDENT_BYTES = 4e9  # of decoded images, 3 bytes a pixel; more stay in their files
DIGITS_POOL = 1000  # the first 1000 of 1797 digits train, the last 797 test
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
STATISTICS = {  # mean and standard deviation per channel, images in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Dataset:
    """All images of a data set as uint8 (N, C, H, W), labels int64 (N,).

    digest: two data sets with the same one train the same. Of images in memory it is a hash of
    their pixels; of images in files a hash of the files' bytes, with the size they are decoded to.
    """

    name: str
    train_images: Tensor | Folder
    train_labels: Tensor
    test_images: Tensor | Folder
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    digest: str

    @property
    def in_channels(self) -> int:
        return len(self.mean)

    def normalised(self, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """uint8 images as float32, standardised per channel; channels last in memory."""
        x = images.to(device).to(torch.float32, memory_format=torch.channels_last)
        mean, deviation = (
            one_row(values, x.shape[3], str(x.device)) for values in (self.mean, self.deviation)
        )
        return x.div_(255).sub_(mean).div_(deviation)


@lru_cache(maxsize=64)
def one_row(values: tuple[float, ...], width: int, device: str) -> Tensor:
    """A value per channel as (1, C, 1, width), channels last: a row of memory, not C numbers, as
    an inner loop over C = 3 numbers is three times slower on a CPU."""
    row = torch.tensor(values, device=device).view(1, -1, 1, 1).expand(-1, -1, -1, width)
    return row.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Splits:
    """Indices into the training images: to train on, and to select by (may be empty)."""

    train: Tensor
    validation: Tensor


def derive(seed: int, *names: object) -> int:
    """A seed for one purpose, independent of the others: a hash of the seed and the names."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def split(data: Dataset, *, images: int | None, held_out: int, protocol: str, seed: int) -> Splits:
    """Draw `images` of the training split (None: all) and hold out `held_out` of them.

    Raises: UserError when there are not so many.
    """
    available = len(data.train_labels)
    wanted = available if images is None else images
    if wanted > available:
        raise UserError(f"train_images (={wanted}) is more than {data.name} has ({available}).")
    order = torch.randperm(
        available, generator=torch.Generator().manual_seed(derive(seed, "split"))
    )
    order = order[:wanted]
    if protocol == "paper":
        return Splits(order, order[:0])
    if not 0 < held_out < wanted:
        raise UserError(
            f"held_out (={held_out}) must be between 1 and {wanted - 1}: the clean protocol "
            "selects on images held out of the training set."
        )
    return Splits(order[held_out:], order[:held_out])


def digest_of(*arrays: np.ndarray | Tensor, text: str = "") -> str:
    """SHA-256 over shapes and contents."""
    h = hashlib.sha256(text.encode())
    for array in arrays:
        array = np.ascontiguousarray(array)
        h.update(f"{array.dtype}{array.shape}".encode())
        h.update(array)
    return h.hexdigest()


@lru_cache(maxsize=4)
def load(
    name: str,
    folder: str | None = None,
    image_size: int | None = None,
    image_resize: int | None = None,
    resident: bool | None = None,
    classes: int | None = None,
) -> Dataset:
    """Load a data set of `DATA`; `folder` holds downloads, or is the image folder.

    image_resize, resident, classes: of an image folder only, see `load_imagefolder`.
    image_size: of an image folder, or of the digits.
    Raises: UserError for an unknown name, or a folder that is missing, empty or has a class with
    fewer than two images.
    """
    if name == "digits":
        return load_digits(image_size)
    if name in ("cifar10", "cifar100"):
        return load_cifar(name, Path(folder or "data"))
    if name == "shapes":
        from replib.training.shapes import drawn  # which uses this file

        return replace(load_imagefolder(drawn(name), resident=True), name=name)
    if name == "imagefolder":
        if folder is None:
            raise UserError("data_dir is missing: data=imagefolder needs the folder to read.")
        return load_imagefolder(Path(folder), image_size, image_resize, resident, classes)
    raise UserError(f"data (={name!r}) must be one of {', '.join(DATA)}.")


def load_digits(image_size: int | None = None) -> Dataset:
    """8x8 digits; grey values 0..16 are stretched to 0..255.

    image_size: a multiple of 8: every pixel becomes a square of pixels, for networks that shrink
    their maps too much for 8x8. Raises: UserError for another number.
    """
    from sklearn.datasets import load_digits as bundled  # slow to import

    source = bundled()
    images = torch.from_numpy(source.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(source.target).long()
    size = image_size or images.shape[-1]
    times, rest = divmod(size, images.shape[-1])
    if rest:
        raise UserError(f"image_size (={size}) of the digits must be a multiple of 8, their own.")
    images = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
    train = images[:DIGITS_POOL].float() / 255
    return Dataset(
        "digits",
        images[:DIGITS_POOL],
        labels[:DIGITS_POOL],
        images[DIGITS_POOL:],
        labels[DIGITS_POOL:],
        tuple(map(str, range(10))),
        (round(train.mean().item(), 4),),
        (round(train.std().item(), 4),),
        digest_of(images, labels, text=f"digits {DIGITS_POOL}"),
    )


def load_cifar(name: str, folder: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 through torchvision."""
    from torchvision import datasets  # slow to import

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = (source(folder, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in data_dir (={folder}) and could not be downloaded ({error}): put "
            "torchvision's files there, or use data=imagefolder."
        ) from None
    arrays = [
        torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)
    ]
    labels = [torch.tensor(part.targets) for part in (train, test)]
    digest = digest_of(arrays[0], labels[0], arrays[1], labels[1], text=name)
    return Dataset(
        name, arrays[0], labels[0], arrays[1], labels[1], tuple(train.classes), *STATISTICS[name],
        digest,
    )  # fmt: skip


def load_imagefolder(
    folder: Path,
    image_size: int | None = None,
    image_resize: int | None = None,
    resident: bool | None = None,
    classes: int | None = None,
) -> Dataset:
    """A tree train/CLASS/*, val/CLASS/* (or test/) as squares of `image_size` pixels.

    Tiny-ImageNet may lie there as it is distributed: train/CLASS/images/*, val/images/* and
    val/val_annotations.txt.
    classes: only so many of them, the first by name; None: all.
    image_size: None: the shorter side of the first image.
    image_resize: the shorter side before the centre crop; None: image_size, no more is cropped.
    resident: whether images are decoded into memory; None: up to RESIDENT_BYTES. The digests
        of the two differ. Decoded images, and hashes of files, are kept in the cache folder, for
        as long as the files' lengths and times of change stay.
    """
    test = "val" if (folder / "val").is_dir() else "test"
    for part in ("train", test):
        if not (folder / part).is_dir():
            raise UserError(
                f"data_dir (={str(folder)!r}) has no folder {part!r}: expected train/CLASS/* and "
                "val/CLASS/* (or test/CLASS/*)."
            )
    parts = {part: listing(folder / part) for part in ("train", test)}
    names = sorted(parts["train"])
    strange = sorted(set(parts[test]) - set(names))
    if strange:
        raise UserError(f"{folder / test / strange[0]} is a class that train does not have.")
    if classes is not None:
        if not 2 <= classes <= len(names):
            raise UserError(
                f"classes (={classes}) must be from 2 to {len(names)}, the classes of {folder}."
            )
        names = names[:classes]
        parts = {p: {c: f for c, f in found.items() if c in names} for p, found in parts.items()}
    size = image_size or natural_size(next(iter(parts["train"].values()))[0])
    if image_resize is not None and image_resize < size:
        raise UserError(
            f"image_resize (={image_resize}) must be at least image_size (={size}), which is "
            "cropped from it."
        )
    if resident is None:
        total = sum(len(files) for part in parts.values() for files in part.values())
        resident = total * size * size * 3 <= RESIDENT_BYTES
    images, hashed, text = [], [], "/".join(names)
    for part in parts.values():
        files = [file for files in part.values() for file in files]
        labels = np.repeat([names.index(c) for c in part], [len(f) for f in part.values()])
        if resident:
            pixels = decoded(files, size, image_resize)
            images.append(torch.from_numpy(pixels))
            hashed += [pixels, labels]
        else:
            hashes, sides = surveyed(list(part.values()))
            images.append(Folder(files, size, image_resize, torch.from_numpy(sides)))
            hashed += [hashes, labels]
    if not resident:
        text = f"files {size} {image_resize} {text}"
    digest = digest_of(*hashed, text=text)
    name = f"imagefolder:{folder.name}"
    labels = [torch.from_numpy(array) for array in hashed[1::2]]
    return Dataset(
        name, images[0], labels[0], images[1], labels[1], tuple(names),
        *STATISTICS["imagefolder"], digest,
    )  # fmt: skip


def listing(root: Path) -> dict[str, list[str]]:
    """The image files of every class folder, sorted by name."""
    root, found = root.resolve(), {}
    annotated = root / "val_annotations.txt"
    if annotated.is_file() and (root / "images").is_dir():  # Tiny-ImageNet's validation images
        return listed(annotated)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        inner = folder / "images"  # its training images
        folder = inner if inner.is_dir() else folder
        with os.scandir(folder) as entries:  # a Path for each of a million files takes seconds
            names = sorted(e.name for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES))
        files = [f"{folder}{os.sep}{name}" for name in names]
        refuse_odd(root, folder.name, *names)
        if len(files) < 2:
            raise UserError(
                f"{folder} has {len(files)} image{'s' * (len(files) != 1)}: every class needs at "
                f"least 2 (files ending in {', '.join(IMAGE_SUFFIXES)})."
            )
        found[folder.parent.name if folder is inner else folder.name] = files
    if len(found) < 2:
        raise UserError(f"{root} has {len(found)} class folders: at least 2 are needed.")
    return found


def listed(annotations: Path) -> dict[str, list[str]]:
    """The image files of every class, of a text of lines NAME<tab>CLASS<tab>..."""
    found: dict[str, list[str]] = {}
    try:
        lines = text_of(annotations).splitlines()
    except ValueError as error:
        raise UserError(f"{annotations} cannot be read as text ({error}).") from None
    for number, line in enumerate(lines, start=1):
        name, tab, rest = line.partition("\t")
        if not tab or not name.lower().endswith(IMAGE_SUFFIXES) or Path(name).name != name:
            raise UserError(f"{annotations}: line {number} names no image and its class.")
        label = rest.split("\t")[0]
        refuse_odd(annotations, name, label)
        found.setdefault(label, []).append(str(annotations.parent / "images" / name))
    return {label: sorted(files) for label, files in sorted(found.items())}


def refuse_odd(where: Path, *names: str) -> None:
    """Raises: UserError for a name with a line break or the like, or that is not UTF-8."""
    if odd := [name for name in names if not name.isprintable()]:
        raise UserError(f"{where}: the name {odd[0]!r} has characters that cannot be printed.")


def natural_size(file: str) -> int:
    """The shorter side of an image."""
    with readable(file), header(file) as image:
        return min(image.size)


def decoded(files: list[str], size: int, resize: int | None = None) -> np.ndarray:
    """Images as uint8 (N, 3, size, size), from the cache where they were decoded before."""
    from tqdm import tqdm  # not on every machine that measures

    def make() -> np.ndarray:
        folder = Folder(files, size, resize)
        pixels = np.empty(folder.shape, np.uint8)
        chunks = torch.arange(len(files)).split(256)
        with tqdm(
            total=len(files), desc="decoding", unit="image", leave=False, disable=None
        ) as bar:
            for chunk, batch in zip(chunks, batches(folder, chunks, "cpu"), strict=True):
                pixels[chunk[0] : chunk[-1] + 1] = batch
                bar.update(len(chunk))
        return pixels

    return kept([str(size), *([f"resize {resize}"] if resize else []), *stamp(files)], make)


def surveyed(classes: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """SHA-256, uint8 (N, 32), and height and width, int32 (N, 2), of files, class by class.

    Every file is read once, and again when its length or time of change is another. A class at a
    time is kept in the cache, so that a survey that is stopped goes on there.
    """
    from tqdm import tqdm

    def survey(files: list[str]) -> np.ndarray:
        return kept(["survey", *stamp(files)], lambda: np.array([*map(inspected, files)], np.int32))

    found = []
    total = sum(map(len, classes))
    with (
        ThreadPoolExecutor(cores()) as pool,  # reading and hashing need no interpreter
        tqdm(total=total, desc="reading", unit="file", leave=False, disable=None) as bar,
    ):
        for rows in pool.map(survey, classes):
            found.append(rows)
            bar.update(len(rows))
    rows = np.concatenate(found)
    return rows[:, :32].astype(np.uint8), rows[:, 32:]


def inspected(file: str) -> list[int]:
    """The 32 bytes of a file's SHA-256, the image's height and its width."""
    with readable(file):
        with header(file):
            content = Path(file).read_bytes()
        with header(io.BytesIO(content)) as image:
            return [*hashlib.sha256(content).digest(), image.height, image.width]


def stamp(files: list[str]) -> list[str]:
    """Name, length and time of change of every file: what is kept of them is valid as long."""
    stats = ((file, os.stat(file)) for file in files)  # noqa: PTH116 (a Path takes five times as long)
    return [f"{file} {s.st_size} {s.st_mtime_ns}" for file, s in stats]


def kept(key: list[str], make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array from the cache folder; made, and put there, where it is not."""
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()
    file = cache_folder() / f"{digest[:24]}.npy"
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent, or cut short
        pass
    array = make()
    draft = draft_of(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        draft.replace(file)
    except OSError:  # a cache only saves time
        draft.unlink(missing_ok=True)
    return array


def cache_folder() -> Path:
    """Where decoded images, and hashes of files, are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "replib"
