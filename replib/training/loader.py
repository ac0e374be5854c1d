"""Batches of images: resident on the device, or decoded from files ahead of their use.

    for x in batches(images, chunks, device, boxes):     # uint8 (n, 3, S, S), on the device
        ...

Where images lie in a tensor, a batch is one look-up: no workers, no queue. Where they lie in files
(`Folder`), worker processes decode the next `AHEAD` batches into memory shared with this one.
Processes, not threads: Pillow decodes and resizes without the interpreter's lock, but reading
headers and handing pixels over needs it for some 0.2 ms an image, which bounds all threads
together and delays whoever launches work on the GPU.

What comes out depends on the files, the chunks and the boxes alone, not on the number of workers.
As the chunks are a list, a run that goes on in the middle of an epoch gives the rest of it.
"""

from __future__ import annotations

import gc
import io
import mmap
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil, prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replib.errors import UserError
from replib.foreign import in_one_line
from replib.workers import Workers

AHEAD = 3  # batches that are being decoded, or wait: the bound of the memory that is shared
WORTH = 2**22  # pixels of batches that a process more is worth
MOST_PIXELS = 2**26  # of a file, and of what it is resized to: more is a bomb, no photograph
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # others start programs (EPS), or are seldom tested
INTERPOLATIONS = ("bilinear", "bicubic")  # both averaging over the pixels they shrink


@dataclass(frozen=True, eq=False)
class Folder:
    """Image files that act as the uint8 tensor (N, 3, size, size) of their pixels.

        len(folder); folder.shape; folder[torch.tensor([5, 2])]     # decoded at each use

    resize: the shorter side in pixels before the centre crop; None: size, nothing is lost there.
    sides: int32 (N, 2), height and width of every file, where known: boxes are drawn by them.
    Raises: UserError, when decoding, that names a file which is no readable image.
    """

    files: Sequence[str]
    size: int
    resize: int | None = None
    sides: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), 3, self.size, self.size))

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return next(batches(self, [torch.arange(len(self))[index]], "cpu"))

    def read(
        self, file: str, box: Sequence[float] | None, interpolation: str = "bilinear"
    ) -> np.ndarray:
        """One of its files as uint8 (H, W, C), whole or cropped to a box; see `batches`."""
        if box is None:
            return decode(file, self.size, self.resize)
        return decode_box(file, self.size, box, interpolation)


def batches(
    images: Tensor | Folder,
    chunks: Sequence[Tensor],
    device: torch.device | str,
    boxes: Tensor | None = None,
    *,
    interpolation: str = "bilinear",
    workers: int | None = None,
) -> Iterator[Tensor]:
    """`images[chunk]` for every chunk, uint8 (n, C, H, W) on `device`.

    images: a tensor, best on the device already; or a `Folder`, decoded in the background.
    chunks: int64 indices, a tensor for each batch, on the CPU as boxes are.
    boxes: (number of images in all chunks, 4), in that order: top, left, height, width of a crop,
        as fractions of the image in its file. It is cut from the decoded file, before anything
        is resized, and resized to (S, S): torchvision's RandomResizedCrop, given its box. For a
        Folder only: what lies in memory has been cropped, and is cropped further where it lies.
    interpolation: of the resized boxes. Images without a box: bicubic, as `decode`.
    workers: processes; 0 decodes in this one. None: as many as `worthwhile`.

    Memory, for a Folder: AHEAD batches shared with the workers, and on a CPU the one in use; on a
    GPU 2 pinned and 2 there. Each is 3 S^2 bytes an image. Copies to a GPU run on a stream of
    their own, one batch ahead. When the consumer stops early the workers end as the iterator is
    closed, which happens when the `for` that holds it is left.
    Raises: UserError that names a file which is no readable image, at its batch.
    """
    if isinstance(images, Folder):
        host = decoded(images, chunks, boxes, interpolation, workers)
        return on_host(host) if torch.device(device).type == "cpu" else copied(host, device)
    if boxes is not None:
        raise ValueError("boxes are for a Folder: images in memory are cropped where they lie")
    return resident(images, chunks, device)


def resident(images: Tensor, chunks: Sequence[Tensor], device) -> Iterator[Tensor]:
    """Rows of a tensor; the indices go to the device once, not batch by batch."""
    if not chunks:
        return
    images = images.to(device)
    last = images.is_contiguous(memory_format=torch.channels_last)
    rows = images.permute(0, 2, 3, 1) if last else images  # a copy keeps the layout
    order = torch.cat(list(chunks)).to(device)
    for chunk in order.split([len(chunk) for chunk in chunks]):
        batch = rows.index_select(0, chunk)
        yield batch.permute(0, 3, 1, 2) if last else batch


def on_host(arrays: Iterable[np.ndarray]) -> Iterator[Tensor]:
    """Copies of arrays (n, S, S, 3) as (n, 3, S, S), channels last in memory."""
    for array in arrays:
        yield torch.from_numpy(array).clone().permute(0, 3, 1, 2)


def copied(arrays: Iterable[np.ndarray], device: torch.device | str) -> Iterator[Tensor]:
    """The same on a GPU: the copy of the next batch runs beside the work on this one."""
    beside = torch.cuda.Stream(device)
    following = None
    for array in arrays:
        pixels = torch.from_numpy(array)
        # Pinned memory is torch's own: it is not given out again before its copy is done.
        pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True).copy_(pixels)
        with torch.cuda.stream(beside):
            batch = pinned.to(device, non_blocking=True)
            arrived = beside.record_event()
        if following is not None:
            yield handed_over(*following)
        following = batch, arrived
    if following is not None:
        yield handed_over(*following)


def handed_over(batch: Tensor, arrived: torch.cuda.Event) -> Tensor:
    """A batch for the consumer's stream, which waits for it; the host does not."""
    stream = torch.cuda.current_stream(batch.device)
    stream.wait_event(arrived)
    batch.record_stream(stream)  # its memory is not reused before that stream is done with it
    return batch.permute(0, 3, 1, 2)


# -- decoding ahead ------------------------------------------------------------------------------
def decoded(
    images: Folder,
    chunks: Sequence[Tensor],
    boxes: Tensor | None,
    interpolation: str,
    workers: int | None,
) -> Iterator[np.ndarray]:
    """uint8 (n, S, S, 3) for every chunk; written over as soon as the one after is asked for."""
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"interpolation (={interpolation!r}) must be one of {', '.join(INTERPOLATIONS)}."
        )
    counts = [len(chunk) for chunk in chunks]
    parts = None if boxes is None else boxes.double().split(counts)
    if workers is None:
        workers = worthwhile(images, sum(counts))
    channels, *sides = images.shape[1:]
    shape = (min(AHEAD, len(chunks)), max([1, *counts]), *sides, channels)
    if not chunks:
        return
    slots = np.frombuffer(mmap.mmap(-1, prod(shape)), np.uint8).reshape(shape)
    decoder = Decoder(replace(images, files=(), sides=None), interpolation, slots)

    def work(number: int) -> tuple[list[str], list]:
        """The files of a batch, by name so that no worker needs the list, and their boxes."""
        files = [images.files[i] for i in chunks[number].tolist()]
        return files, [None] * len(files) if boxes is None else parts[number].tolist()

    if not workers or sys.platform != "linux":  # elsewhere a process cannot be forked safely
        for number, count in enumerate(counts):
            decoder.fill(0, 0, *work(number))
            yield slots[0, :count]
        return
    pool = pool_of(workers, decoder)
    waiting = deque()

    def start(number: int) -> None:
        """Divide a batch among the workers; twice as many pieces, as images differ."""
        files, places = work(number)
        piece = max(8, ceil(len(files) / (2 * workers)))
        pieces = [slice(first, first + piece) for first in range(0, len(files), piece)]
        slot = number % len(slots)
        waiting.append([pool.submit(fill, slot, p.start, files[p], places[p]) for p in pieces])

    with ended(pool):
        for number in range(len(slots)):
            start(number)
        for number, count in enumerate(counts):
            for future in waiting.popleft():
                future.result()
            yield slots[number % len(slots), :count]
            if number + len(slots) < len(chunks):
                start(number + len(slots))


@dataclass(frozen=True)
class Decoder:
    """What every worker inherits: how images are decoded, and the memory that all write into."""

    folder: Folder  # without its files
    interpolation: str
    slots: np.ndarray  # (AHEAD, n, H, W, C)

    def fill(self, slot: int, first: int, files: list[str], boxes: list) -> None:
        """Decode files into one slot, from row `first` on; a box may be None."""
        for row, (file, box) in enumerate(zip(files, boxes, strict=True), first):
            self.slots[slot, row] = self.folder.read(file, box, self.interpolation)


_decoder: Decoder | None = None  # set in each worker by its initializer


def begin(decoder: Decoder) -> None:
    """In a new worker."""
    global _decoder
    _decoder = decoder
    gc.freeze()  # what was inherited, perhaps tensors on a GPU, is not this process's to free


def fill(*piece) -> None:
    """In a worker: one piece of a batch."""
    _decoder.fill(*piece)


def pool_of(workers: int, decoder: Decoder) -> Workers:
    """Processes forked from this one: they start in milliseconds and copy nothing."""
    from PIL import Image

    Image.init()  # once, here
    return Workers(workers, "fork", begin, (decoder,))


@contextmanager
def ended(pool: Workers) -> Iterator[None]:
    """Whatever happens inside, no process of the pool is left."""
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            "a process that decodes images died (out of memory?): run again with more memory, "
            "fewer cores, or a smaller batch_size or image_size."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def worthwhile(images: Tensor | Folder, count: int, most: int | None = None) -> int:
    """How many processes shall decode so many images: at most one for each core, or `most`; none
    where the images are so small that starting one would take longer."""
    return min(most or cores(), count * prod(images.shape[2:]) // WORTH)


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- one image -----------------------------------------------------------------------------------
@contextmanager
def readable(file: Path | str) -> Iterator[None]:
    """Whatever an image library raises for a bad file becomes one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any class: decoders are given whatever stands in a file
        raise UserError(f"{file} is not a readable image ({in_one_line(error)}).") from None


@contextmanager
def header(source: Path | str | io.BytesIO):
    """A Pillow image of one of `FORMATS` and of a bounded size, not decoded yet. Raises: any error,
    which `readable` makes one line of."""
    from PIL import Image

    if not isinstance(source, io.BytesIO) and not Path(source).is_file():
        raise OSError("no regular file")  # a pipe would be waited for
    quiet()
    with Image.open(source, formats=FORMATS) as image:
        bounded(*image.size)
        yield image


@lru_cache
def quiet() -> None:
    """Pillow says nothing of large images: ours are refused at a smaller size, by an error."""
    from PIL.Image import DecompressionBombWarning

    warnings.filterwarnings("ignore", category=DecompressionBombWarning)


def bounded(width: int, height: int) -> None:
    """Raises: ValueError for more pixels than an image may have."""
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS}")


@contextmanager
def opened(file: Path | str):
    """A Pillow image in RGB. Raises: UserError."""
    with readable(file), header(file) as image:
        yield image if image.mode == "RGB" else image.convert("RGB")


def decode(file: Path | str, size: int, resize: int | None = None) -> np.ndarray:
    """One image as uint8 (size, size, 3): the shorter side resized (bicubic), the centre cropped.

    resize: the shorter side, in pixels, that the centre is cropped from; None: size.
    """
    from PIL.Image import Resampling

    shorter = resize or size
    with opened(file) as image:
        if image.size != (size, size) or shorter != size:
            scale = shorter / min(image.size)
            width, height = (max(shorter, round(side * scale)) for side in image.size)
            bounded(width, height)  # of a line of pixels it would be thousands of times its own
            left, top = (width - size) // 2, (height - size) // 2
            image = image.resize((width, height), Resampling.BICUBIC)
            image = image.crop((left, top, left + size, top + size))
        return np.asarray(image)


def decode_box(
    file: Path | str, size: int, box: Sequence[float], interpolation: str = "bilinear"
) -> np.ndarray:
    """One image as uint8 (size, size, 3): cropped to a box, then resized.

    box: top, left, height, width as fractions of the image; rounded to whole pixels, at least 1.
    """
    from PIL.Image import Resampling

    with opened(file) as image:
        width, height = image.size
        top, rows = pixels_of(box[0], box[2], height)
        left, columns = pixels_of(box[1], box[3], width)
        image = image.crop((left, top, left + columns, top + rows))
        return np.asarray(image.resize((size, size), Resampling[interpolation.upper()]))


def pixels_of(start: float, length: float, extent: int) -> tuple[int, int]:
    """First pixel and number of pixels of a side of a box that lies inside the image."""
    length = min(max(1, round(length * extent)), extent)
    return min(max(0, round(start * extent)), extent - length), length
