"""Detection and segmentation: files as data, boxes and maps through augmentation, scores against
the sets' own, backbones of blocks that are dilated, fused and frozen, and runs that are stopped."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import at_home, with_checkpoints
from PIL import Image
from test_blocks import scrambled
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from replib.blocks import BLOCKS, RepBlock
from replib.errors import UserError
from replib.experiments import cells
from replib.experiments.cells import dataset, groups_of, key_of, new_model, plan, run_cell
from replib.experiments.params import Cell, Table, load_table
from replib.experiments.store import Store
from replib.models import build
from replib.networks import dilate
from replib.report import figures
from replib.report.page import Page
from replib.report.results import Results
from replib.training import shapes
from replib.training.loop import OutOfTime, Task, fit, training_flops
from replib.transfer import data as scenes
from replib.transfer import tasks
from replib.transfer.data import FILL, IGNORED, TRAIN_IDS, boxes_in, fitted, load_cityscapes
from replib.transfer.networks import averages, network
from replib.transfer.tasks import Boxes, Detection, Maps, Scene, Segmentation

COUNTS = {"train": 12, "val": 6}
DETECTION = dict(data="shapes-coco", image_size=96, image_resize=64, batch_size=4, epochs=1,
                 protocol="paper", learning_rate=0.01, momentum=0.9, flip=True, seed=0,
                 body="resnet18", width=0.125, clip_norm=10.0)  # fmt: skip
RETINA = DETECTION | {"transfer": dict(head="retinanet", channels=8, anchor=16)}
FASTER = dict(head="faster_rcnn", channels=8, anchor=10, proposals=40)
SEGMENTATION = dict(data="shapes-cityscapes", batch_size=4, epochs=1, protocol="paper", seed=0,
                    learning_rate=0.01, momentum=0.9, flip=True, body="resnet18", width=0.125,
                    drop_last=True)  # fmt: skip
PSP = dict(head="pspnet", output_stride=8, auxiliary=0.4, crop=[32, 64], zoom=[0.75, 1.5])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Small sets in both formats: name -> folder."""
    root = tmp_path_factory.mktemp("drawn")
    made = {"shapes-coco": shapes.coco, "shapes-cityscapes": shapes.cityscapes}
    for name, draw in made.items():
        draw(root / name, COUNTS)
    return {name: root / name for name in made}


@pytest.fixture
def small(drawn, monkeypatch):
    """Cells train on these."""
    monkeypatch.setattr(scenes, "drawn", lambda name: drawn[name])
    scenes.load.cache_clear()
    yield drawn
    scenes.load.cache_clear()


def cell(values, **changes):
    return Cell.model_validate(values | changes)


# -- blocks in dilated stages ----------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n, f in BLOCKS.items() if f.default_kernel_size == 3])
def test_a_dilated_block_is_the_one_that_is_built_dilated(name):
    torch.manual_seed(0)
    # With other numbers of channels no block has an identity, whatever its stride.
    built, given = BLOCKS[name](8, 16, 3, dilation=2), BLOCKS[name](8, 16, 3, stride=2)
    scrambled(built)
    dilate(given, 2)
    given.load_state_dict(built.state_dict())
    assert given.extent == built.extent and given.geometry == built.geometry
    x = torch.randn(2, 8, 9, 11)
    for mode in (True, False):
        torch.testing.assert_close(given.train(mode)(x), built.train(mode)(x))
    torch.testing.assert_close(given.deploy()(x), built(x), rtol=1e-4, atol=1e-4)


def test_the_last_two_stages_are_dilated_as_in_torchvision(small):
    from torchvision.models import resnet18, resnet50

    theirs = {"resnet50": resnet50(replace_stride_with_dilation=[False, True, True])}
    with pytest.raises(NotImplementedError):
        resnet18(replace_stride_with_dilation=[False, True, True])  # why it is written here
    ours = new_model(cell(SEGMENTATION, transfer=PSP, body="resnet50"))
    wanted = [
        (m.stride, m.dilation, m.padding)
        for name, m in theirs["resnet50"].named_modules()
        if isinstance(m, nn.Conv2d) and name.startswith(("layer3", "layer4"))
        if max(m.kernel_size) == 3
    ]
    found = [
        (m.geometry.stride, m.geometry.dilation, m.geometry.padding)
        for name, m in ours.body.named_modules()
        if isinstance(m, RepBlock) and name.startswith(("stage3", "stage4"))
        if max(m.geometry.kernel_size) == 3
    ]
    assert found == wanted and len({d for _, d, _ in found}) == 3
    maps = ours.eval().taps(torch.zeros(1, 3, 64, 64))
    assert [tuple(one.shape[2:]) for one in maps.values()] == [(8, 8), (8, 8)]


def test_fast_backbones_are_dilated_in_their_last_blocks(small):
    values = PSP | {"dilated_blocks": 5}
    model = new_model(cell(SEGMENTATION, transfer=values, body="repvgg_b1g2", block="repvgg"))
    blocks = [m for m in model.body.modules() if isinstance(m, RepBlock)]
    dilated = [max(b.geometry.dilation) for b in blocks]
    assert dilated == [1] * (len(blocks) - 5) + [2, 2, 2, 2, 2]  # its last stage is one layer
    assert all(max(b.geometry.stride) == 1 for b in blocks[-17:])


def test_pooling_by_products_is_adaptive_pooling():
    x = torch.randn(2, 3, 7, 13)
    for bins in (1, 2, 3, 6):
        got = averages(7, bins) @ x @ averages(13, bins).T
        torch.testing.assert_close(got, F.adaptive_avg_pool2d(x, bins))


# -- files -----------------------------------------------------------------------------------------
def test_cocos_boxes_and_classes_are_those_of_the_file(small):
    data = scenes.load("shapes-coco", None, 96, 64)
    said = json.loads((small["shapes-coco"] / "annotations/instances_val2017.json").read_text())
    numbers = sorted(kind["id"] for kind in said["categories"])
    assert numbers != list(range(1, len(numbers) + 1))  # with gaps, as COCO's
    crowds = 0
    for image, labels in zip(said["images"], data.test_labels, strict=True):
        own = [one for one in said["annotations"] if one["image_id"] == image["id"]]
        boxes, classes, crowd = boxes_in(labels)
        assert [
            [x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in own)
        ] == boxes.tolist()
        assert [numbers.index(one["category_id"]) + 1 for one in own] == classes.tolist()
        assert [bool(one["iscrowd"]) for one in own] == crowd.tolist()
        scale = min(
            64 / min(image["height"], image["width"]), 96 / max(image["height"], image["width"])
        )
        fit = [round(image["height"] * scale), round(image["width"] * scale)]
        assert labels[0].tolist() == [*fit, image["height"], image["width"], 0, 0]
        crowds += int(crowd.sum())
    assert (
        data.classes == shapes.SHAPES
        and data.digest == scenes.load("shapes-coco", None, 96, 64).digest
    )
    assert data.digest != scenes.load("shapes-coco", None, 96, 48).digest


def test_a_photograph_keeps_its_ratio_and_lies_at_the_top_left(small):
    data = scenes.load("shapes-coco", None, 96, 64)
    for i in range(3):
        file = data.test_images.files[i]
        height, width = data.test_labels[i, 0, :2].long().tolist()
        with Image.open(file) as image:
            want = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        got = data.test_images[torch.tensor([i])][0].permute(1, 2, 0).numpy()
        assert np.array_equal(got[:height, :width], want)
        assert got[height:].max(initial=0) == 0 and got[:, width:].max(initial=0) == 0
    assert fitted(480, 640, 800, 1333) == (800, 1067) and fitted(400, 1000, 800, 1333) == (
        533,
        1333,
    )


def test_training_images_without_a_box_are_left_out(drawn, tmp_path):
    path = drawn["shapes-coco"] / "annotations" / "instances_train2017.json"
    said = json.loads(path.read_text())
    first, second = said["images"][0]["id"], said["images"][1]["id"]
    said["annotations"] = [one for one in said["annotations"] if one["image_id"] != first]
    for one in said["annotations"]:
        one["iscrowd"] = int(one["iscrowd"] or one["image_id"] == second)
    for trained, left in ((True, 10), (False, 12)):
        files, rows, _ = scenes.boxes_of(path, said, drawn["shapes-coco"] / "train2017", trained)
        assert len(files) == len(rows) == left


def test_classes_of_pixels_are_train_ids(small):
    data = scenes.load("shapes-cityscapes")
    found = data.test_images[torch.arange(3)]
    for one, (photograph, labels) in zip(found, data.test_images.files, strict=False):
        with Image.open(photograph) as image, Image.open(labels) as ids:
            assert np.array_equal(one[:3].permute(1, 2, 0).numpy(), np.asarray(image))
            table = {7: 0, 8: 1, 11: 2, 20: 7, 21: 8, 23: 10, 24: 11, 26: 13}  # Cityscapes' own
            want = [[table.get(number, 255) for number in row] for row in np.asarray(ids).tolist()]
        assert one[3].tolist() == want
    assert int((TRAIN_IDS != IGNORED).sum()) == 19 == len(data.classes)


def test_a_crop_is_scaled_and_what_is_beyond_is_not_scored(small):
    """By nearest pixels, against a plain loop over the crop's pixels."""
    folder = replace(scenes.load("shapes-cityscapes").test_images, size=(24, 40))
    file = folder.files[0]
    ids = np.asarray(Image.open(file[1]))
    for box in ((0.25, 0.1, 0.375, 0.3125), (-0.25, -0.1, 1.5, 1.2), (0.0, 0.5, 0.75, 0.75)):
        got = folder.read(file, box)
        want = np.full((24, 40), IGNORED)
        for y in range(24):
            for x in range(40):
                row = (box[0] + box[2] * (y + 0.5) / 24) * ids.shape[0]
                column = (box[1] + box[3] * (x + 0.5) / 40) * ids.shape[1]
                if 0 <= row < ids.shape[0] and 0 <= column < ids.shape[1]:
                    want[y, x] = TRAIN_IDS[ids[int(row), int(column)]]
        assert (got[..., 3] == want).mean() > 0.97, box  # but where rounding moves an edge
        beyond = want == IGNORED
        if box[0] < 0:
            assert tuple(got[0, 0]) == (*FILL, IGNORED) and beyond[0].all()


def test_a_drawn_crop_lies_in_the_image_or_has_it_in_the_middle():
    generator = torch.Generator().manual_seed(0)
    scene = Scene(crop=(48, 48), zoom=(0.5, 2.0), flip=True)
    rows = scene.draw(200, generator, (64, 128), 3)
    top, left, height, width = rows["box"].unbind(1)
    inside = height <= 1
    assert ((top >= 0) & (top + height <= 1))[inside].all() and inside.any() and not inside.all()
    assert torch.allclose((2 * top + height)[~inside], torch.tensor(1.0, dtype=torch.double))
    assert torch.allclose(height * 64, width * 128) and (left >= 0).all()
    assert (48 / (height * 64)).min() >= 0.5 and (48 / (height * 64)).max() <= 2
    assert 60 < rows["flip"].sum() < 140


def broken(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


IMAGE = {"id": 1, "file_name": "a.png", "height": 4, "width": 6}
KIND = {"id": 1, "name": "a"}
BOX = {"id": 7, "image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 1, "iscrowd": 0}


def listed(images=(IMAGE,), categories=(KIND,), annotations=(BOX,)):
    """A file of one image and a box in it."""
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize(
    "files, named",
    [
        ({}, ["0 files", "instances_train*.json", "as COCO is distributed"]),
        ({"annotations__instances_train2017.json": "[]"}, ["images, annotations and categories"]),
        ({"annotations__instances_train2017.json": "{"}, ["images, annotations and categories"]),
        (
            {"annotations__instances_train2017.json": "[" * 100_000},
            ["images, annotations and categories"],
        ),
        (
            {"annotations__instances_train2017.json": listed()},
            ["train2017/a.png is not there", "unpack the images there"],
        ),
        (
            {"annotations__instances_train2017.json": listed([IMAGE | {"file_name": "a" * 300}])},
            ["aaa is not there", "unpack the images there"],
        ),
    ],
)
def test_a_folder_that_is_not_cocos_is_told_in_one_line(files, named, tmp_path):
    with pytest.raises(UserError) as caught:
        scenes.load("coco", str(broken(tmp_path, **files)))
    assert all(text in str(caught.value) for text in named), caught.value


@pytest.mark.parametrize(
    "lists, named",
    [
        ({"categories": [without(KIND, "name")]}, "categories[0]: name is missing"),
        ({"categories": [without(KIND, "id")]}, "categories[0]: id is missing"),
        ({"categories": [KIND | {"name": 3}]}, "categories[0]: name (=3) must be text"),
        ({"categories": [KIND, KIND | {"name": "b"}]}, "categories[1]: id (=1) stands twice"),
        ({"images": [without(IMAGE, "file_name")]}, "images[0]: file_name is missing"),
        ({"images": [IMAGE, IMAGE]}, "images[1]: id (=1) stands twice"),
        ({"images": ["a.png"]}, "images[0]: id is missing"),
        (
            {"annotations": [BOX, BOX | {"image_id": 2}]},
            "annotation 7: image_id (=2) is not listed",
        ),
        ({"annotations": [BOX | {"category_id": [2]}]}, "annotation 7: category_id (=[2]) is not"),
        ({"annotations": [without(BOX, "category_id")]}, "annotation 7: category_id is missing"),
        ({"annotations": [without({"bbox": 1}, "id")]}, "annotations[0]: image_id is missing"),
        ({"annotations": [7]}, "annotations[0]: image_id is missing"),
        (
            {"images": [IMAGE | {"id": 0}], "annotations": [BOX | {"image_id": 0}] * 2049},
            "image 0 has 2049 boxes, more than 2048: cut it into",
        ),
        (
            {"annotations": [BOX | {"bbox": [0, 0, 1]}]},
            "annotation 7: bbox (=[0, 0, 1]) must be four finite",
        ),
        ({"annotations": [BOX | {"bbox": [0, 0, 1, "a"]}]}, "annotation 7: bbox (=[0, 0, 1, 'a'])"),
        (
            {"annotations": [BOX | {"bbox": [0, 0, math.inf, 1]}]},
            "annotation 7: bbox (=[0, 0, inf, 1]) must be four finite numbers",
        ),
        (
            {"annotations": [BOX | {"bbox": [0, math.nan, 1, 1]}]},
            "annotation 7: bbox (=[0, nan, 1, 1]) must be four finite numbers",
        ),
        (
            {"images": [IMAGE | {"file_name": "../a.png"}]},
            "file_name (='../a.png') must name a file",
        ),
        ({"images": [IMAGE | {"file_name": "/a.png"}]}, "file_name (='/a.png') must name a file"),
        ({"images": [IMAGE | {"file_name": "a\nb"}]}, "file_name (='a\\nb') must name a file"),
        (
            {"annotations": [BOX | {"iscrowd": None}]},
            "annotation 7: bbox (=[0, 0, 1, 1]) must be four",
        ),
    ],
)
def test_an_entry_that_is_not_cocos_is_named_with_what_it_lacks(lists, named, tmp_path):
    broken(tmp_path, **{"annotations__instances_train2017.json": listed(**lists)})
    with pytest.raises(UserError) as caught:
        scenes.load("coco", str(tmp_path))
    assert named in str(caught.value) and "instances_train2017.json: " in str(caught.value)


def test_a_file_of_another_size_than_its_entry_is_refused(tmp_path):
    """As where boxes were drawn on the image as its EXIF orientation turns it."""
    broken(tmp_path, **{"train2017__x": "", "annotations__instances_train2017.json": listed()})
    turned = Image.new("RGB", (4, 6)).getexif()
    turned[0x0112] = 6
    Image.new("RGB", (4, 6)).save(tmp_path / "train2017" / "a.png", exif=turned)
    with pytest.raises(
        UserError, match=r"a\.png has height and width 6 x 4, but .*2017\.json says"
    ):
        scenes.load("coco", str(tmp_path))
    with pytest.raises(UserError, match=r"says 4 x 6: .*EXIF orientation"):
        scenes.load("coco", str(tmp_path))


def test_what_a_set_of_boxes_need_not_say_changes_nothing(small, tmp_path):
    """No sizes, no `iscrowd` where there is none, categories that one split says more of."""
    drawn, want = small["shapes-coco"], scenes.load("shapes-coco", None, 96, 64)
    for part in ("train", "val"):
        (tmp_path / f"{part}2017").symlink_to(drawn / f"{part}2017")
        said = json.loads((drawn / "annotations" / f"instances_{part}2017.json").read_text())
        for image in said["images"]:
            del image["height"], image["width"]
        for one in said["annotations"]:
            if not one["iscrowd"]:
                del one["iscrowd"]
        for kind in said["categories"]:
            kind["supercategory"] = part
        broken(tmp_path, **{f"annotations__instances_{part}2017.json": json.dumps(said)})
    assert scenes.load_coco("shapes-coco", tmp_path, 96, 64).digest == want.digest
    said["categories"][0]["name"] = "another"
    broken(tmp_path, **{"annotations__instances_val2017.json": json.dumps(said)})
    with pytest.raises(UserError, match="by id and name, are not the training set's"):
        scenes.load_coco("shapes-coco", tmp_path, 96, 64)


def test_a_folder_that_is_not_cityscapes_is_told_in_one_line(tmp_path, drawn):
    with pytest.raises(UserError, match="data_dir is missing"):
        scenes.load("cityscapes")
    with pytest.raises(UserError, match="as Cityscapes is distributed"):
        load_cityscapes("cityscapes", tmp_path)
    image = tmp_path / "leftImg8bit" / "train" / "ulm" / "a_leftImg8bit.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(next(drawn["shapes-cityscapes"].glob("leftImg8bit/*/*/*")).read_bytes())
    with pytest.raises(UserError, match=r"a_gtFine_labelIds\.png is not there"):
        load_cityscapes("cityscapes", tmp_path)


def test_what_is_drawn_is_the_same_on_every_machine(tmp_path):
    """Whole numbers only: pixels, not files, whose bytes depend on a library."""
    shapes.coco(tmp_path, {"train": 1, "val": 1})
    one = np.asarray(Image.open(tmp_path / "train2017" / f"{0:012d}.png"))
    assert (one.shape, int(one.sum())) == ((83, 85, 3), 2793362)
    assert one[5, 7].tolist() == [162, 138, 225]


# -- scores ----------------------------------------------------------------------------------------
class Guesses(nn.Module):
    """A detector that knows the truth, but for what a seed takes away and moves."""

    def __init__(self, data):
        super().__init__()
        self.labels, self.at = list(data.test_labels), 0
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, images):
        out = []
        for _image in images:
            labels, self.at = self.labels[self.at], self.at + 1
            boxes, classes, _ = boxes_in(labels)
            boxes = boxes * (labels[0, [1, 0, 1, 0]] / labels[0, [3, 2, 3, 2]])
            boxes = boxes + 3 * torch.rand(boxes.shape, generator=self.generator)
            wrong = torch.rand(len(boxes), generator=self.generator) < 0.2
            classes = torch.where(wrong, classes % 3 + 1, classes)
            scores = torch.rand(len(boxes), generator=self.generator)
            out.append({"boxes": boxes, "labels": classes, "scores": scores})
        return out


@pytest.mark.slow
def test_map_is_that_of_cocos_own_evaluation(small, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = scenes.load("shapes-coco", None, 96, 64)
    ours = Boxes.test(data, "cpu").scores(Guesses(data))
    assert capsys.readouterr().out == ""  # pycocotools tells every step otherwise
    path = small["shapes-coco"] / "annotations" / "instances_val2017.json"
    truth = COCO(str(path))
    numbers, guesses, said = sorted(truth.getCatIds()), Guesses(data), []
    for image, labels in zip(json.loads(path.read_text())["images"], data.test_labels, strict=True):
        (found,) = guesses([None])
        back = labels[0, [3, 2, 3, 2]] / labels[0, [1, 0, 1, 0]]
        for box, kind, score in zip(*found.values(), strict=True):
            x, y, right, bottom = (box * back).tolist()
            said.append(dict(image_id=image["id"], category_id=numbers[kind - 1],
                             bbox=[x, y, right - x, bottom - y], score=score.item()))  # fmt: skip
    theirs = COCOeval(truth, truth.loadRes(said), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert [*ours.values()] == pytest.approx(theirs.stats[:3].tolist(), abs=1e-6)
    assert 0.05 < ours["mAP"] < 0.9


def test_miou_is_that_of_a_loop_over_pixels(small):
    data = scenes.load("shapes-cityscapes")
    weights = torch.randn(19, 3, generator=torch.Generator().manual_seed(0))
    weights[14] = -100  # a class that is neither there nor found

    class Linear(nn.Module):
        def forward(self, x):
            return torch.einsum("kc,nchw->nkhw", weights, x)

    split = Maps.test(data, "cpu")
    ours = split.scores(Linear())
    hits, ours_alone, theirs_alone, pixels = [0] * 19, [0] * 19, [0] * 19, 0
    images = data.test_images[torch.arange(len(data.test_images))]
    found = Linear()(split.normalise(images)[:, :3]).argmax(1)
    for guess, true in zip(found.flatten().tolist(), images[:, 3].flatten().tolist(), strict=True):
        if true == IGNORED:
            continue
        pixels += 1
        if guess == true:
            hits[guess] += 1
        else:
            ours_alone[guess] += 1
            theirs_alone[true] += 1
    unions = [sum(parts) for parts in zip(hits, ours_alone, theirs_alone, strict=True)]
    iou = [hit / union for hit, union in zip(hits, unions, strict=True) if union]
    assert 8 <= len(iou) < 19 and sum(hits) > 0
    want = {"mIoU": sum(iou) / len(iou), "pixel_accuracy": sum(hits) / pixels}
    assert ours == pytest.approx(want, abs=1e-6)


def test_without_the_packages_one_line_says_how_to_get_them(small, monkeypatch, tmp_path):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(tasks.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"pycocotools is not installed.*replib\[transfer\]"):
        cells.kind_of(cell(RETINA), "cpu")


# -- what is minimised -----------------------------------------------------------------------------
class Recorder(nn.Module):
    """A detector that keeps what it is given."""

    def forward(self, images, targets):
        self.images, self.targets = images, targets
        return {"one": torch.tensor(1.0), "two": torch.tensor(2.0)}


def test_mirrored_boxes_hold_what_mirrored_images_show(small):
    data = scenes.load("shapes-coco", None, 96, 64)
    images, labels = data.train_images[torch.arange(4)], data.train_labels[:4].clone()
    labels[0, 1, 5] = 1  # a crowd's
    labels[1, 1, 2] = labels[1, 1, 0] + 0.5  # thinner than a pixel
    kind, seen = Detection(data, "cpu"), {}
    for flip in (False, True):
        model = Recorder()
        loss = kind.loss(model, images, labels, {"flip": torch.full((4,), flip)})
        seen[flip] = model
        assert loss.item() == 3.0
    for i in range(4):
        plain, mirrored = (seen[flip].images[i] for flip in (False, True))
        assert torch.equal(plain.flip(2), mirrored) and plain.shape[1:] == tuple(
            labels[i, 0, :2].long().tolist()
        )
        width = plain.shape[2]
        a, b = (seen[flip].targets[i]["boxes"] for flip in (False, True))
        assert len(a) == len(boxes_in(labels[i])[0]) - (i < 2)
        torch.testing.assert_close(a[:, 0], width - b[:, 2])
        torch.testing.assert_close(a[:, [1, 3]], b[:, [1, 3]])
        assert a.max() <= max(plain.shape) + 0.01 and (b[:, 2] > b[:, 0]).all()


def test_the_loss_of_maps_is_the_mean_over_scored_pixels(small):
    data = scenes.load("shapes-cityscapes")
    images = data.train_images[torch.arange(2)]

    class Two(nn.Module):
        def forward(self, x):
            self.x, made = x, torch.Generator().manual_seed(0)
            return [torch.randn(2, 19, *x.shape[2:], generator=made) for _ in range(2)]

    model, flip = Two(), torch.tensor([True, False])
    got = Segmentation(data, "cpu", auxiliary=0.4).loss(model, images, None, {"flip": flip})
    classes = torch.stack([images[0, 3].flip(1), images[1, 3]]).long()
    first, second = (F.cross_entropy(z, classes, ignore_index=IGNORED) for z in model(model.x))
    assert (classes == IGNORED).any()
    torch.testing.assert_close(got, first + 0.4 * second)
    torch.testing.assert_close(model.x[0], data.normalised(images[:1, :3])[0].flip(2))


# -- backbones -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "head, block",
    [
        pytest.param(RETINA["transfer"], "dbb", id="retinanet"),
        pytest.param(FASTER, "orepa", id="faster_rcnn", marks=pytest.mark.slow),
    ],
)
def test_a_fused_backbone_is_the_same_function(small, head, block):
    one = new_model(cell(DETECTION, transfer=head, block=block)).eval()
    scrambled(one.body)
    state = {k: v.clone() for k, v in one.body.state_dict().items()}
    other = new_model(cell(DETECTION, transfer=head, block=block, seed=1)).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want = one.body(x)["0"]
        assert not torch.allclose(other.body(x)["0"], want, rtol=0.1)
        other.load_body(state | {"fc.weight": torch.zeros(2)})
        other.fuse_body()
        torch.testing.assert_close(other.body(x)["0"], want, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(m, RepBlock) for m in other.modules())
    assert any(isinstance(m, RepBlock) for m in one.modules())
    assert all(p.requires_grad for p in other.body.parameters())
    with pytest.raises(RuntimeError, match="issing"):
        del state[next(iter(state))]
        one.load_body(state)


def test_stems_heads_and_frozen_stages_have_rates_of_their_own(small):
    given = RETINA["transfer"] | dict(stem_rate=0.1, head_rate=10.0, frozen_stages=0)
    one = cell(RETINA, transfer=given, decay="weights", weight_decay=0.1)
    model = new_model(one)
    rates = {
        id(p): g.get("lr_scale", 1.0) for g in groups_of(one, model, None) for p in g["params"]
    }
    assert len(rates) == len([*model.parameters()])
    for name, parameter in model.named_parameters():
        want = 0.1 if ".body.stage0." in name else 1.0 if ".body." in name else 10.0
        assert rates[id(parameter)] == pytest.approx(want), name
    one = cell(RETINA, transfer=given | dict(frozen_stages=2, fixed_norms=True))
    model = new_model(one).train()
    trained = {id(p) for g in groups_of(one, model, None) for p in g["params"]}
    for name, parameter in model.named_parameters():
        frozen = ".body.stage0." in name or ".body.stage1." in name
        assert (id(parameter) in trained) != frozen, name
    assert not model.body.training and model.model.head.training
    assert not any(m.training for m in model.body.modules())
    assert new_model(cell(RETINA)).train().body.training


@pytest.mark.parametrize(
    "body, options, maps",
    [
        ("cifar_resnet18", {}, "64 x 64, 32 x 32, 16 x 16, 8 x 8"),
        ("repopt_vgg_b1", {"strides": [1, 2, 1, 2, 2]}, "32 x 32, 32 x 32, 16 x 16, 8 x 8"),
        ("repopt_vgg_b1", {"strides": [2, 2, 2, 2, 1]}, "16 x 16, 8 x 8, 4 x 4, 4 x 4"),
    ],
)
@pytest.mark.parametrize("head", ["pspnet", "faster_rcnn"])
def test_a_body_of_other_strides_is_no_backbone(head, body, options, maps):
    with torch.device("meta"):
        made = build(body, "convbn", width=0.125, classes=2, in_channels=3, body_options=options)
        with pytest.raises(ValueError) as caught:
            network(head, made, 5, output_stride=8)
    assert f"maps of {maps}, not 16 x 16, 8 x 8, 4 x 4, 2 x 2: it is no" in str(caught.value)


@pytest.mark.parametrize("stride, rates", [(8, [12, 24, 36]), (16, [6, 12, 18]), (32, [3, 6, 9])])
def test_atrous_layers_reach_as_far_in_the_image_at_every_stride(small, stride, rates):
    values = dict(head="deeplabv3", channels=8, output_stride=stride)
    model = new_model(cell(SEGMENTATION, transfer=values))
    assert [m.dilation[0] for m in model.classifier.modules() if isinstance(m, nn.Conv2d)
            if max(m.dilation) > 1] == rates  # fmt: skip


# -- what is counted -------------------------------------------------------------------------------
def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def task_of(values, images=12):
    one = cell(values)
    data, model = dataset(one), new_model(one)
    splits = cells.split_of(one)
    return Task(
        model=model, data=data, train=splits.train[:images], validation=splits.validation,
        recipe=cells.recipe_of(one), groups=lambda: groups_of(one, model, None),
        loss=None, seed=0, kind=cells.kind_of(one, "cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("head, block", [("pspnet", "orepa"), ("deeplabv3", "repvgg")])
def test_a_segmenters_training_is_counted_on_the_crops_of_a_step(small, head, block):
    task = task_of(SEGMENTATION | {"transfer": PSP | {"head": head}, "block": block})
    state = copy.deepcopy(task.model.state_dict())
    rows = task.data.train_images[task.train[:4]][:, :, :32, :64]
    twin = copy.deepcopy(task.model).train()
    want = flops(lambda: task.kind.loss(twin, rows, None, {}).backward())
    before = torch.get_rng_state()
    assert training_flops(task) == (want // 4, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, state[k]) for k, value in task.model.state_dict().items())
    assert cells.image_shape(cell(SEGMENTATION, transfer=PSP)) == (3, 32, 64)


def test_what_cannot_be_counted_is_told_before_training(small, tmp_path, monkeypatch):
    def fails(task):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cells.loop, "training_flops", fails)
    monkeypatch.setattr(cells, "fit", lambda *_, **__: pytest.fail("it has been trained"))
    values = {k: v for k, v in RETINA.items() if k != "seed"}
    rows = {"a": {"label": "a"}}
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0], cell=values, rows=rows)
    )
    made = plan(table)
    (planned,) = made.cells.values()
    with pytest.raises(RuntimeError, match="out of memory"):
        run_cell(planned, made.cells, Store(tmp_path), decoders=0)


@pytest.mark.parametrize(
    "head", [RETINA["transfer"], FASTER | {"proposals": 2000}], ids=lambda h: h["head"]
)
def test_a_deployed_detector_is_counted_with_its_head_on_one_image(small, head):
    task = task_of(RETINA | {"transfer": head})
    test = Boxes.test(task.data, "cpu")
    (image,) = tasks.unpadded(next(test.inputs())[:1], test.labels[0][:1])
    assert image.shape[1] < image.shape[2] or image.shape[2] < 96  # not the square that it lies in
    found = task.kind.deployed_report(task.model, test)
    fused, fewer, of_a_box = tasks.deployed_copy(task.model.eval()), [0], 0
    if head["head"] == "faster_rcnn":
        last = fused.model.roi_heads
        last.box_head.register_forward_hook(
            lambda _m, given, _o: fewer.append(2000 - len(given[0]))
        )
        layers = [*last.box_head.parameters(), *last.box_predictor.parameters()]
        of_a_box = 2 * sum(p.numel() for p in layers if p.dim() > 1)
    with torch.no_grad():
        whole = flops(lambda: fused([image]))
        assert found["flops"] == whole + of_a_box * sum(fewer)
        assert found["flops"] > flops(lambda: fused.features(image[None]))
    assert sum(fewer) > 0 or not of_a_box


# -- parameters ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {"data": "digits", "image_size": None, "image_resize": None},
            "data (=digits) with transfer.head=retinanet must be one of coco",
        ),
        ({"transfer": None}, "data (=shapes-coco) needs transfer"),
        ({"transfer": {"head": "fcn"}}, "must be one of cityscapes, shapes-cityscapes"),
        ({"cycle": {"warmup": 1}, "epochs": 3}, "cycle and transfer exclude each other"),
        ({"mixup": 0.2}, "mixup (=0.2) with transfer must be (=0.0)"),
        ({"phases": 2}, "phases (=2) with transfer must be (=1)"),
        ({"transfer": {"head": "retinanet", "crop": [8, 8]}}, "transfer.crop (=[8, 8]) needs"),
        ({"transfer": {"head": "retinanet", "proposals": 8}}, "transfer.proposals (=8) needs"),
        ({"transfer": {"head": "retinanet", "fused": True}}, "transfer.fused (=true) needs start"),
        (
            {"transfer": {"head": "retinanet", "interval": 2}, "protocol": "clean"},
            "transfer.interval (=2) must be 1",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_told(changes, named):
    with pytest.raises(ValueError) as caught:
        cell(RETINA, **changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"drop_last": False}, "needs drop_last=true"),
        ({"transfer": PSP | {"crop": None}}, "transfer.zoom (=[0.75, 1.5]) needs crop"),
        ({"transfer": PSP | {"zoom": [2.0, 1.0]}}, "transfer.zoom (=[2.0, 1.0]) must be"),
        ({"transfer": PSP | {"anchor": 8}}, "transfer.anchor (=8) needs another head"),
        ({"transfer": PSP | {"output_stride": 32, "dilated_blocks": 5}}, "nothing is dilated"),
    ],
)
def test_and_of_segmentation(changes, named):
    with pytest.raises(ValueError) as caught:
        cell(SEGMENTATION, **{"transfer": PSP} | changes)
    assert named in str(caught.value)


def test_a_body_without_stages_is_no_backbone(tmp_path):
    values = dict(title="t", question="q", control="a", seeds=[0],
                  cell={k: v for k, v in RETINA.items() if k != "seed"} | {"width": 1.0},
                  rows={"a": {"label": "a", "set": {"body": "alexnet"}}})  # fmt: skip
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"body=alexnet.*no backbone"):
        load_table(path)


# -- runs ------------------------------------------------------------------------------------------
TABLE = dict(
    title="Transfer", question="q", method="m", proxy="p", control="plain", seeds=[0],
    cell=dict(data="digits", body="resnet18", width=0.125, block="dbb"),
    recipes={
        "classes": dict(data="shapes", train_images=40, held_out=10, batch_size=10, epochs=1,
                        learning_rate=0.01),
        "found": {k: v for k, v in DETECTION.items() if k not in ("seed", "body", "width")}
        | {"epochs": 2, "transfer": FASTER},
        "parted": {k: v for k, v in SEGMENTATION.items() if k not in ("seed", "body", "width")}
        | {"epochs": 2, "transfer": PSP | {"interval": 2}},
    },
    rows={
        "backbone": dict(label="backbone", use=["classes"], hidden=True),
        "plain": dict(label="Detector", use=["found"], start="backbone"),
        "fused": dict(label="Fused", use=["found"], start="backbone",
                      set={"transfer": {"fused": True}}),
        "parted": dict(label="Segmenter", use=["parted"], start="backbone", against="parted"),
    },
)  # fmt: skip


@pytest.mark.slow
def test_a_table_of_both_tasks_is_trained_and_shown(small, tmp_path, monkeypatch):
    with at_home(tmp_path, {"both": json.dumps(TABLE)}):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        results = Results("both", "tiny")
        assert results.train(device="cpu", workers=1).trained == 4
        assert results.metrics == ["mAP", "mIoU"]
        found = {row: results.evidence(row)[0]["result"] for row in results.rows}
        for row, metric in (("plain", "mAP"), ("fused", "mAP"), ("parted", "mIoU")):
            result = found[row]
            assert result["deployed"]["fusing_error"] < 1e-4 and result["versions"]["transfer"]
            assert result["history"][f"test_{metric}"][-1] == result["final"]["selected"]
            assert result["deployed"][f"test_{metric}"] == result["final"]["selected"]
            assert "test_accuracy" not in result["history"]
        assert found["parted"]["history"]["test_mIoU"][0] is None
        size = {row: result["history"]["training_parameters"][0] for row, result in found.items()}
        assert size["fused"] < size["plain"]
        page = Page("both", "tiny")
        shown = page.summary().data
        assert "mAP or mIoU, %" in shown and "accuracy, %" not in shown
        assert "pixel accuracy, %" in page.further().data
        assert "faster_rcnn on resnet18, width × 0.125, dbb, fused" in page.costs().data
        assert "of the whole of it on the first test image" in page.costs().data
        assert not results.comparable


@pytest.mark.slow
@pytest.mark.parametrize("row", ["plain", "parted"])
def test_a_cell_that_is_stopped_at_every_step_is_the_same(small, tmp_path, one_thread, row):
    table = Table.model_validate(TABLE | {"rows": {k: v for k, v in TABLE["rows"].items()
                                                   if k in ("backbone", row)},
                                          "control": row})  # fmt: skip
    results = []
    for name, budget in (("whole", None), ("stopped", 0.0)):
        store, stops = Store(tmp_path / name), 0
        made = plan(table, store)
        for planned in made.cells.values():
            while store.read(planned.key) is None:
                try:
                    run_cell(planned, made.cells, store, deadline=budget, decoders=0)
                except OutOfTime:
                    stops += 1
        results.append(store.read(made.by_row[row, 0])["result_sha256"])
    assert results[0] == results[1] and stops > 6


@pytest.mark.parametrize(
    "values", [RETINA, SEGMENTATION | {"transfer": PSP}], ids=["detection", "segmentation"]
)
def test_a_run_goes_on_from_any_step_bit_for_bit(small, one_thread, values):
    whole, states = with_checkpoints(first := task_of(values))
    again = fit(second := task_of(values), resume=states[1])
    assert len(states) >= 3 and again.history == whole.history
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_the_backbone_of_a_row_is_in_the_key(small):
    one = cell(RETINA)
    keys = {key_of(one, "d"), key_of(one.model_copy(update={"start": "a" * 64}), "d")}
    changed = one.transfer.model_copy(update={"anchor": 8})
    keys.add(key_of(one.model_copy(update={"transfer": changed}), "d"))
    assert len(keys) == 3


def test_curves_of_a_table_of_which_detection_alone_is_run():
    """Of the other metric there is no number at all."""
    results = Results("dbb-table3", "smoke")
    key = results.plan.by_row["detection_base", results.table.seeds[0]]
    history = {"epoch": [0, 1], "test_mAP": [0.1, 0.2]}
    results.__dict__["own"] = {key: {"result": {"history": history}}}
    first, second = figures.curves(results).axes
    (line,) = [one for one in first.lines if not one.get_label().startswith("_")]
    assert line.get_ydata().tolist() == pytest.approx([10, 20])
    assert not second.lines and second.get_legend() is None


@pytest.mark.slow
def test_two_processes_train_both_tasks(drawn, project, in_process):
    """As one does where nothing is drawn at random within a step; a segmenter's head drops out."""
    both = {"block": "dbb", "accumulate": 2}
    found = RETINA | both | {"data": "coco", "data_dir": str(drawn["shapes-coco"])}
    parted = SEGMENTATION | both | {"data": "cityscapes", "transfer": PSP}
    parted |= {"data_dir": str(drawn["shapes-cityscapes"])}
    rows = {}
    for name, values in (("found", found), ("parted", parted)):
        del values["seed"]
        rows[name] = dict(label=name, set=values)
    table = {"cell": {}, "recipes": {}, "rows": rows, "control": "found"}
    project.table("two", json.dumps(TABLE | table))
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m replib run two".split()
    done = subprocess.run(
        [sys.executable, *command, "--profile", "tiny", "--device", "cpu"],
        env=project.environment, cwd=project.folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = Results("two", "tiny")
    together = {row: two.evidence(row)[0] for row in rows}
    two.store.clean()
    alone = Results("two", "tiny")
    alone.train(device="cpu")
    for row, close in (("found", 1e-3), ("parted", 0.1)):
        evidence = together[row]
        assert evidence["context"]["processes"] == 2
        ours, theirs = (e["result"]["history"] for e in (evidence, alone.evidence(row)[0]))
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=close)
        assert evidence["result"]["deployed"]["fusing_error"] < 1e-4
