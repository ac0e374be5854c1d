"""Accuracy of the deployed network, as cheap as it can be while a network is trained.

Evaluation is in float32 whatever the precision of training, on the deployed form: several times
faster than the training form, and what is deployed in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib.fusing import deployed_copy
from replib.training import loader
from replib.training.data import Dataset

BATCH_PIXELS = {"cpu": 2**20, "cuda": 2**22}  # 1024 and 4096 images of 32x32
KEPT_BYTES = 2**29  # a split up to this size is normalised once
REPORTED = 1000  # images on which the error of fusing is measured
VIEWS = {  # of test images, beside themselves (ACNet, table 4)
    "rotated_90": lambda x: x.rot90(1, (2, 3)),
    "rotated_180": lambda x: x.rot90(2, (2, 3)),
    "upside_down": lambda x: x.flip(2),
}


class Normalise:
    """uint8 images (N, C, H, W) on a device -> standardised per channel, channels last."""

    def __init__(self, data: Dataset, device: str, dtype: torch.dtype = torch.float32):
        shape = (1, -1, 1, 1)
        self.mean = torch.tensor(data.mean, dtype=dtype, device=device).view(shape)
        self.deviation = torch.tensor(data.deviation, dtype=dtype, device=device).view(shape)

    def __call__(self, images: Tensor) -> Tensor:
        x = (images.to(self.mean.dtype) / 255 - self.mean) / self.deviation
        return x.contiguous(memory_format=torch.channels_last)


class Split:
    """Images and labels to evaluate on; normalised once where they are few.

    images: uint8 (N, C, H, W), or a folder's; indices: those that count.
    """

    def __init__(
        self,
        images: Tensor | loader.Folder,
        labels: Tensor,
        indices: Tensor,
        data: Dataset,
        device: str,
        dtype: torch.dtype = torch.float32,
    ):
        height, width = images.shape[-2:]
        batch = max(1, BATCH_PIXELS[torch.device(device).type] // (height * width))
        self.images, self.indices, self.device = images, indices, device
        if isinstance(images, Tensor):
            self.images, self.indices = images.to(device), indices.to(device)
        self.chunks = self.indices.split(batch)
        self.labels = labels[indices].to(device).split(batch)
        self.normalise = Normalise(data, device, dtype)
        few = 4 * len(indices) * images.shape[1] * height * width <= KEPT_BYTES
        self.kept: list[Tensor] | None = [] if few else None

    @classmethod
    def test(cls, data: Dataset, device: str, dtype: torch.dtype = torch.float32) -> Split:
        """The test split of a data set."""
        everything = torch.arange(len(data.test_labels))
        return cls(data.test_images, data.test_labels, everything, data, device, dtype)

    def __len__(self) -> int:
        return len(self.indices)

    def inputs(self) -> Iterator[Tensor]:
        """The normalised images, batch by batch."""
        if self.kept:
            yield from self.kept
            return
        found = []
        for images in loader.batches(self.images, self.chunks, self.device):
            x = self.normalise(images)
            if self.kept is not None:
                found.append(x)
            yield x
        if self.kept is not None:
            self.kept = found


def accuracy(
    model: nn.Module,
    split: Split,
    pause: Callable[[], None] = lambda: None,
    view: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """The fraction of images whose largest logit is their label; model in eval mode.

    pause: called between batches; it may raise. view: what is done to images (N, C, H, W) first.
    """
    return right(model, split, pause, view).item() / len(split)


@torch.no_grad()
def right(
    model: nn.Module,
    split: Split,
    pause: Callable[[], None] = lambda: None,
    view: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """How many images `accuracy` counts, as a 0-dim int64 tensor."""
    count = torch.zeros((), dtype=torch.long, device=split.device)
    if not len(split):
        return count
    for x, labels in zip(split.inputs(), split.labels, strict=True):
        count += (model(view(x)).argmax(1) == labels).sum()
        pause()
    return count


def deployed_report(model: nn.Module, split: Split, views: Sequence[str] = ()) -> dict:
    """The fused network: parameters, FLOPs per image, test accuracy, and the error of fusing.

    views: of `VIEWS`; the accuracy on each is there too.
    """
    model = model.to(split.device).eval()
    fused, x = deployed_copy(model), next(split.inputs())[:REPORTED]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fused(x[:1])
    with torch.no_grad():
        error = relative_jump(model(x), fused(x))
    report = {
        "test_accuracy": accuracy(fused, split),
        "parameters": sum(parameter.numel() for parameter in fused.parameters()),
        "flops": counter.get_total_flops(),
        "fusing_error": error,
    }
    if views:
        report["views"] = {name: accuracy(fused, split, view=VIEWS[name]) for name in views}
    return report


def relative_jump(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|, of logits."""
    return float(f"{((after - before).abs().max() / before.abs().max()).item():.4g}")
