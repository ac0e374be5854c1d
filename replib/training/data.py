"""Data sets as tensors, with seeded splits.

    digits       scikit-learn's handwritten digits, 8x8 grey, bundled with the library
    cifar10/100  through torchvision, downloaded on first use into the data folder
    imagefolder  any tree train/CLASS/*, val/CLASS/* (or test/CLASS/*)

The test split is fixed. Training images are drawn from the training split anew for every seed;
under the `clean` protocol a part of them is held out and selects the checkpoint, under `paper`
(as RepAn published) nothing is held out and the test split selects.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replib.errors import UserError

DATA = {
    "digits": "scikit-learn's bundled handwritten digits, 8x8; nothing to download",
    "cifar10": "torchvision's CIFAR-10, downloaded on first use",
    "cifar100": "torchvision's CIFAR-100, downloaded on first use",
    "imagefolder": "a folder with train/CLASS/* and val/CLASS/*",
}
DIGITS_POOL = 1000  # the first 1000 of 1797 digits train, the last 797 test
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
STATISTICS = {  # mean and standard deviation per channel, images in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Dataset:
    """All images of a data set as uint8 (N, C, H, W), labels int64 (N,)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    digest: str

    @property
    def in_channels(self) -> int:
        return self.train_images.shape[1]

    def normalised(self, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """uint8 images as float32, standardised per channel."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=device).view(shape)
        deviation = torch.tensor(self.deviation, device=device).view(shape)
        return (images.to(device).float() / 255 - mean) / deviation


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


@lru_cache(maxsize=2)
def load(name: str, folder: str | None = None, image_size: int | None = None) -> Dataset:
    """Load a data set of `DATA`; `folder` holds downloads, or is the image folder.

    Raises: UserError for an unknown name, or a folder that is missing, empty or has a class with
    fewer than two images.
    """
    if name == "digits":
        return load_digits()
    if name in ("cifar10", "cifar100"):
        return load_cifar(name, Path(folder or "data"))
    if name == "imagefolder":
        if folder is None:
            raise UserError("data_dir is missing: data=imagefolder needs the folder to read.")
        return load_imagefolder(Path(folder), image_size)
    raise UserError(f"data (={name!r}) must be one of {', '.join(DATA)}.")


def load_digits() -> Dataset:
    """8x8 digits; grey values 0..16 are stretched to 0..255."""
    from sklearn.datasets import load_digits as bundled  # slow to import

    source = bundled()
    images = torch.from_numpy(source.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(source.target).long()
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


def load_imagefolder(folder: Path, image_size: int | None) -> Dataset:
    """A tree train/CLASS/*, val/CLASS/* (or test/) in memory, resized to squares of `image_size`.

    Decoded arrays are kept in the cache folder, so that other processes need not decode again.
    """
    test = "val" if (folder / "val").is_dir() else "test"
    for part in ("train", test):
        if not (folder / part).is_dir():
            raise UserError(
                f"data_dir (={str(folder)!r}) has no folder {part!r}: expected train/CLASS/* and "
                "val/CLASS/* (or test/CLASS/*)."
            )
    parts = {part: listing(folder / part) for part in ("train", test)}
    classes = sorted(parts["train"])
    strange = sorted(set(parts[test]) - set(classes))
    if strange:
        raise UserError(f"{folder / test / strange[0]} is a class that train does not have.")
    size = image_size or natural_size(next(iter(parts["train"].values()))[0])
    total = sum(len(files) for part in parts.values() for files in part.values())
    if total * size * size * 3 > 16e9:
        raise UserError(
            f"data_dir (={str(folder)!r}) holds {total} images: at image_size {size} they need "
            f"{total * size * size * 3 / 1e9:.0f} GB of memory; choose a smaller image_size."
        )
    name = f"imagefolder:{folder.name}"
    arrays = []
    for part in parts:
        files = [(file, classes.index(c)) for c, files in parts[part].items() for file in files]
        arrays.append(decoded([file for file, _ in files], size))
        arrays.append(np.array([label for _, label in files], dtype=np.int64))
    digest = digest_of(*arrays, text="/".join(classes))
    return Dataset(
        name, *map(torch.from_numpy, arrays), tuple(classes), *STATISTICS["imagefolder"], digest
    )


def listing(root: Path) -> dict[str, list[Path]]:
    """The image files of every class folder, sorted by name."""
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < 2:
            raise UserError(
                f"{folder} has {len(files)} image{'s' * (len(files) != 1)}: every class needs at "
                f"least 2 (files ending in {', '.join(sorted(IMAGE_SUFFIXES))})."
            )
        found[folder.name] = files
    if len(found) < 2:
        raise UserError(f"{root} has {len(found)} class folders: at least 2 are needed.")
    return found


def natural_size(file: Path) -> int:
    """The shorter side of an image."""
    from PIL import Image

    with readable(file), Image.open(file) as image:
        return min(image.size)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Whatever an image library raises for a bad file becomes one line."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        raise UserError(f"{file} is not a readable image ({error}).") from None


def decoded(files: list[Path], size: int) -> np.ndarray:
    """Images as uint8 (N, 3, size, size): shorter side resized, centre cropped; from the cache
    where the same files, by name, length and time of change, were decoded before."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    stamp = [f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats]
    key = hashlib.sha256("\n".join([str(size), *stamp]).encode()).hexdigest()[:24]
    cached = cache_folder() / f"{key}.npy"
    try:
        return np.load(cached, allow_pickle=False)
    except (OSError, ValueError):  # absent, or cut short
        pass
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = np.stack(list(pool.map(lambda file: decode(file, size), files)))
    try:
        buffer = io.BytesIO()
        np.save(buffer, images, allow_pickle=False)
        cached.parent.mkdir(parents=True, exist_ok=True)
        beside = cached.with_suffix(f".{os.getpid()}.part")
        beside.write_bytes(buffer.getvalue())
        beside.replace(cached)
    except OSError:  # a cache only saves time
        pass
    return images


def cache_folder() -> Path:
    """Where decoded images are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "replib"


def decode(file: Path, size: int) -> np.ndarray:
    """One image as uint8 (3, size, size)."""
    from PIL import Image

    with readable(file), Image.open(file) as image:
        image = image.convert("RGB")
        if image.size != (size, size):
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            left, top = (width - size) // 2, (height - size) // 2
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            image = image.crop((left, top, left + size, top + size))
        return np.asarray(image).transpose(2, 0, 1)


def augmented(x: Tensor, generator: torch.Generator, *, crop_padding: int, flip: bool) -> Tensor:
    """A random crop after zero padding, and a random horizontal flip, per sample.

    x is uint8 (N, C, H, W), not yet normalised, so that the padding is black, as in torchvision.
    """
    n, _, height, width = x.shape
    if crop_padding:
        shift = torch.randint(0, 2 * crop_padding + 1, (2, n, 1), generator=generator)
        rows = (torch.arange(height) + shift[0]).to(x.device)
        columns = (torch.arange(width) + shift[1]).to(x.device)
        x = torch.nn.functional.pad(x, (crop_padding,) * 4)
        images = torch.arange(n, device=x.device)[:, None, None]
        x = x.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]]
        x = x.permute(0, 3, 1, 2)
    if flip:
        chosen = (torch.rand(n, generator=generator) < 0.5).to(x.device)
        x = torch.where(chosen[:, None, None, None], x.flip(3), x)
    return x
