"""Small data drawn by a program, in the formats of the real sets: for tests and a first look.

    classes(folder)       train/CLASS/*.png, val/CLASS/*.png: one shape an image
    coco(folder)          annotations/instances_{train,val}2017.json, {train,val}2017/*.png
    cityscapes(folder)    leftImg8bit/{train,val}/CITY/*.png, gtFine/{train,val}/CITY/*.png

Whole numbers only, drawn by numpy's PCG64: the same pixels on every machine. Shapes differ by
outline; colours, sizes, places and a background of noise tell nothing of the class. Networks of
classification that learnt the first are backbones for the others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from replib.training.checkpoint import draft_of
from replib.training.data import cache_folder, derive

VERSION = 1  # raise when what is drawn changes
SHAPES = ("disc", "triangle", "cross")
COUNTS = {"train": 240, "val": 80}  # images of a split; of `classes`, of each class
SIDES = (64, 97)  # of COCO's images, from and below
CITY = (64, 128)  # height and width of the streets
# Cityscapes' label ids: what a street is drawn of; the first and the last are not scored.
VOID, EGO = 0, 1
ROAD, PAVEMENT, BUILDING, SIGN, PLANTS, SKY, PERSON, CAR = 7, 8, 11, 20, 21, 23, 24, 26


def outline(shape: str, side: int) -> np.ndarray:
    """Which pixels of a square of so many a shape covers, bool (side, side)."""
    y, x = np.mgrid[:side, :side] * 2 - (side - 1)  # from the centre, in half pixels
    radius = np.maximum(abs(x), abs(y))
    round_ = x * x + y * y
    return {
        "disc": round_ <= side * side,
        "square": radius <= side,
        "triangle": 2 * abs(x) <= y + side,
        "cross": (3 * abs(x) <= side) | (3 * abs(y) <= side),
    }[shape]


def background(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A colour with noise, uint8 (height, width, 3)."""
    colour = draw.integers(40, 216, 3)
    noise = draw.integers(-20, 21, (height, width, 3))
    return (colour + noise).astype(np.uint8)


def paint(
    draw: np.random.Generator, image: np.ndarray, mask: np.ndarray, top: int, left: int
) -> np.ndarray:
    """Paint a shape in a colour that stands out; returns where, bool (H, W)."""
    here = np.zeros(image.shape[:2], bool)
    height, width = (
        min(m, s - at) for m, s, at in zip(mask.shape, image.shape, (top, left), strict=False)
    )
    here[top : top + height, left : left + width] = mask[:height, :width]
    mean = image.reshape(-1, 3).mean(0).astype(int)
    away = draw.integers(60, 120, 3) * draw.choice([-1, 1])
    colour = (mean + np.where((mean + away < 0) | (mean + away > 255), -away, away)) % 256
    image[here] = np.clip(colour + draw.integers(-10, 11, (int(here.sum()), 3)), 0, 255)
    return here


def save(image: np.ndarray, file: Path) -> None:
    """A PNG."""
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)


def generator(*names: object) -> np.random.Generator:
    """Random numbers for one image."""
    return np.random.default_rng(derive(VERSION, "shapes", *names))


def classes(folder: Path, counts: dict[str, int] = COUNTS) -> None:
    """A tree of single shapes, 32 x 32."""
    for part, count in counts.items():
        for shape in SHAPES:
            for i in range(count):
                draw = generator("classes", part, shape, i)
                image, side = background(draw, 32, 32), int(draw.integers(14, 29))
                top, left = draw.integers(0, 33 - side, 2)
                paint(draw, image, outline(shape, side), top, left)
                save(image, folder / part / shape / f"{i:04d}.png")


def coco(folder: Path, counts: dict[str, int] = COUNTS) -> None:
    """Images of several shapes, with their boxes; one box in 20 is that of a "crowd"."""
    categories = [{"id": 2 * i + 1, "name": name} for i, name in enumerate(SHAPES)]  # with gaps
    for part, count in counts.items():
        images, annotations = [], []
        for i in range(count):
            draw = generator("coco", part, i)
            height, width = (int(side) for side in draw.integers(*SIDES, 2))
            image, owner = background(draw, height, width), np.full((height, width), -1)
            kinds = []
            for place in range(int(draw.integers(1, 5))):
                kind, side = int(draw.integers(len(SHAPES))), int(draw.integers(14, 41))
                top, left = (int(draw.integers(0, s - side + 1)) for s in (height, width))
                owner[paint(draw, image, outline(SHAPES[kind], side), top, left)] = place
                kinds.append((kind, [left, top, side, side], bool(draw.integers(20) == 0)))
            name, number = f"{i:012d}.png", i + 1
            save(image, folder / f"{part}2017" / name)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for place, (kind, box, crowd) in enumerate(kinds):
                area = int((owner == place).sum())
                if area:  # not hidden by later ones
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": number,
                            "category_id": categories[kind]["id"],
                            "bbox": box,
                            "area": area,
                            "iscrowd": int(crowd),
                        }
                    )
        found = {"images": images, "annotations": annotations, "categories": categories}
        path = folder / "annotations" / f"instances_{part}2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")


def cityscapes(folder: Path, counts: dict[str, int] = COUNTS) -> None:
    """Streets: sky, buildings, plants, a pavement, a road, and on it shapes for signs, people and
    cars, in the label ids of gtFine; colours are those of no class."""
    height, width = CITY
    for part, count in counts.items():
        for i in range(count):
            draw = generator("cityscapes", part, i)
            image = np.zeros((height, width, 3), np.uint8)
            labels = np.full((height, width), VOID, np.uint8)
            horizon, kerb = int(draw.integers(16, 25)), int(draw.integers(34, 43))
            bands = {SKY: (0, horizon), PLANTS: (horizon, kerb), ROAD: (kerb, height)}
            for label, (top, bottom) in bands.items():
                image[top:bottom] = background(draw, bottom - top, width)
                labels[top:bottom] = label
            for _ in range(int(draw.integers(2, 5))):  # buildings stand before the sky
                left, wide = int(draw.integers(0, width - 8)), int(draw.integers(8, 33))
                top = int(draw.integers(4, horizon))
                where = np.s_[top:kerb, left : left + wide]
                image[where] = background(draw, *labels[where].shape)
                labels[where] = BUILDING
            image[kerb : kerb + 4] = background(draw, 4, width)
            labels[kerb : kerb + 4] = PAVEMENT
            for shape, label, low, high in (
                ("disc", SIGN, 8, 13),
                ("triangle", PERSON, 10, 17),
                ("square", CAR, 12, 25),
            ):
                for _ in range(int(draw.integers(0, 3))):
                    side = int(draw.integers(low, high))
                    top = int(draw.integers(horizon, height - 4 - side // 2))
                    left = int(draw.integers(0, width - side + 1))
                    labels[paint(draw, image, outline(shape, side), top, left)] = label
            labels[-3:], image[-3:] = EGO, 30
            name = f"shapes_{i:06d}_000019"
            where = folder / "leftImg8bit" / part / "shapes"
            save(image, where / f"{name}_leftImg8bit.png")
            where = folder / "gtFine" / part / "shapes"
            save(labels, where / f"{name}_gtFine_labelIds.png")


DRAWN: dict[str, Callable[[Path], None]] = {
    "shapes": classes,
    "shapes-coco": coco,
    "shapes-cityscapes": cityscapes,
}


def drawn(name: str) -> Path:
    """The folder of a set of `DRAWN`, in the cache; drawn where it is not there, whole or not at
    all."""
    folder = cache_folder() / f"{name}-{VERSION}"
    if not folder.is_dir():
        draft = draft_of(folder)
        DRAWN[name](draft)
        try:
            draft.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(draft)
    return folder
