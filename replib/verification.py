"""The proof that a deployed network is the network: block by block and end to end, in numbers."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from replib.blocks import RepBlock
from replib.fusing import units
from replib.networks import (
    CONVOLUTIONS,
    TRANSPOSED,
    in_train_mode,
    is_foldable_norm,
    norms_after,
    outermost,
    without_norm,
)

HOLDERS = (RepBlock, *CONVOLUTIONS, *TRANSPOSED)  # what a norm may be folded into


@dataclass(frozen=True)
class Check:
    """One comparison: the largest errors, relative to the largest float64 output.

    border, interior: where windows see padding, and elsewhere; None where there is no such place.
    allowed: what rounding may leave.
    """

    name: str
    border: float | None
    interior: float | None
    allowed: float

    @property
    def error(self) -> float:
        """The larger of the two; nan where nothing was compared, or something is not a number."""
        errors = [e for e in (self.border, self.interior) if e is not None]
        return max(errors) if errors and not any(map(math.isnan, errors)) else math.nan

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound; nan, on either side, is a failure."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Verification:
    """The verdict on a fused network, end to end and block by block."""

    network: Check
    blocks: list[Check] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)  # blocks that the input never reached
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when every check holds, and every block was reached."""
        return self.network.ok and all(check.ok for check in self.blocks) and not self.unseen

    def __str__(self) -> str:
        failed = [check for check in self.blocks if not check.ok]
        parts = [f"{'equal' if self.ok else 'NOT EQUAL'}: {len(self.blocks)} blocks"]
        parts += [f"{len(failed)} of them differ"] if failed else []
        worst = max(failed or self.blocks, key=lambda c: c.error / c.allowed, default=None)
        for title, check in (("end to end", self.network), ("worst block", worst)):
            if check is not None:
                name = f"{title} {check.name}".rstrip()
                parts.append(f"{name}: {check.error:.2e}, allowed {check.allowed:.2e}")
        parts += [f"never reached: {', '.join(self.unseen)}"] if self.unseen else []
        return "; ".join(parts + self.notes)


@torch.no_grad()
def verify(model: nn.Module, fused: nn.Module, example_input) -> Verification:
    """Compare a network and its fused copy with the network in float64.

    example_input: a tensor, a tuple of arguments, or a dictionary of keyword arguments. Both
    networks must be in eval mode, and of one floating-point type. Every block, with the norm that
    was folded into it, is compared on the input that it sees in the float64 run, border and
    interior apart; then the outputs end to end.
    The bound is 16 eps (4 + depth), 2 eps (4 + depth) in half precision, eps of the model's dtype
    and depth in blocks; for one block depth is 1. It grows with what rounding can do, and stays far
    below any wrong kernel; where the network itself loses more in its dtype than that, four times
    its own error is allowed, up to a quarter. Errors are relative to the largest output,
    of a block whose outputs are all 0 to its largest input.
    Detections are matched instead, see `detections`.
    Raises: ValueError in train mode.
    """
    for name, network in (("model", model), ("fused", fused)):
        if training := in_train_mode(network):
            raise ValueError(
                f"{name} is in train mode ({training[0]}): call .eval() before verifying."
            )
    arguments, keywords = (
        example_input if isinstance(example_input, tuple) else (example_input,),
        {},
    )
    if isinstance(example_input, dict):
        arguments, keywords = (), example_input

    def run(network: nn.Module, double: bool = False):
        """On its own copy of the input, which some networks overwrite."""
        given = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (arguments, keywords))
        given = in_double(given) if double else given
        return network(*given[0], **given[1])

    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    checks: dict[str, Check] = {}
    notes: list[str] = []
    with torch.autocast(device_of((arguments, keywords)), enabled=False):
        try:
            watch = Watch(copy.deepcopy(model).double(), fused, checks)
            wanted = run(watch.exact, double=True)
        except RuntimeError as error:  # casts of its own, say
            watch.end()
            checks.clear()
            notes.append(f"it cannot be run in float64 ({str(error).splitlines()[0][:80]})")
            watch = Watch(copy.deepcopy(model), fused, checks)
            wanted = run(watch.exact)
        apart = [name for name in watch.blocks if name not in checks and watch.alone(name)]
    watch.end()
    got, itself = run(fused), run(model)
    network, more = end_to_end(got, itself, wanted, allowed(dtype, len(watch.blocks)))
    notes += more
    if apart:
        notes.append(f"not reached by this input, compared alone: {', '.join(apart)}")
    unseen = [name for name in watch.blocks if name not in checks]
    return Verification(network, list(checks.values()), unseen, notes)


class Watch:
    """Hooks that compare every block of the float64 network with its deployed layer."""

    def __init__(self, exact: nn.Module, fused: nn.Module, checks: dict[str, Check]):
        self.exact, self.checks = exact, checks
        self.places, names = dict(fused.named_modules()), {m: n for n, m in exact.named_modules()}
        self.folded = {
            block: norm
            for block, norm in norms_after(exact, HOLDERS).items()
            if not is_foldable_norm(self.places.get(names[norm], nn.Identity()))
        }
        known = set(units(exact).values())
        found = outermost(exact, lambda module: module in self.folded or module in known)
        # What a container deployed together with others has no place of its own: it is seen end
        # to end.
        self.blocks = {
            name: block
            for name, block in found.items()
            if type(self.places.get(name, nn.Module())) is not nn.Module
        }
        self.calls: dict[nn.Module, list[tuple]] = {block: [] for block in self.blocks.values()}
        self.hooks = []
        for name, block in self.blocks.items():
            hook = block.register_forward_hook(self.at_block(name), with_kwargs=True)
            self.hooks.append(hook)
            if block in self.folded:
                norm = self.folded[block]
                self.hooks.append(norm.register_forward_hook(self.at_norm(name, block)))

    def at_block(self, name: str):
        def hook(block: nn.Module, arguments: tuple, keywords: dict, output) -> None:
            if block in self.folded:
                self.calls[block].append((arguments, keywords))
            else:
                self.compare(name, (arguments, keywords), output)

        return hook

    def at_norm(self, name: str, block: nn.Module):
        def hook(norm: nn.Module, arguments: tuple, output: Tensor) -> None:
            self.compare(name, self.calls[block].pop(), output)

        return hook

    def compare(self, name: str, call: tuple, wanted) -> None:
        """A deployed layer on the input of its block; of several calls the worst counts."""
        layer, block = self.places[name], self.blocks[name]
        dtype = next((p.dtype for p in layer.parameters()), torch.float32)
        arguments, keywords = cast(call, dtype)
        got = layer(*arguments, **keywords)
        if block in self.folded:
            got = without_norm(self.folded[block])(got)
        bound = allowed(dtype, 1)
        if isinstance(wanted, Tensor):
            x = next(leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor))
            check = compared(name, got.double(), wanted.double(), layer, x, bound)
        else:
            check = Check(name, None, structured_error(got, wanted), bound)
        before = self.checks.get(name)
        if before is None or not check.error <= before.error:
            self.checks[name] = check

    def alone(self, name: str) -> bool:
        """Run a block that was not reached (a head for training only) on noise, if that can be."""
        block, layer = self.blocks[name], self.places[name]
        if not isinstance(layer, CONVOLUTIONS):
            return False
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        shape = (2, layer.in_channels, *(2 * size + 3 for size in reach))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        like = next(parameter for parameter in block.parameters())
        out = block(noise.to(like.device, like.dtype))
        if block in self.folded:
            self.folded[block](out)
        return True

    def end(self) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()


def allowed(dtype: torch.dtype, depth: int) -> float:
    """The relative error that rounding may leave after `depth` blocks, at most a quarter."""
    # In half precision sums are made in float32, and one rounding is left; a float64 reference
    # rounds as well.
    units = {torch.float64: 32, torch.float32: 16}.get(dtype, 2)
    return min(units * torch.finfo(dtype).eps * (4 + depth), 0.25)


def device_of(values) -> str:
    """Where the tensors of some arguments lie."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return next((tensor.device.type for tensor in tensors), "cpu")


def cast(values, dtype: torch.dtype):
    """Floating-point tensors in another dtype, anything else as it is."""

    def one(value):
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return tree_map(one, values)


def in_double(values):
    """Floating-point tensors in float64, anything else as it is."""
    return cast(values, torch.float64)


# -- comparisons -----------------------------------------------------------------------------------
def relative_error(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| / max |wanted|; nan for other shapes. -inf, a masked logit, is equal."""
    if got.shape != wanted.shape:
        return math.nan
    if not wanted.numel():
        return 0.0
    if wanted.is_complex():
        got, wanted = torch.view_as_real(got), torch.view_as_real(wanted)
    got, wanted = got.double(), wanted.double()
    same = (got == wanted) & wanted.isneginf()
    finite = wanted.masked_fill(same, 0).abs()
    scale = finite.max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((got - wanted).masked_fill(same, 0).abs().max() / scale).item()


def end_to_end(got, itself, wanted, bound: float, slack: float = 4) -> tuple[Check, list[str]]:
    """The outputs of a fused network and of the network itself against the float64 ones.

    slack: how many times as far as the network itself they may be, where that is further away.
    """
    if is_detections(wanted):
        return detections(got, itself, wanted, bound)
    error, own = structured_error(got, wanted), structured_error(itself, wanted)
    notes = []
    if own > bound / slack:
        notes.append(f"the network itself is {own:.2e} away from float64")
        bound = max(bound, min(slack * own, 0.25))  # more than a quarter is no proof of anything
    differ, own_differ = share_differing(got, wanted), share_differing(itself, wanted)
    if differ > 2 * own_differ + 0.05:
        notes.append(f"{differ:.0%} of its whole numbers differ")
        error = math.nan
    return Check("", None, error, bound), notes


def structured_error(got, wanted) -> float:
    """The largest error over the tensors of an output; nan where structures differ."""
    if tree_structure(got) != tree_structure(wanted):
        return math.nan
    left, right = tensors(got), tensors(wanted)
    errors = [
        relative_error(a, b)
        for a, b in zip(left, right, strict=True)
        if b.is_floating_point() or b.is_complex()
    ]
    none = math.nan if not right else 0.0  # nothing at all, or whole numbers only
    return max(errors, key=lambda error: (math.isnan(error), error), default=none)


def share_differing(got, wanted) -> float:
    """The share of whole numbers (labels, masks) that differ: near ties may."""
    pairs = zip(tensors(got), tensors(wanted), strict=False)
    whole = [(a, b) for a, b in pairs if not (b.is_floating_point() or b.is_complex())]
    if any(a.shape != b.shape for a, b in whole):
        return 1.0
    total = sum(b.numel() for _, b in whole)
    return sum((a != b).sum().item() for a, b in whole) / max(total, 1)


def tensors(output) -> list[Tensor]:
    """The tensors of a structured output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def is_detections(output) -> bool:
    """Whether an output is a list of detections, one dictionary per image, as torchvision's."""
    return (
        isinstance(output, list | tuple)
        and bool(output)
        and all(isinstance(image, dict) and {"boxes", "scores"} <= image.keys() for image in output)
    )


def detections(got, itself, wanted, bound: float) -> tuple[Check, list[str]]:
    """The share of detections (boxes and scores) that have no counterpart.

    Ranking and suppressing boxes is not continuous: with near ties a network in its own dtype
    keeps other boxes than in float64. So the share is compared with that of the network itself.
    """
    share, own = unmatched(got, wanted, bound), unmatched(itself, wanted, bound)
    total = sum(len(image["scores"]) for image in wanted)
    notes = [f"{total} detections, {share:.0%} without counterpart (the network itself: {own:.0%})"]
    if not total or own > 0.5:
        notes.append("too few to tell by: verify in float64, or with an input that it recognises")
        return Check("", None, math.nan, 0.0), notes
    return Check("", None, share, min(2 * own + 0.05, (1 + own) / 2)), notes


def unmatched(got, wanted, bound: float) -> float:
    """The share of wanted detections that no found one of the same label is equal to."""
    if len(got) != len(wanted):
        return 1.0
    missing = total = 0
    for found, image in zip(got, wanted, strict=True):
        size = image["boxes"].abs().max() if len(image["boxes"]) else 1.0
        near = torch.cdist(image["boxes"], found["boxes"].double(), p=math.inf) <= bound * size
        scores = (image["scores"][:, None] - found["scores"].double()).abs()
        near &= scores <= bound * image["scores"].abs()[:, None]
        if "labels" in image:
            near &= image["labels"][:, None] == found["labels"]
        missing += (~near.any(1)).sum().item() + max(len(found["boxes"]) - len(near), 0)
        total += len(near)
    return min(missing / max(total, 1), 1.0)


def compared(
    name: str, got: Tensor, wanted: Tensor, layer: nn.Module, x: Tensor, bound: float
) -> Check:
    """Border and interior of one block's output, apart."""
    if got.shape != wanted.shape:
        return Check(name, math.nan, math.nan, bound)
    if not wanted.numel():
        return Check(name, None, 0.0, bound)
    scale = wanted.abs().max()
    if scale == 0:  # a slope of 0 ends it, as residual branches may begin
        scale = x.abs().max().double()
    error = (got - wanted).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)
    plain = isinstance(layer, CONVOLUTIONS) and isinstance(layer.padding, tuple)
    if not plain or not wanted.dim() == x.dim() == len(layer.kernel_size) + 2:
        return Check(name, None, error.max().item(), bound)
    border = torch.ones(wanted.shape[2:], dtype=torch.bool, device=wanted.device)
    inside = []
    for p, s, k, d, size, length in zip(
        layer.padding, layer.stride, layer.kernel_size, layer.dilation, wanted.shape[2:],
        x.shape[2:], strict=True,
    ):  # fmt: skip
        # Output i sees inputs i s - p ... i s - p + d (k - 1).
        last = (length - 1 + p - d * (k - 1)) // s
        inside.append(slice(-(-p // s), min(last + 1, size)))
    border[tuple(inside)] = False

    def largest(mask: Tensor) -> float | None:
        return error[..., mask].max().item() if mask.any() else None

    return Check(name, largest(border), largest(~border), bound)
