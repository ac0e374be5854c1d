"""The effective receptive field: which pixels of an image move the centre of the last feature map.

The receptive field of a deep network says what may be seen; the effective one what is. It is the
gradient of the outputs at the central position with respect to the pixels, averaged over images.
For stacks of small kernels it grows with the square root of the depth only (Luo et al.,
"Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016);
Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022, compare it between kernel sizes.

As in that paper's released code: of the outputs at the centre the positive ones are added up over
channels and images, of their gradients the positive parts over channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES = 50  # of a report, as in the released code
THRESHOLDS = (0.2, 0.3, 0.5, 0.99)  # shares of the whole contribution that areas are told for
MAP = 48  # cells on a side of the map of a report
PIXELS = 2**20  # of a batch of enlarged images


def receptive_field(
    model: nn.Module, batches: Iterable[Tensor], layer: str | None = None
) -> Tensor:
    """What every pixel contributes to the centre of a feature map: (H, W), float64, a mean.

    batches: images (N, C, H, W), normalised, where the model is, all of one size. Take a size that
    gives the map an odd number of positions: of an even one the lower right of the four central
    ones is read. layer: the name of the module whose output (N, C, h, w) is read; by default the
    last one with more than one position, which is what is pooled in the end.
    Raises: ValueError in train mode, for a layer that gives no such map, and without images.
    """
    if training := [name or "the model" for name, m in model.named_modules() if m.training]:
        raise ValueError(f"{training[0]} is in train mode: call model.eval() first.")
    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise ValueError(f"layer (={layer!r}) must be the name of a module, as {[*modules][-1]!r}.")
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and max(output.shape[2:]) > 1:
            seen[:] = [output]

    watched = modules.values() if layer is None else [modules[layer]]
    hooks = [module.register_forward_hook(see) for module in watched]
    total, images = 0.0, 0
    try:
        for batch in batches:
            seen.clear()
            x = batch.detach().requires_grad_()
            with torch.enable_grad():
                model(x)
                if not seen:
                    what = "no layer" if layer is None else f"layer (={layer!r})"
                    raise ValueError(f"{what} gives a map (N, C, h, w) of more than one position.")
                height, width = seen[0].shape[2:]
                centre = seen[0][:, :, height // 2, width // 2].relu().sum()
                (gradient,) = torch.autograd.grad(centre, x)
            total, images = total + gradient.relu().double().sum((0, 1)), images + len(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        raise ValueError("batches is empty: at least one image is needed.")
    return total / images


def shares(field: Tensor) -> Tensor:
    """The part of all contributions that lies in a square around the centre: (side // 2 + 1,).

    Element i is that of the square with 2 i + 1 pixels a side; the last one is 1.
    Raises: ValueError where no pixel contributes.
    """
    if not field.sum() > 0:
        raise ValueError("no pixel moves the centre of the map: its outputs are not positive.")
    height, width = field.shape
    rows = (torch.arange(height, device=field.device) - height // 2).abs()
    columns = (torch.arange(width, device=field.device) - width // 2).abs()
    distance = torch.maximum(rows[:, None], columns[None, :])
    sums = torch.zeros(max(height, width) // 2 + 1, dtype=field.dtype, device=field.device)
    sums.index_add_(0, distance.flatten(), field.flatten())
    return sums.cumsum(0) / field.sum()


def area(parts: Sequence[float], threshold: float, pixels: int) -> float:
    """How much of a square image holds a share of the contributions: the smallest central square.

    parts: those of `shares`; pixels: on a side of the image.
    """
    enough = (i for i, part in enumerate(parts) if part >= threshold)
    return min(1.0, (2 * next(enough, len(parts) - 1) + 1) / pixels) ** 2


def report(model: nn.Module, batches: Iterable[Tensor], pixels: int) -> dict:
    """A measurement as plain data: {"pixels", "images", "shares", "map"}.

    batches: images, which are enlarged (bicubic) to `pixels` a side first. map: the field's means
    over MAP x MAP cells, or over pixels where there are fewer, relative to the largest.
    """
    count = 0

    def enlarged() -> Iterable[Tensor]:
        nonlocal count
        for batch in batches:
            for part in batch.split(max(1, PIXELS // pixels**2)):
                count += len(part)
                yield F.interpolate(part, (pixels, pixels), mode="bicubic")

    field = receptive_field(model, enlarged())
    cells = F.adaptive_avg_pool2d(field[None, None], min(MAP, pixels))[0, 0]
    cells = cells / cells.max()
    return {
        "pixels": pixels,
        "images": count,
        "shares": [float(f"{value:.5g}") for value in shares(field).tolist()],
        "map": [[float(f"{value:.3g}") for value in row] for row in cells.tolist()],
    }
