"""How much of what leaves a layer is the layer's own input, depth by depth.

Where blocks add their input to what they compute, the part that the input has in the variance of
the sum says how deep a network is in effect. In a ResNet it grows with depth, since nothing takes
the sum back to one size; in blocks with a norm behind the sum it does not, unless the scales of the
convolutions shrink with depth. So those of the search for RepOptimizers begin at sqrt(2 / l).

Source: Ding et al., "Re-parameterizing Your Optimizers rather than Architectures", ICLR 2023,
section 4.1 and figure 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from replib.blocks import RepBlock


def spread(x: Tensor) -> Tensor:
    """The variance of a feature map (N, C, H, W) over images and places, mean over channels."""
    return x.transpose(0, 1).flatten(1).double().var(1, unbiased=False).mean()


@torch.no_grad()
def identity_shares(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Path -> variance of the identity path over that of the sum, for every block that has one, in
    train mode and in the order of the network.

    Blocks with a branch "identity" and a norm behind the sum, and torchvision's residual blocks
    without a convolution in the shortcut. Running statistics are left as they are.
    Raises: ValueError where there is no such block.
    """
    found: dict[str, float] = {}
    inputs: dict[str, Tensor] = {}
    hooks = []

    def remember(path: str, of: Callable[[Tensor], Tensor]) -> Callable:
        return lambda module, given: inputs.update({path: of(given[0])})

    def measure(path: str, total: Tensor) -> None:
        found[path] = (spread(inputs[path]) / spread(total)).item()

    for path, module in model.named_modules():
        if isinstance(module, RepBlock) and "identity" in module.branches and module.post_norm:
            hooks += [
                module.register_forward_pre_hook(remember(path, module.branches["identity"])),
                module.post_norm.register_forward_pre_hook(
                    lambda norm, given, path=path: measure(path, given[0])
                ),
            ]
        elif residual(module):
            last = module.bn3 if hasattr(module, "bn3") else module.bn2
            hooks += [
                module.register_forward_pre_hook(remember(path, lambda x: x)),
                last.register_forward_hook(
                    lambda norm, given, out, path=path: measure(path, out + inputs[path])
                ),
            ]
    if not hooks:
        raise ValueError(f"{type(model).__name__} has no block that adds its input to a sum.")
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = model.training
    try:
        model.train()(images)
    finally:
        model.train(training)
        for buffer, value in statistics:
            buffer.copy_(value)
        for hook in hooks:
            hook.remove()
    return found


def residual(module: nn.Module) -> bool:
    """Whether it is a residual block of torchvision whose shortcut is the identity."""
    names = {name for name, _ in module.named_children()}
    return {"conv1", "bn1", "conv2", "bn2", "relu"} <= names and (
        getattr(module, "downsample", True) is None
    )
