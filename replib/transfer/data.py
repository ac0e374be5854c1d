"""COCO's and Cityscapes' files as data sets of the training loop; images stay in their files.

    coco        annotations/instances_train*.json and instances_val*.json, and beside them the
                folders of images that they are called after: train2017/, val2017/
    cityscapes  leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and
                gtFine/{train,val}/CITY/*_gtFine_labelIds.png
    shapes-coco, shapes-cityscapes    the same formats, drawn by replib.training.shapes

Sources: Lin et al., "Microsoft COCO", ECCV 2014; Cordts et al., "The Cityscapes
Dataset", CVPR 2016.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from replib.errors import UserError
from replib.foreign import json_of
from replib.training.data import STATISTICS, Dataset, surveyed
from replib.training.loader import Folder, opened, readable
from replib.training.shapes import drawn

SCENES = {  # name -> task
    "coco": "detection",
    "cityscapes": "segmentation",
    "shapes-coco": "detection",
    "shapes-cityscapes": "segmentation",
}
SHORTER, LONGER = 800, 1333  # sides of COCO's images, as all detectors of the papers see them
IGNORED = 255  # the class of pixels that are not scored
TRAINED = {  # label id of gtFine -> name, in the order of train ids
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
TRAIN_IDS = np.full(256, IGNORED, np.uint8)
TRAIN_IDS[[*TRAINED]] = np.arange(len(TRAINED))
FILL = (124, 116, 104)  # around an image that is smaller than its crop: the mean colour
MOST_JSON = 4 * 2**30  # bytes of a file of annotations; the longest of COCO has 0.45 GiB
MOST_BOXES = 2048  # of an image; 93 in COCO. All images have room for as many as the fullest one
CHUNK = 500  # files that are surveyed at once
Id = int | float | str  # of an image or a category, as sets like COCO have them


@lru_cache(maxsize=4)
def load(
    name: str, folder: str | None = None, longer: int | None = None, shorter: int | None = None
) -> Dataset:
    """A data set of `SCENES`; longer and shorter: see `load_coco`.

    Raises: UserError for a folder that is missing, or not as its set is distributed.
    """
    if name.startswith("shapes-"):
        where = drawn(name)
    elif folder is None:
        raise UserError(f"data_dir is missing: data={name} needs the folder to read.")
    else:
        where = Path(folder)
    if SCENES[name] == "detection":
        return load_coco(name, where, longer or LONGER, shorter or SHORTER)
    return load_cityscapes(name, where)


def hashes(files: Sequence[str], by_pixels: bool) -> tuple[bytes, np.ndarray]:
    """(what a digest is made of, heights and widths (N, 2)) of image files: hashes of the files; or
    of their pixels, where a program has written them, and another library would write others."""
    chunks = [list(files[i : i + CHUNK]) for i in range(0, len(files), CHUNK)]
    found, sides = surveyed(chunks)
    if not by_pixels:
        return found.tobytes(), sides
    content = hashlib.sha256()
    for file in files:
        content.update(pixels_of(file))
    return content.digest(), sides


def pixels_of(file: str) -> np.ndarray:
    """An image as it is stored."""
    from PIL import Image

    with readable(file), Image.open(file) as image:
        return np.ascontiguousarray(image)


# -- COCO ------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Photographs(Folder):
    """Images in a square of `size` pixels, at its top left, black beside; see `fitted`."""

    def read(
        self, file: str, box: Sequence[float] | None, interpolation: str = "bilinear"
    ) -> np.ndarray:
        """uint8 (size, size, 3); box: none, nothing is cropped."""
        from PIL.Image import Resampling

        out = np.zeros((self.size, self.size, 3), np.uint8)
        with opened(file) as image:
            height, width = fitted(image.height, image.width, self.resize, self.size)
            if (width, height) != image.size:
                image = image.resize((width, height), Resampling.BILINEAR)
            out[:height, :width] = image
        return out


def fitted(height: int, width: int, shorter: int, longer: int) -> tuple[int, int]:
    """(height, width) of an image whose shorter side becomes `shorter`, or less, where the other
    would be above `longer`; the ratio stays."""
    scale = min(shorter / min(height, width), longer / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def load_coco(name: str, folder: Path, longer: int, shorter: int) -> Dataset:
    """Images with boxes.

    Labels are float32 (N, 1 + most, 6), most the largest number of boxes: first (height, width as
    fitted, height, width in the file, 0, 0), then a row for each box: (left, top, right, bottom in
    pixels of the file, class from 1, or 0 where there is none, whether it is a crowd's). Training
    images have a box that is no crowd's.
    longer, shorter: see `fitted`.
    """
    if shorter > longer:
        raise UserError(
            f"image_resize (={shorter}) must be at most image_size (={longer}), which bounds the "
            "longer side."
        )
    parts, content = [], hashlib.sha256(f"coco {longer} {shorter}".encode())
    known: list[tuple] | None = None
    for part in ("train", "val"):
        path, found = annotations(folder, part)
        kinds = categories(path, found)
        if known is not None and kinds != known:
            raise UserError(f"{path}: its categories, by id and name, are not the training set's.")
        known = kinds
        images = folder / path.stem.removeprefix("instances_")
        files, rows, said = boxes_of(path, found, images, trained=part == "train")
        digest, sides = hashes(files, name.startswith("shapes-"))
        check_sizes(path, files, said, sides)
        most = max([1, *map(len, rows)])
        labels = torch.zeros(len(files), 1 + most, 6)
        for i, (own, (height, width)) in enumerate(zip(rows, sides.tolist(), strict=True)):
            fit = fitted(height, width, shorter, longer)
            labels[i, 0, :4] = torch.tensor([*fit, height, width])
            if own:
                labels[i, 1 : 1 + len(own)] = torch.tensor(own, dtype=torch.float32)
        content.update(digest)
        content.update(labels.numpy())
        parts.append((Photographs(files, longer, shorter, torch.from_numpy(sides)), labels))
    names = tuple(name for _, name in known)
    content.update("/".join(names).encode())
    (train, train_labels), (test, test_labels) = parts
    return Dataset(
        f"{name}:{folder.name}", train, train_labels, test, test_labels, names,
        *STATISTICS["imagefolder"], content.hexdigest(),
    )  # fmt: skip


def annotations(folder: Path, part: str) -> tuple[Path, dict[str, Any]]:
    """The file of annotations of a split, and what it says. Raises: UserError."""
    found = sorted((folder / "annotations").glob(f"instances_{part}*.json"))
    if len(found) != 1:
        raise UserError(
            f"data_dir (={str(folder)!r}) has {len(found)} files annotations/instances_{part}*."
            "json: expected one, as COCO is distributed."
        )
    try:
        values = json_of(found[0], MOST_JSON)
        complete = all(isinstance(values[k], list) for k in ("images", "annotations", "categories"))
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"{found[0]}: is not COCO's: images, annotations and categories in JSON.")
    return found[0], values


def by_id(path: Path, found: dict[str, Any], kind: str, key: str) -> dict[Id, dict]:
    """id -> entry of a list, each with a text under `key`. Raises: UserError."""
    out: dict[Id, dict] = {}
    wanted = {"id": (Id, "a number or text"), key: (str, "text")}
    for place, one in enumerate(found[kind]):
        where = f"{path}: {kind}[{place}]"
        for name, (types, said) in wanted.items():
            if not has(one, name):
                raise UserError(f"{where}: {name} is missing.")
            if not isinstance(one[name], types):
                raise UserError(f"{where}: {name} (={short(one[name])}) must be {said}.")
        if one["id"] in out:
            raise UserError(
                f"{where}: id (={short(one['id'])}) stands twice: each must have its own."
            )
        out[one["id"]] = one
    return out


def has(one: object, key: str) -> bool:
    """Whether it is a mapping with this key."""
    return isinstance(one, dict) and key in one


def short(value: object) -> str:
    """A value of a file for a message."""
    return f"{value!r:.60}"


def categories(path: Path, found: dict[str, Any]) -> list[tuple[Id, str]]:
    """(id, name) of the categories, in the order of the ids. Raises: UserError."""
    kinds = by_id(path, found, "categories", "name")
    order = sorted(kinds, key=lambda number: (isinstance(number, str), number))
    return [(number, kinds[number]["name"]) for number in order]


def boxes_of(
    path: Path, found: dict[str, Any], folder: Path, trained: bool
) -> tuple[list[str], list[list], list[tuple]]:
    """The files of the images, for each the rows of its boxes, and its (height, width) as the file
    of annotations says, None where it does not; trained: images without a box that can be trained
    on are left out. Raises: UserError."""
    order = {number: i for i, (number, _) in enumerate(categories(path, found), start=1)}
    images = by_id(path, found, "images", "file_name")
    rows: dict[Id, list] = {number: [] for number in images}
    for place, one in enumerate(found["annotations"]):
        try:
            left, top, width, height = map(float, one["bbox"])
            crowd = int(one.get("iscrowd", 0))  # which sets with boxes only leave out
            box = [left, top, left + width, top + height, order[one["category_id"]], crowd]
            if not all(map(math.isfinite, box)):
                raise ValueError
            rows[one["image_id"]].append(box)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            named = f"annotation {short(one['id'])}" if has(one, "id") else f"annotations[{place}]"
            raise UserError(f"{path}: {named}: {fault(one, images, order)}.") from None
    kept = [i for i in images if not trained or any(not row[5] for row in rows[i])]
    if not kept:
        raise UserError(f"{path}: has no image with a box.")
    for full in (i for i in kept if len(rows[i]) > MOST_BOXES):
        raise UserError(
            f"{path}: image {short(full)} has {len(rows[full])} boxes, more than {MOST_BOXES}: cut "
            "it into several."
        )
    if out := next((n for n in (images[i]["file_name"] for i in kept) if climbs(n)), None):
        raise UserError(f"{path}: file_name (={short(out)}) must name a file inside {folder}.")
    files = [str(folder / images[i]["file_name"]) for i in kept]
    if missing := next((file for file in files if not is_there(file)), None):
        raise UserError(f"{missing} is not there, but {path} names it: unpack the images there.")
    said = [(images[i].get("height"), images[i].get("width")) for i in kept]
    return files, [rows[i] for i in kept], said


def climbs(name: str) -> bool:
    """Whether a name is none of a file inside the folder that it is told beside, or no name."""
    return not name.isprintable() or PurePath(name).is_absolute() or ".." in PurePath(name).parts


def is_there(file: str) -> bool:
    """Whether there is such a file; the system has none whose name it finds too long."""
    try:
        return Path(file).is_file()
    except OSError:
        return False


def fault(one: object, images: dict, kinds: dict) -> str:
    """Why an annotation cannot be read."""
    for key in ("image_id", "category_id", "bbox"):
        if not has(one, key):
            return f"{key} is missing"
    for key, known in (("image_id", images), ("category_id", kinds)):
        if one[key] not in [*known]:  # not by its hash: a list has none
            return f"{key} (={short(one[key])}) is not listed: list it, or leave the annotation out"
    crowd = short(one.get("iscrowd", 0))
    return f"bbox (={short(one['bbox'])}) must be four finite numbers, iscrowd (={crowd}) 0 or 1"


def check_sizes(path: Path, files: list[str], said: list[tuple], sides: np.ndarray) -> None:
    """Raises: UserError where a file is not as large as the file of annotations says: its boxes
    would be those of another image."""
    for file, claimed, own in zip(files, said, sides.tolist(), strict=True):
        if any(one not in (None, other) for one, other in zip(claimed, own, strict=True)):
            raise UserError(
                f"{file} has height and width {own[0]} x {own[1]}, but {path} says "
                f"{short(claimed[0])} x {short(claimed[1])}: make them agree, and boxes too (they "
                "may have been drawn on the image as its EXIF orientation turns it, which is not "
                "done here)."
            )


# -- Cityscapes ------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Streets(Folder):
    """Images with their classes: files are pairs of names, of an image and of its label ids.

    size: (height, width) of what is read: red, green, blue, train id, uint8 (N, 4, *size).
    """

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), 4, *self.size))

    def read(
        self, file: tuple[str, str], box: Sequence[float] | None, interpolation: str = "bilinear"
    ) -> np.ndarray:
        """uint8 (H, W, 4), whole or cropped to a box, which may reach beyond the image; classes by
        the nearest pixel, none beyond it."""
        from PIL import Image
        from PIL.Image import Resampling

        out = np.empty((*self.size, 4), np.uint8)
        out[:] = (*FILL, IGNORED)
        photograph, labels = file
        with opened(photograph) as image, readable(labels), Image.open(labels) as classes:
            if classes.size != image.size or classes.mode != "L":
                raise UserError(f"{labels} must be grey, of 8 bits, and as large as {photograph}.")
            top, left, height, width = (0, 0, 1, 1) if box is None else box
            sides = image.height, image.width
            starts, lengths = (
                (top * sides[0], left * sides[1]),
                (height * sides[0], width * sides[1]),
            )
            inside, place = [], []  # on each axis: what is read, and where it is put
            for start, length, side, size in zip(starts, lengths, sides, self.size, strict=True):
                first, last = max(start, 0.0), min(start + length, side)
                inside.append((first, last))
                place.append([round((at - start) * size / length) for at in (first, last)])
            (first, last), (start, end) = inside
            (top, bottom), (left, right) = place
            area, size = (start, first, end, last), (right - left, bottom - top)
            pixels = image.resize(size, Resampling[interpolation.upper()], area)
            out[top:bottom, left:right, :3] = pixels
            out[top:bottom, left:right, 3] = TRAIN_IDS[
                np.asarray(classes.resize(size, Resampling.NEAREST, area))
            ]
        return out


def load_cityscapes(name: str, folder: Path) -> Dataset:
    """Images with a class for every pixel, of `TRAINED`; labels of whole images are 0."""
    parts, content = [], hashlib.sha256(b"cityscapes")
    for part in ("train", "val"):
        pairs = streets(folder, part)
        both = [[pair[i] for pair in pairs] for i in (0, 1)]
        sides = None
        for files in both:
            digest, sides = hashes(files, name.startswith("shapes-"))
            content.update(digest)
        if (strange := (sides != sides[0]).any(1)).any():
            first = both[0][int(strange.argmax())]
            raise UserError(f"{first} is not as large as the first image: all must be alike.")
        size = tuple(sides[0].tolist())
        parts.append(Streets(pairs, size, None, torch.from_numpy(sides)))
    train, test = parts
    labels = [torch.zeros(len(part), dtype=torch.long) for part in parts]
    return Dataset(
        f"{name}:{folder.name}", train, labels[0], test, labels[1], tuple(TRAINED.values()),
        *STATISTICS["imagefolder"], content.hexdigest(),
    )  # fmt: skip


def streets(folder: Path, part: str) -> list[tuple[str, str]]:
    """The images of a split, and their label ids. Raises: UserError for one that has none."""
    root, end = folder / "leftImg8bit" / part, "_leftImg8bit.png"
    images = sorted(root.glob(f"*/*{end}"))
    if not images:
        raise UserError(
            f"data_dir (={str(folder)!r}) has no leftImg8bit/{part}/CITY/*{end}: expected "
            "leftImg8bit and gtFine, as Cityscapes is distributed."
        )
    pairs = []
    for image in images:
        city, name = image.parent.name, image.name.removesuffix(end)
        labels = folder / "gtFine" / part / city / f"{name}_gtFine_labelIds.png"
        if not labels.is_file():
            raise UserError(f"{labels} is not there, but its image is: unpack gtFine there.")
        pairs.append((str(image), str(labels)))
    return pairs


def boxes_in(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(boxes (n, 4), classes from 1 (n,), whether of a crowd (n,)) of a row of `load_coco`."""
    rows = labels[1:][labels[1:, 4] > 0]
    return rows[:, :4], rows[:, 4].long(), rows[:, 5] > 0
