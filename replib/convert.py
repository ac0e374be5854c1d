"""Whole networks: convolutions into blocks, blocks into their deployed form, and the proof.

Everything here works on any nn.Module, by the modules that it finds and never by their names: at
the root, nested, used in several places, inside a larger network.
"""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from replib import kernels
from replib.blocks import BLOCKS, RepBlock
from replib.blocks.repmlp import RepMLP
from replib.branches import Norm
from replib.kernels import Kernel

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Where = str | type | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Change:
    """What became of one module: its name, its class before, and why."""

    name: str
    kind: str
    became: str  # a family of BLOCKS, "identity", or "kept"
    reason: str = ""


def outermost_blocks(model: nn.Module) -> dict[str, RepBlock]:
    """The re-parameterizable blocks of a network by name, without those inside another block."""
    if isinstance(model, RepBlock):
        return {"": model}
    found: dict[str, RepBlock] = {}
    for name, child in model.named_children():
        inner = outermost_blocks(child)
        found |= {f"{name}.{rest}".rstrip("."): block for rest, block in inner.items()}
    return found


def replaced(model: nn.Module, others: dict[int, nn.Module]) -> nn.Module:
    """A copy of a network in which modules, by their id, are others.

    deepcopy takes what its memo already holds, also at the root and where one module is used in
    several places.
    """
    return copy.deepcopy(model, dict(others))


def fuse(model: nn.Module) -> nn.Module:
    """A deployed copy: every block becomes one plain convolution; the model is left as it is.

    Raises: ValueError in train mode, where the output depends on the batch and no plain
    convolution can equal it.
    """
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"{training[0]} is in train mode (so are {len(training) - 1} other modules): "
            "call model.eval() before fusing."
        )
    blocks = [*outermost_blocks(model).values()]
    blocks += [module for module in model.modules() if isinstance(module, RepMLP)]
    fused = replaced(model, {id(block): block.deploy() for block in blocks})
    vars(fused).pop("conversion", None)  # a record of `convert`; the result holds no class of ours
    return fused


# -- from plain convolutions to blocks ------------------------------------------------------------
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
    `model.conversion` of the copy lists every convolution and absorbed norm with what became of
    it and why.
    Raises: ValueError for names that are not known, and where nothing is converted.
    """
    if block not in BLOCKS:
        raise ValueError(f"block (={block!r}) must be one of {', '.join(BLOCKS)}.")
    if init not in ("preserve", "paper"):
        raise ValueError(f"init (={init!r}) must be 'preserve' or 'paper'.")
    family = BLOCKS[block]
    wanted = chooser(where, family)
    norms = {} if keep_norm else norms_after(model)
    others: dict[int, nn.Module] = {}
    changes: list[Change] = []
    for name, conv in unique_modules(model, (*CONVOLUTIONS, nn.modules.conv._ConvTransposeNd)):
        kind = type(conv).__name__
        if not wanted(name, conv):
            changes.append(Change(name, kind, "kept", "not chosen by `where`"))
            continue
        norm = norms.get(conv)
        try:
            others[id(conv)] = block_for(conv, norm, family, init, options)
        except (ValueError, TypeError) as error:
            changes.append(Change(name, kind, "kept", " ".join(str(error).split())))
            continue
        changes.append(Change(name, kind, block))
        if norm is not None:
            others[id(norm)] = nn.Identity().train(norm.training)
            names = {id(module): name for name, module in model.named_modules()}
            changes.append(
                Change(names[id(norm)], type(norm).__name__, "identity", f"absorbed by {name}")
            )
    if not others:
        reasons = Counter(change.reason for change in changes)
        why = "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common(3))
        raise ValueError(f"no convolution was converted to {block}: {why or 'there is none'}.")
    converted = replaced(model, others)
    converted.conversion = changes
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


def unique_modules(model: nn.Module, kinds: tuple[type, ...]):
    """(name, module) of the modules of some kinds, without those inside a block."""
    inside = {id(m) for block in outermost_blocks(model).values() for m in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and id(module) not in inside:
            yield name, module


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


def is_foldable_norm(module: nn.Module) -> bool:
    """A batch norm with running statistics: torch's, SyncBatchNorm, or a frozen one."""
    known = isinstance(module, nn.modules.batchnorm._BatchNorm)
    frozen = type(module).__name__ == "FrozenBatchNorm2d"  # torchvision and detectron2
    return (known or frozen) and getattr(module, "running_var", None) is not None


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(factor, shift) of a norm in eval mode, in float64."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()


def take_statistics(ours: Norm, theirs: nn.Module) -> None:
    """Copy slope, statistics and constants of an absorbed norm."""
    layer = ours.norm
    layer.running_mean.copy_(theirs.running_mean)
    layer.running_var.copy_(theirs.running_var)
    layer.eps = theirs.eps
    layer.momentum = getattr(theirs, "momentum", layer.momentum)
    if theirs.weight is not None:
        layer.weight.copy_(theirs.weight)


class FlowTracer(fx.Tracer):
    """A symbolic tracer that steps into everything but torch's own layers and our blocks."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = (*CONVOLUTIONS, RepBlock)
        return (
            isinstance(module, known)
            or is_foldable_norm(module)
            or super().is_leaf_module(module, name)
        )


def norms_after(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """convolution -> the norm that alone consumes its output, each used once.

    Found by symbolic tracing; a part that cannot be traced (its control flow depends on data) is
    searched child by child.
    """
    uses: Counter[nn.Module] = Counter(
        module for parent in model.modules() for module in parent._modules.values() if module
    )
    found: dict[nn.Module, nn.Module] = {}

    def search(part: nn.Module) -> None:
        try:
            graph = FlowTracer().trace(part)
        except Exception:  # whatever a model does when it is run on symbols
            for child in part.children():
                search(child)
            return
        modules = dict(part.named_modules())
        calls = Counter(modules.get(n.target) for n in graph.nodes if n.op == "call_module")
        for node in graph.nodes:
            conv = modules.get(node.target) if node.op == "call_module" else None
            users = list(node.users)
            if not isinstance(conv, CONVOLUTIONS) or len(users) != 1:
                continue
            norm = modules.get(users[0].target) if users[0].op == "call_module" else None
            alone = calls[conv] == calls[norm] == 1 and uses[conv] <= 1 and uses[norm] <= 1
            if norm is not None and alone and is_foldable_norm(norm):
                if len(norm.running_var) == conv.out_channels:
                    found[conv] = norm

    search(model)
    return found


# -- the proof -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Check:
    """One comparison: errors relative to the largest float64 output, and what is allowed."""

    name: str
    border: float  # where windows see padding; nan where there is no such place
    interior: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the larger error is within the bound; nan, on either side, is a failure."""
        errors = [e for e in (self.border, self.interior) if e is not None]
        return bool(errors) and all(error <= self.allowed for error in errors)


@dataclass(frozen=True)
class Verification:
    """The verdict on a fused network, end to end and block by block."""

    network: Check
    blocks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when every check holds."""
        return self.network.ok and all(check.ok for check in self.blocks)

    def __str__(self) -> str:
        worst = max(self.blocks, key=lambda c: worst_of(c), default=None)
        lines = [f"{'equal' if self.ok else 'NOT EQUAL'}: {len(self.blocks)} blocks"]
        for title, check in (("end to end", self.network), ("worst block", worst)):
            if check is not None:
                lines.append(
                    f"{title} {check.name}: {worst_of(check):.2e}, allowed {check.allowed:.2e}"
                )
        return "; ".join(lines)


def worst_of(check: Check) -> float:
    """The larger of a check's errors."""
    return max(error for error in (check.border, check.interior) if error is not None)


@torch.no_grad()
def verify(model: nn.Module, fused: nn.Module, example_input) -> Verification:
    """Compare a network and its fused copy with the network in float64.

    example_input: a tensor, or a tuple of arguments. Both networks must be in eval mode. Per
    block, the input is the one that it sees in the float64 run; border and interior are told
    apart. The bound is 16 eps (4 + depth), eps of the model's dtype and depth in blocks; for one
    block depth is 1. It grows with what rounding can do, and stays far below any wrong kernel.
    Raises: ValueError in train mode.
    """
    for name, network in (("model", model), ("fused", fused)):
        if any(module.training for module in network.modules()):
            raise ValueError(f"{name} is in train mode: call .eval() before verifying.")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    exact = copy.deepcopy(model).double()
    blocks, plain = outermost_blocks(model), outermost_blocks(exact)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    checks: list[Check] = []

    def check_block(name: str):
        def hook(block: RepBlock, inputs: tuple[Tensor, ...], wanted: Tensor) -> None:
            deployed = blocks[name].deploy()
            got = deployed(inputs[0].to(dtype)).double()
            checks.append(compared(name, got, wanted, block, allowed(dtype, 1)))

        return hook

    hooks = [block.register_forward_hook(check_block(n)) for n, block in plain.items()]
    wanted = exact(*(in_double(argument) for argument in arguments))
    for hook in hooks:
        hook.remove()
    got = fused(*arguments)
    pairs = list(zip(tensors_of(got), tensors_of(wanted), strict=False))
    if not pairs or len(tensors_of(got)) != len(tensors_of(wanted)):
        return Verification(Check("", None, float("nan"), 0.0), checks)
    error = max(relative_error(g.double(), w) for g, w in pairs)
    network = Check("", None, error, allowed(dtype, len(blocks)))
    return Verification(network, checks)


def allowed(dtype: torch.dtype, depth: int) -> float:
    """The relative error that rounding may leave after `depth` blocks."""
    return 16 * torch.finfo(dtype).eps * (4 + depth)


def in_double(value):
    """Floating-point tensors in float64, anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(in_double(item) for item in value)
    return value


def tensors_of(output) -> list[Tensor]:
    """The floating-point tensors of a structured output, in order."""
    leaves = tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| / max |wanted|; nan where shapes differ."""
    if got.shape != wanted.shape:
        return float("nan")
    if not wanted.numel():
        return 0.0
    scale = wanted.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((got - wanted).abs().max() / scale).item()


def compared(name: str, got: Tensor, wanted: Tensor, block: RepBlock, bound: float) -> Check:
    """Border and interior of one block's output, apart."""
    if got.shape != wanted.shape:
        return Check(name, float("nan"), float("nan"), bound)
    border = torch.ones(wanted.shape[2:], dtype=torch.bool, device=wanted.device)
    g = block.geometry
    inside = tuple(
        slice(-(-p // s), max(size - (-(-p // s)), 0))
        for p, s, size in zip(g.padding, g.stride, wanted.shape[2:], strict=True)
    )
    border[inside] = False
    scale = wanted.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    error = (got - wanted).abs() / scale

    def largest(mask: Tensor) -> float | None:
        return error[..., mask].max().item() if mask.any() else None

    return Check(name, largest(border), largest(~border), bound)
