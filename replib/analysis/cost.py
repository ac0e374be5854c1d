"""What a network costs, counted by shapes: on the device "meta" nothing is computed.

    layout            how many convolutions of which width, on which map
    operations        of one image, also where small kernels are done the cheaper way (Winograd)
    step_cost         parameters, operations and memory of one training step

Operations are those of convolutions and matrix products, by torch's counter, two per multiply-add,
as on a GPU: on a processor the averages of a block are convolutions, too, and would be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib.networks import CONVOLUTIONS

Shape = tuple[int, int, int]  # (C, H, W) of an image
WINOGRAD = 4 / 9  # F(2x2, 3x3): 16 products for 4 outputs of 9 each (Lavin and Gray, CVPR 2016)


def empty(model: nn.Module, images: int, shape: Shape) -> Tensor:
    """Images (images, C, H, W) where the model is, without contents."""
    first = next(model.parameters())
    return torch.empty(images, *shape, device=first.device, dtype=first.dtype)


@contextmanager
def watched(network: nn.Module, see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Call `see(convolution, output)` for every convolution, in the order of use."""
    hooks = [
        module.register_forward_hook(lambda module, given, out: see(module, out))
        for module in network.modules()
        if isinstance(module, CONVOLUTIONS)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def layout(network: nn.Module, shape: Shape) -> list[tuple[int, int, int]]:
    """(convolutions, channels, height of the map) of every stage of a deployed network without
    shortcuts: convolutions in a row that have the same channels and map are a stage."""
    seen: list[tuple[int, int]] = []
    with watched(network, lambda conv, out: seen.append((out.shape[1], out.shape[2]))):
        network(empty(network, 1, shape))
    return [(len([*group]), *stage) for stage, group in groupby(seen)]


@torch.no_grad()
def operations(network: nn.Module, shape: Shape) -> tuple[int, int]:
    """(multiply-adds, multiplications) of a network in eval mode on one image (C, H, W).

    The second where every 3x3 convolution of stride 1 is done by Winograd's F(2x2, 3x3), whose own
    additions are not counted; all else is done directly.
    """
    saved = 0

    def see(conv: nn.Module, out: Tensor) -> None:
        nonlocal saved
        if (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1)):
            saved += round(out.numel() * conv.weight[0].numel() * (1 - WINOGRAD))

    with FlopCounterMode(display=False) as counter, watched(network, see):
        network(empty(network, 1, shape))
    direct = counter.get_total_flops() // 2
    return direct, direct - saved


@dataclass(frozen=True)
class StepCost:
    """parameters: that are trained; statistics: numbers that norms keep beside them; forward and
    step: floating-point operations of one image, forward, and backward too; saved: bytes that
    the forward pass of the whole batch keeps for the backward pass."""

    parameters: int
    statistics: int
    forward: int
    step: int
    saved: int

    @property
    def memory(self) -> int:
        """Bytes that a step of SGD with momentum needs at least: what is saved, and parameters,
        gradients and momentum in float32."""
        return self.saved + 12 * self.parameters


def step_cost(
    model: nn.Module, images: int, shape: Shape, input_gradient: bool = False
) -> StepCost:
    """Of one step of a network or block in train mode, on so many images (C, H, W).

    input_gradient: the images' gradient is asked for too, as a block inside a network is.
    """
    x, outputs = empty(model, images, shape).requires_grad_(input_gradient), []
    with FlopCounterMode(display=False) as counter:
        saved = saved_bytes(model, lambda: outputs.append(model(x)), (x,))
        forward = counter.get_total_flops()
        outputs[0].sum().backward()
        step = counter.get_total_flops()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    statistics = sum(2 * norm.num_features for norm in norms if norm.track_running_stats)
    model.zero_grad()
    return StepCost(parameters, statistics, forward // images, step // images, saved)


def saved_bytes(model: nn.Module, forward: Callable[[], object], inputs: Iterable[Tensor]) -> int:
    """Bytes of the storages that a forward pass keeps for the backward pass, each counted once.

    Those of parameters, buffers and inputs are there anyway and are not counted.
    """
    there = (*model.parameters(), *model.buffers(), *inputs)
    own = {tensor.untyped_storage()._cdata for tensor in there}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no place is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
