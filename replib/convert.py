"""Convolutions of any network into blocks: `convert`."""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from replib import kernels
from replib.blocks import BLOCKS, RepBlock
from replib.branches import Norm
from replib.fusing import deploy_method, units
from replib.kernels import Kernel
from replib.networks import (
    CONVOLUTIONS,
    TRANSPOSED,
    Record,
    computes_as_its_class,
    norm_affine,
    norms_after,
    record,
    replaced,
    tied,
    unique_modules,
    without_norm,
)

Where = str | type | Callable[[str, nn.Module], bool]
FROZEN = "; its frozen statistics will move in training, keep_norm=True leaves them"


def convert(
    model: nn.Module,
    block: str = "dbb",
    where: Where | None = None,
    init: str = "preserve",
    keep_norm: bool = False,
    **options,
) -> nn.Module:
    """A copy in which convolutions are blocks of a family; the model is left as it is.

    block: a key of `BLOCKS`; options: the family's own.
    where: a pattern of names ("layer3.*"), a class, or (name, module) -> bool; by default every
    convolution larger than 1x1 (of 1x1, for a family of 1x1 blocks).
    init: "preserve" keeps the function in eval mode: the main branch takes the old kernel less the
    new side branches. "paper" leaves the block as its family draws it.
    keep_norm: False absorbs the norm that alone consumes a convolution's output, as found by
    tracing the network; it becomes an identity. True leaves every norm where it is.
    `.conversion` of the copy is the report: a record {name, class, became, reason} for every
    convolution and every absorbed norm, where became is `block`, "Identity" or "kept".
    Raises: ValueError for names that are not known, and where nothing is converted.
    """
    if block not in BLOCKS:
        raise ValueError(f"block (={block!r}) must be one of {', '.join(BLOCKS)}.")
    if init not in ("preserve", "paper"):
        raise ValueError(f"init (={init!r}) must be 'preserve' or 'paper'.")
    family = BLOCKS[block]
    wanted = chooser(where, family)
    norms = {} if keep_norm else norms_after(model, modes=(False, True))
    foreign = {m: (n, u) for n, u in units(model).items() if deploy_method(u) for m in u.modules()}
    names = {module: name for name, module in model.named_modules()}
    others: dict[int, nn.Module] = {}
    report: list[Record] = []
    for name, conv in unique_modules(model, (*CONVOLUTIONS, *TRANSPOSED)):
        reason = None if wanted(name, conv) else "not chosen by `where`"
        reason = reason or computes_as_its_class(conv) or tied(model, conv)
        place, unit = foreign.get(conv, ("", None))
        if reason is None and place:
            reason = f"part of {place} ({type(unit).__name__}), which deploys itself"
        norm = norms.get(conv)
        if reason is None:
            try:
                others[id(conv)] = block_for(conv, norm, family, init, options)
            except (ValueError, TypeError) as error:
                reason = " ".join(str(error).split())
        if reason is not None:
            report.append(record(name, conv, "kept", reason))
            continue
        report.append(record(name, conv, block))
        if norm is not None:
            others[id(norm)] = rest = copy.deepcopy(without_norm(norm))
            moves = "" if isinstance(norm, nn.modules.batchnorm._BatchNorm) else FROZEN
            reason = f"absorbed by {name}{moves}"
            report.append(record(names[norm], norm, type(rest).__name__, reason))
    if not others:
        reasons = Counter(entry["reason"] for entry in report)
        why = "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common(3))
        raise ValueError(f"no convolution was converted to {block}: {why or 'there is none'}.")
    converted = replaced(model, others)
    converted.conversion = report
    return converted


def chooser(where: Where | None, family: type[RepBlock]) -> Callable[[str, nn.Module], bool]:
    """`where` as a predicate."""
    if where is None:
        pointwise = family.default_kernel_size == 1
        return lambda name, conv: (max(conv.kernel_size) == 1) == pointwise
    if isinstance(where, str):
        return lambda name, conv: fnmatch.fnmatchcase(name, where)
    if isinstance(where, type):
        return lambda name, conv: isinstance(conv, where)
    return where


@torch.no_grad()
def block_for(
    conv: nn.Module, norm: nn.Module | None, family: type[RepBlock], init: str, options: dict
) -> RepBlock:
    """A block with the geometry of a convolution, and with its function for init="preserve"."""
    if not isinstance(conv, CONVOLUTIONS):
        raise ValueError("transposed convolutions have no block")
    weight = conv.weight
    block = family(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=symmetric_padding(conv),
        dilation=conv.dilation,
        groups=conv.groups,
        dims=weight.dim() - 2,
        padding_mode=conv.padding_mode,
        **options,
    )
    block = block.to(weight.device, weight.dtype).train(conv.training)
    trained = weight.requires_grad or (
        norm is not None and any(parameter.requires_grad for parameter in norm.parameters())
    )
    if not trained:  # a frozen layer stays one
        block.requires_grad_(False)
    if init == "preserve":
        bias = torch.zeros_like(weight[:, 0].flatten(1)[:, 0]) if conv.bias is None else conv.bias
        kernel = Kernel(weight, bias, conv.groups, conv.dilation).to(torch.float64)
        main_norm = last_norm(block)
        if norm is not None:
            kernel = kernels.scaled(kernel, *norm_affine(norm))
            if main_norm is not None:  # then the main branch starts as the old pair, nearly
                take_statistics(main_norm, norm)
        keep = norm is not None and main_norm is not None
        block.restore(kernel, "preserving", "keep" if keep else "unit")
    return block


def symmetric_padding(conv: nn.Module) -> tuple[int, ...]:
    """The padding as one number per axis. Raises: ValueError where the two sides differ."""
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    totals = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if any(total % 2 for total in totals):
        raise ValueError(f"padding='same' of kernel {conv.kernel_size} differs on the two sides")
    return tuple(total // 2 for total in totals)


def last_norm(block: RepBlock) -> Norm | None:
    """The norm that the kernel of a block's main branch leaves through, if any."""
    if block.post_norm is not None:
        return block.post_norm
    main = block.main_branch
    last = list(main.children())[-1] if list(main.children()) else main
    return last if isinstance(last, Norm) else None


def take_statistics(ours: Norm, theirs: nn.Module) -> None:
    """Copy slope, statistics and constants of an absorbed norm."""
    layer = ours.norm
    layer.running_mean.copy_(theirs.running_mean)
    layer.running_var.copy_(theirs.running_var)
    layer.eps = theirs.eps
    layer.momentum = getattr(theirs, "momentum", layer.momentum)
    if theirs.weight is not None:
        layer.weight.copy_(theirs.weight)
