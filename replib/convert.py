"""Whole networks: from blocks to their deployed form."""

from __future__ import annotations

import copy

from torch import nn

from replib.blocks import RepBlock
from replib.blocks.repmlp import RepMLP


def outermost_blocks(model: nn.Module) -> dict[str, RepBlock]:
    """The re-parameterizable blocks of a network by name, without those inside another block."""
    if isinstance(model, RepBlock):
        return {"": model}
    found: dict[str, RepBlock] = {}
    for name, child in model.named_children():
        inner = outermost_blocks(child)
        found |= {f"{name}.{rest}".rstrip("."): block for rest, block in inner.items()}
    return found


def fuse(model: nn.Module) -> nn.Module:
    """A deployed copy: every block becomes one plain convolution; the model is left as it is.

    The root may be a block itself, and a block used in several places stays one module.
    Raises: ValueError in train mode, where the output depends on the batch and no plain
    convolution can equal it.
    """
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"{training[0]} is in train mode (so are {len(training) - 1} other modules): "
            "call model.eval() before fusing."
        )
    # A copy in which every block is replaced by its convolution: deepcopy takes what the memo
    # already holds, also at the root and where one block is used in several places.
    blocks = [*outermost_blocks(model).values()]
    blocks += [module for module in model.modules() if isinstance(module, RepMLP)]
    deployed = {id(block): block.deploy() for block in blocks}
    return copy.deepcopy(model, deployed)
