"""What the training loop is told of detection and of segmentation (`Task.kind`): how a batch is
augmented, what is minimised, and how a split is scored; plain accuracy has none of these.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib.errors import UserError
from replib.fusing import deployed_copy
from replib.training import loader
from replib.training.data import Dataset
from replib.training.evaluation import Normalise, Split, relative_jump
from replib.transfer.data import IGNORED, boxes_in

SMALLEST = 1.0  # pixel: a box with a smaller side is not trained on


def extra(name: str) -> ModuleType:
    """A module of the optional packages. Raises: UserError, with how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(
            f"{package} is not installed, and scores detection and segmentation: pip install "
            "'replib[transfer]'."
        ) from None


@dataclass(frozen=True)
class Scene:
    """How images with boxes or classes of pixels are augmented: what of it is drawn, and when.

    flip: mirror image with probability 1/2, boxes and classes too.
    crop: (height, width) in pixels of what is cropped, at a random place, out of the image that is
    scaled by a factor between `zoom`, uniform; where the image is smaller, it is in the middle.
    None: whole images, as they are.
    """

    flip: bool = False
    crop: tuple[int, int] | None = None
    zoom: tuple[float, float] = (1.0, 1.0)
    crop_interpolation: str = "bilinear"

    @property
    def resized_crop(self) -> tuple[int, int] | None:
        """Under the name that the loop gives to the size of cropped files."""
        return self.crop

    def draw(
        self, n: int, generator: torch.Generator, size: tuple[int, int] | Tensor, in_channels: int
    ) -> dict[str, Tensor]:
        """Everything random for n images, of (height, width) each or all: `flip` (n,), and `box`
        (n, 4), top, left, height, width as fractions of the image."""
        drawn: dict[str, Tensor] = {}
        if self.crop is not None:
            sides = torch.as_tensor(size).expand(n, 2).double()
            low, high = self.zoom
            scale = low + (high - low) * torch.rand(n, 1, generator=generator, dtype=torch.float64)
            length = torch.tensor(self.crop).double() / (scale * sides)
            place = torch.rand(n, 2, generator=generator, dtype=torch.float64)
            free = 1 - length
            drawn["box"] = torch.cat([torch.where(free > 0, place * free, free / 2), length], 1)
        if self.flip:
            drawn["flip"] = torch.rand(n, generator=generator, dtype=torch.float64) < 0.5
        return drawn

    def apply(self, images: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """As they are: boxes have to be known, so that `loss` mirrors."""
        return images


class Kind:
    """One of the tasks; shared by both."""

    metric: str
    split: type[Split]

    def __init__(self, data: Dataset, device: str, interval: int = 1):
        self.data, self.interval = data, interval
        self.normalise = Normalise(data, device)

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether the network is scored after an epoch, counted from 0."""
        return (epoch + 1) % self.interval == 0 or epoch + 1 == epochs

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, rows: dict[str, Tensor]
    ) -> Tensor:
        """What is minimised: of uint8 images as they were read, and what was drawn for them."""
        raise NotImplementedError

    def score(
        self, model: nn.Module, split: Scored, pause: Callable[[], None] = lambda: None
    ) -> float:
        """The metric, in [0, 1]; model: deployed, in eval mode."""
        return split.scores(model, pause)[self.metric]

    def training_flops(
        self,
        model: nn.Module,
        images: int,
        train: Tensor,
        crop: tuple[int, int] | None,
        device: str,
    ) -> int:
        """Of one training image, forward and backward, where so many of `train` go through the
        network at once, cropped to (height, width) or whole; model: a copy."""
        raise NotImplementedError

    def step_flops(self, model: nn.Module, x: Tensor, labels: Tensor | None) -> int:
        """Of the loss of uint8 images as they are, and of its gradients."""
        with FlopCounterMode(display=False) as counter:
            self.loss(model.train(), x, labels, {}).backward()
        return counter.get_total_flops()

    def deployed_flops(self, model: nn.Module, x: Tensor, labels: Tensor) -> int:
        """Of the network on one image, (1, C, H, W) as `Split` gives it."""
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    @torch.no_grad()
    def deployed_report(self, model: nn.Module, test: Split) -> dict:
        """The fused network: parameters, FLOPs of the first test image, scores on the test split,
        and the error of fusing in what the head is given (in the logits, of segmentation)."""
        model = model.to(test.device).eval()
        fused, x = deployed_copy(model), next(test.inputs())[:8, : len(self.data.mean)]
        pairs = zip(model.features(x), fused.features(x), strict=True)
        return {
            **{f"test_{name}": value for name, value in test.scores(fused).items()},
            "parameters": sum(parameter.numel() for parameter in fused.parameters()),
            "flops": self.deployed_flops(fused, x[:1], test.labels[0][:1]),
            "fusing_error": max(relative_jump(before, after) for before, after in pairs),
        }


class Scored(Split):
    """A split that is scored by more than a count."""

    def scores(
        self, model: nn.Module, pause: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """name -> score, the metric among them; model: deployed, in eval mode."""
        raise NotImplementedError


# -- detection -------------------------------------------------------------------------------------
class Boxes(Scored):
    """Images with boxes; see replib.transfer.data.load_coco."""

    @torch.no_grad()
    def scores(
        self, model: nn.Module, pause: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """COCO's average precision, over IoU from 0.5 to 0.95 and at 0.5 and 0.75; in the pixels of
        the files, by pycocotools."""
        metric = extra("torchmetrics.detection").MeanAveragePrecision(backend="pycocotools")
        for x, labels in zip(self.inputs(), self.labels, strict=True):
            for found, truth in zip(model(unpadded(x, labels)), labels, strict=True):
                boxes, classes, crowd = boxes_in(truth)
                back = truth[0, [3, 2, 3, 2]] / truth[0, [1, 0, 1, 0]]  # width, height; twice
                found = {name: value.cpu() for name, value in found.items()}
                found["boxes"] = found["boxes"] * back.cpu()
                target = {"boxes": boxes, "labels": classes, "iscrowd": crowd.long()}
                metric.update([found], [{name: value.cpu() for name, value in target.items()}])
            pause()
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells what it does
            values = metric.compute()
        # -1 says that there is nothing to find.
        return {
            name: max(0.0, round(values[key].item(), 6))
            for name, key in (("mAP", "map"), ("mAP50", "map_50"), ("mAP75", "map_75"))
        }


def unpadded(x: Tensor, labels: Tensor) -> list[Tensor]:
    """The images of a batch (N, 3, S, S) without what is beside them."""
    sizes = labels[:, 0, :2].long().tolist()
    return [image[:, :height, :width] for image, (height, width) in zip(x, sizes, strict=True)]


class Detection(Kind):
    """Boxes and their classes: the sum of the detector's losses, as torchvision has them."""

    metric, split = "mAP", Boxes

    def training_flops(
        self,
        model: nn.Module,
        images: int,
        train: Tensor,
        crop: tuple[int, int] | None,
        device: str,
    ) -> int:
        """Of the first ones of `train`, padded to the largest of them as in a step. It needs less
        memory than a step: an optimizer's state is not there."""
        chosen = train[:images]
        x = next(loader.batches(self.data.train_images, [chosen], device))
        labels = self.data.train_labels[chosen].to(device)
        with torch.random.fork_rng([device] if device.startswith("cuda") else []):
            torch.manual_seed(0)
            return self.step_flops(model.to(device), x, labels) // images

    def deployed_flops(self, model: nn.Module, x: Tensor, labels: Tensor) -> int:
        """Of the whole detector on an image without what is beside it; see `Detector.layers`."""
        with FlopCounterMode(display=False) as counter:
            model.layers(unpadded(x, labels))
        return counter.get_total_flops()

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, rows: dict[str, Tensor]
    ) -> Tensor:
        inputs = unpadded(self.normalise(images), labels)
        flips = rows["flip"].tolist() if "flip" in rows else [False] * len(inputs)
        targets = []
        for i, (own, flip) in enumerate(zip(labels, flips, strict=True)):
            boxes, classes, crowd = boxes_in(own)
            sides = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= SMALLEST
            boxes, classes = boxes[sides & ~crowd], classes[sides & ~crowd]
            width = own[0, 1]
            boxes = boxes * (own[0, [1, 0, 1, 0]] / own[0, [3, 2, 3, 2]])
            if flip:
                inputs[i] = inputs[i].flip(2)
                boxes = torch.stack(
                    [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1
                )
            targets.append({"boxes": boxes.to(inputs[i].dtype), "labels": classes})
        return sum(value.float() for value in model(inputs, targets).values())


# -- segmentation ----------------------------------------------------------------------------------
class WithClasses:
    """uint8 (N, 4, H, W) -> the same with all but the last channel, the class, standardised."""

    def __init__(self, data: Dataset, device: str, dtype: torch.dtype = torch.float32):
        self.normalise, self.dtype = Normalise(data, device, dtype), dtype

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self.normalise(images[:, :3]), images[:, 3:].to(self.dtype)], 1)


class Maps(Scored):
    """Images with a class for every pixel; see replib.transfer.data.Streets."""

    def __init__(
        self,
        images: loader.Folder,
        labels: Tensor,
        indices: Tensor,
        data: Dataset,
        device: str,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(images, labels, indices, data, device, dtype)
        self.normalise, self.classes = WithClasses(data, device, dtype), len(data.classes)

    @torch.no_grad()
    def scores(
        self, model: nn.Module, pause: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Intersection over union of all pixels of a class, mean over the classes that are in the
        images or are found there (Cordts et al., 2016); and the share of pixels that are right."""
        functional = extra("torchmetrics.functional.classification")
        total = torch.zeros(self.classes, self.classes, dtype=torch.long)
        for x in self.inputs():
            found, truth = model(x[:, :3]).argmax(1), x[:, 3].long()
            total += functional.multiclass_confusion_matrix(
                found.cpu(), truth.cpu(), self.classes, ignore_index=IGNORED
            )
            pause()
        right, union = total.diag(), total.sum(0) + total.sum(1) - total.diag()
        there = union > 0
        iou = right[there].double() / union[there]
        pixels = right.sum().item() / max(1, total.sum().item())
        return {"mIoU": round(iou.mean().item(), 6), "pixel_accuracy": round(pixels, 6)}


class Segmentation(Kind):
    """Cross-entropy of pixels; auxiliary: the weight of that of the second head."""

    metric, split = "mIoU", Maps

    def __init__(self, data: Dataset, device: str, interval: int = 1, auxiliary: float = 0.0):
        super().__init__(data, device, interval)
        self.weights: Sequence[float] = (1.0, auxiliary)

    def training_flops(
        self,
        model: nn.Module,
        images: int,
        train: Tensor,
        crop: tuple[int, int] | None,
        device: str,
    ) -> int:
        """By shapes alone, which takes no memory, whatever the crops. (Averages, which DBB takes by
        convolutions on a processor, are averages there, and not counted.)"""
        sides = crop or self.data.train_images.shape[-2:]
        x = torch.empty(images, 4, *sides, dtype=torch.uint8, device="meta")
        kind = type(self)(self.data, "meta", auxiliary=self.weights[1])
        return kind.step_flops(model.to("meta"), x, None) // images

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, rows: dict[str, Tensor]
    ) -> Tensor:
        if "flip" in rows:
            flip = rows["flip"].view(-1, 1, 1, 1)
            images = torch.where(flip, images.flip(3), images)
        x, classes = self.normalise(images[:, :3]), images[:, 3].long().flatten()
        total = 0.0
        for weight, logits in zip(self.weights, model(x), strict=False):
            # Pixel by pixel: the loss of maps is not deterministic on a GPU.
            flat = logits.float().permute(0, 2, 3, 1).flatten(0, 2)
            summed = F.cross_entropy(flat, classes, ignore_index=IGNORED, reduction="sum")
            total = total + weight * summed / (classes != IGNORED).sum().clamp(min=1)
        return total


def rate_factors(model: nn.Module, stem_rate: float, head_rate: float) -> dict[int, float]:
    """id of a parameter -> the factor on its learning rate: of the body's stem, and of all that is
    not of the body."""
    body = {id(p): 1.0 for p in model.body.parameters()}
    stem = {id(p): stem_rate for p in next(iter(model.body.values())).parameters()}
    return {id(p): head_rate for p in model.parameters()} | body | stem


def scaled_groups(
    groups: list[dict], model: nn.Module, stem_rate: float, head_rate: float
) -> list[dict]:
    """Groups for an optimizer, divided by the factors on their learning rates, without parameters
    that are not trained."""
    factors, out = rate_factors(model, stem_rate, head_rate), []
    for group in groups:
        parts: dict[float, list] = {}
        for parameter in group["params"]:
            if parameter.requires_grad:
                parts.setdefault(factors[id(parameter)], []).append(parameter)
        for factor, parameters in sorted(parts.items()):
            scale = group.get("lr_scale", 1.0) * factor
            own = {"lr_scale": scale} if not math.isclose(scale, 1.0) else {}
            rest = {k: v for k, v in group.items() if k not in ("params", "lr_scale")}
            out.append({"params": parameters} | rest | own)
    return out
