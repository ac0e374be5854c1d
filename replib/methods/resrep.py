"""ResRep: compactors forget channels and are merged away; what stays learns on undisturbed.

Behind each convolution that is to lose channels stands a compactor, a square matrix that begins as
the identity (replib.blocks.compactor). In training its rows are pulled towards zero by a group
lasso; rows that a mask has chosen lose the gradient of the task as well, and vanish. In the end
compactors and norms are merged into the convolutions, without the rows that are zero.

Source: Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting", ICCV
2021, section 3, and its released code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib import kernels, parallel
from replib.blocks import RepBlock
from replib.blocks.compactor import Compacted
from replib.blocks.convbn import ConvBN
from replib.kernels import Kernel
from replib.narrowing import (
    Cost,
    Kept,
    Span,
    Targets,
    emptied,
    narrowed,
    plain,
    smallest,
    spans,
    uniform,
)
from replib.networks import norm_affine, without_norm
from replib.training.optimisation import parameter_groups

VERSION = 1  # raise when the numbers of a pruned network change

FORMS = {
    "matrix": "a compactor behind the norm, as published",
    "vector": "a factor per channel in its place",
    "filters": "no compactor: the rows are the convolution's own filters",
}
DROPS = {
    "zero": "rows whose norm is below `threshold`, as published",
    "target": "the smallest rows, until the FLOPs are those of the target",
}
THRESHOLD = 1e-5
RULES = {
    "magnitude": "channels of the smallest filters go, norms folded in, until the target is met",
    "uniform": "every width is the same fraction of what it was",
}


class ResRep:
    """Pruning over the training of a network, for one's own loop.

        resrep = ResRep(model, images, target=0.471, warmup=5 * len(batches))
        optimizer = torch.optim.SGD(resrep.parameter_groups(1e-4), lr=0.01, momentum=0.9)
        for epoch in range(480):
            for x, y in batches:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                resrep.after_backward()
                optimizer.step()
                resrep.after_step()
        pruned = resrep.pruned()

    The model is changed in place: compactors are appended, its function stays. It may hold layers
    of torch.nn, blocks of this library, or both. images (N, C, H, W): an example of its inputs, on
    whose first one FLOPs are counted.
    target: the share of the FLOPs that is to be left, counted on deployed networks.
    targets: see `replib.narrowing.spans`; by default every convolution whose channels a single
    layer takes in, such as the inner ones of residuals.
    strength: of the lasso. warmup, interval: the mask is chosen every `interval` steps after so
    many steps; rows: how many more channels it may take each time.
    form: of `FORMS`. reset: whether masked rows lose the gradient of the task; without, there is no
    mask, and the lasso alone pulls. momentum: of the compactors in the optimizer.
    drop: of `DROPS`, what is pruned in the end; "target" for what never gets to zero.
    measure: epochs from one full measurement of `measured` to the next.
    Of several processes all do the same: wrap the model after this, and call `pruned` in all, which
    prunes the network of the first one. With a gradient scaler, unscale before `after_backward`.
    Raises: ValueError for other values, and where no channels can be removed.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        target: float,
        strength: float = 1e-4,
        warmup: int = 0,
        interval: int = 200,
        rows: int = 4,
        targets: Targets = None,
        form: str = "matrix",
        reset: bool = True,
        momentum: float = 0.99,
        drop: str = "zero",
        threshold: float = THRESHOLD,
        measure: int = 1,
    ):
        for name, value, known in (("form", form, FORMS), ("drop", drop, DROPS)):
            if value not in known:
                raise ValueError(f"{name} (={value!r}) must be one of {', '.join(known)}.")
        for name, value in (("interval", interval), ("rows", rows), ("measure", measure)):
            if value < 1:
                raise ValueError(f"{name} (={value}) must be at least 1.")
        self.model, self.images, self.target = model, images[:1].clone(), target
        self.strength, self.warmup, self.interval, self.most = strength, warmup, interval, rows
        self.form, self.reset, self.momentum = form, reset, momentum
        self.drop, self.threshold, self.measure = drop, threshold, measure
        self.current = 0
        self.spans = spans(model, targets)
        check_removable(model, self.spans, self.images)
        self.cost = Cost(model, self.spans, self.images)
        least = self.cost(dict.fromkeys(self.spans, 1)) / self.cost.total
        if not least <= target < 1:
            raise ValueError(
                f"target (={target:g}) must be below 1 and at least {least:.4g}, the share of the "
                "FLOPs that is left with one channel in each of the targets."
            )
        self.compactors = {} if form == "filters" else appended(model, self.spans, form)
        self.rows = {name: self.rows_of(name) for name in self.spans}
        self.masks = {name: torch.ones(span.width) for name, span in self.spans.items()}
        self.steps = 0

    def rows_of(self, name: str) -> nn.Parameter:
        """The parameter whose rows are the channels of a span. Raises: ValueError."""
        if self.compactors:
            return self.compactors[name].weight
        conv = self.model.get_submodule(name)
        if isinstance(conv, RepBlock) and not isinstance(conv, ConvBN):
            raise ValueError(f"form (='filters'): {name} has branches, so no filters of its own.")
        return conv.main_branch[0].weight if isinstance(conv, RepBlock) else conv.weight

    @property
    def tensors(self) -> list[Tensor]:
        """What a step reads and `after_step` changes in place: the masks, where the model is."""
        for name, rows in self.rows.items():
            self.masks[name] = self.masks[name].to(rows.device, rows.dtype)
        return list(self.masks.values())

    def parameter_groups(
        self, weight_decay: float, decay: str = "matrices", bias_rate: float = 1.0
    ) -> list[dict]:
        """Groups for an SGD optimizer: those of replib.training.optimisation.parameter_groups, and
        the compactors, which do not decay and have a momentum of their own."""
        own = {compactor.weight for compactor in self.compactors.values()}
        groups = parameter_groups(self.model, weight_decay, decay, bias_rate)
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in own]
        groups = [group for group in groups if group["params"]]
        if own:
            params = [compactor.weight for compactor in self.compactors.values()]
            groups.append({"params": params, "weight_decay": 0.0, "momentum": self.momentum})
        return groups

    # -- in every step -----------------------------------------------------------------------------
    @torch.no_grad()
    def after_backward(self) -> None:
        """Call after backward (and clipping), before the step: takes the gradient of the task from
        masked rows, and adds that of the lasso to all, 0 for a row that is zero.

        Nothing waits for the device.
        """
        for rows, mask in zip(self.rows.values(), self.tensors, strict=True):
            if rows.grad is None:
                continue
            if self.reset:
                rows.grad.mul_(mask.view(-1, *(1,) * (rows.dim() - 1)))
            lasso = F.normalize(rows.reshape(len(rows), -1), dim=1)  # a zero row stays zero
            rows.grad.add_(lasso.view(rows.shape), alpha=self.strength)

    def after_step(self) -> None:
        """Call after the optimizer's step: chooses the mask anew where it is time."""
        self.steps += 1
        if self.reset and self.steps > self.warmup and self.steps % self.interval == 0:
            self.choose()

    @torch.no_grad()
    def choose(self) -> None:
        """Choose the mask anew: the smallest rows of all compactors together, those that are masked
        now and `rows` more, as long as what is not masked costs more than the target.

        Raises: RuntimeError where processes that train together have other compactors.
        """
        parallel.check(
            nn.ParameterList(self.rows.values()),
            "Wrap the network in DistributedDataParallel after ResRep has changed it, not before.",
        )
        widths, limit = self.unmasked(), self.target * self.cost.total
        masked = sum(span.width - widths[name] for name, span in self.spans.items())
        most = masked + self.most if self.cost(widths) > limit else None
        for name, gone in smallest(self.ranked(), self.cost, limit, most).items():
            mask = torch.ones(self.spans[name].width)
            mask[gone] = 0
            self.masks[name].copy_(mask)

    def unmasked(self) -> dict[str, int]:
        """span -> how many of its channels are not masked."""
        counts = torch.stack([mask.sum() for mask in self.tensors]).tolist()
        return dict(zip(self.masks, map(int, counts), strict=True))

    def norms(self) -> dict[str, Tensor]:
        """span -> the norms of its rows, (O,), on the processor."""
        found = [rows.detach().reshape(len(rows), -1).norm(dim=1) for rows in self.rows.values()]
        sizes = [len(norms) for norms in found]
        return dict(zip(self.rows, torch.cat(found).cpu().split(sizes), strict=True))

    def ranked(self) -> list[tuple[str, int]]:
        """(span, channel), by the norms of their rows, the smallest first."""
        return ascending(self.norms())

    def epoch(self, epoch: int) -> None:
        """Say that epoch `epoch` (from 0) begins; only `measured` asks for it."""
        self.current = epoch

    # -- what is left ------------------------------------------------------------------------------
    def kept(self, drop: str | None = None) -> Kept:
        """The channels that would be left now; drop: of `DROPS`. Every span keeps one."""
        if (drop or self.drop) == "target":
            limit = self.target * self.cost.total
            return others(self.spans, smallest(self.ranked(), self.cost, limit))
        found = {}
        for name, norms in self.norms().items():
            stays = norms >= self.threshold
            stays[norms.argmax()] = True
            found[name] = stays.nonzero().flatten()
        return found

    def share(self, widths: dict[str, int]) -> float:
        """The share of the FLOPs that is left with these widths."""
        return self.cost(widths) / self.cost.total

    def measured(self, test: Callable[[nn.Module], float]) -> dict[str, float | None]:
        """For the log of an epoch: the share of FLOPs of what is not masked and of what is not
        zero; and, every `measure` epochs, `test` of the network as it would be if it were pruned to
        the target now, whatever its rows are."""
        due = (self.current + 1) % self.measure == 0
        zero = {name: len(kept) for name, kept in self.kept("zero").items()}
        return {
            "unmasked_flops": round(self.share(self.unmasked()), 6),
            "nonzero_flops": round(self.share(zero), 6),
            "pruned_accuracy": test(self.pruned("target")) if due else None,
        }

    @torch.no_grad()
    def pruned(self, drop: str | None = None) -> nn.Module:
        """The deployed network: compactors and norms merged, channels removed; in eval mode.

        drop: of `DROPS`, by default as constructed. The model stays what it is. Layers whose
        channels stay keep what is behind them; `replib.fuse` folds the rest of the norms.
        """
        parallel.agree(self.model)
        merged_net = merged(self.model, self.spans, self.compactors)
        images = self.images.to(next(merged_net.parameters()))
        return emptied(merged_net, self.spans, self.kept(drop), images)

    # -- to stop and go on -------------------------------------------------------------------------
    def state_dict(self) -> dict:
        """What a resumed loop needs, besides the states of the model and of the optimizer."""
        return {"steps": self.steps, "masks": {k: mask.clone() for k, mask in self.masks.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for name, mask in zip(self.masks, self.tensors, strict=True):
            mask.copy_(state["masks"][name])


def ascending(norms: dict[str, Tensor]) -> list[tuple[str, int]]:
    """(span, channel) of all spans together, that of the smallest norm first."""
    places = [(name, i) for name, values in norms.items() for i in range(len(values))]
    return [places[i] for i in torch.cat([*norms.values()]).argsort(stable=True)]


def others(chosen: dict[str, Span], gone: dict[str, list[int]]) -> Kept:
    """The channels of every span that are not gone."""
    found = {}
    for name, span in chosen.items():
        stays = torch.ones(span.width, dtype=torch.bool)
        stays[gone[name]] = False
        found[name] = stays.nonzero().flatten()
    return found


def appended(model: nn.Module, chosen: dict[str, Span], form: str) -> dict[str, Compacted]:
    """Put a compactor behind every span, in place."""
    made = {}
    for name, span in chosen.items():
        layer, source = model.get_submodule(span.end), model.get_submodule(name)
        shape = source.geometry if isinstance(source, RepBlock) else source
        made[name] = Compacted(layer, span.width, len(shape.kernel_size), form)
        model.set_submodule(span.end, made[name])
    return made


@torch.no_grad()
def merged(
    model: nn.Module, chosen: dict[str, Span], compactors: dict[str, Compacted]
) -> nn.Module:
    """A copy in eval mode in which every source of a span is one convolution with bias, that
    computes what it, its norm and its compactor do; folded in float64."""
    net = plain(model)
    for name, span in chosen.items():
        matrix = None
        if name in compactors:
            own = net.get_submodule(span.end)
            matrix = own.matrix().double()
            net.set_submodule(span.end, own.layer)
        conv = net.get_submodule(name)
        bias = conv.weight.new_zeros(span.width) if conv.bias is None else conv.bias
        kernel = Kernel(conv.weight, bias).to(torch.float64)
        if span.norm is not None:
            norm = net.get_submodule(span.norm)
            kernel = kernels.scaled(kernel, *norm_affine(norm))
            net.set_submodule(span.norm, without_norm(norm))
        if matrix is not None:
            spatial = (1,) * kernel.dims
            second = Kernel(matrix.view(*matrix.shape, *spatial), torch.zeros_like(kernel.bias))
            kernel = kernels.composed(kernel, second)
        conv.weight.copy_(kernel.weight)
        conv.bias = nn.Parameter(kernel.bias.to(conv.weight.dtype))
    return net


@torch.no_grad()
def check_removable(model: nn.Module, chosen: dict[str, Span], images: Tensor) -> None:
    """Remove all channels but one of every span from a copy, followers as if they had trained.

    Raises: ValueError where a zero channel does not stay one constant up to where it is taken in.
    """
    net = merged(model, chosen, {})
    for span in chosen.values():
        for path in span.followers:
            layer = net.get_submodule(path)
            if getattr(layer, "bias", None) is not None:
                layer.bias.fill_(0.5)
    one = {name: torch.zeros(1, dtype=torch.long) for name in chosen}
    emptied(net, chosen, one, images.to(next(net.parameters())))


# -- other ways to a network of so many FLOPs ------------------------------------------------------
def shrunk(
    model: nn.Module, images: Tensor, *, target: float, rule: str, targets: Targets = None
) -> tuple[nn.Module, Kept]:
    """A narrower network that can be trained on, and the channels that it has kept: what ResRep is
    compared with.

    target, targets, images: as for `ResRep`. rule: of `RULES`. By magnitude: the norm of a filter
    relative to the root mean square of its layer's, so that no layer goes as a whole.
    Raises: ValueError for another rule, and where the target is out of reach.
    """
    if rule not in RULES:
        raise ValueError(f"rule (={rule!r}) must be one of {', '.join(RULES)}.")
    parallel.agree(model)
    chosen = spans(model, targets)
    cost = Cost(model, chosen, images)
    limit = target * cost.total
    widths = uniform(cost, limit)
    if rule == "uniform":
        kept = {name: torch.arange(widths[name]) for name in chosen}
    else:
        net, sizes = merged(model, chosen, {}), {}
        for name in chosen:
            norms = net.get_submodule(name).weight.detach().double().flatten(1).norm(dim=1).cpu()
            sizes[name] = norms / norms.square().mean().sqrt()
        kept = others(chosen, smallest(ascending(sizes), cost, limit))
    return narrowed(model, chosen, kept), kept


def of_widths(
    model: nn.Module, widths: dict[str, int], targets: Targets, *, deployed: bool
) -> nn.Module:
    """A network of the structure that `ResRep.pruned` (deployed) or `shrunk` has left, to be filled
    with its values. widths: source -> channels."""
    chosen = spans(model, targets)
    kept = {name: torch.arange(width) for name, width in widths.items()}
    if not deployed:
        return narrowed(model, chosen, kept)
    return narrowed(merged(model, chosen, {}), chosen, kept)
