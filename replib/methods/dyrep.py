"""DyRep: branches that grow where a score asks for them, and are cut where they have faded.

A network of plain convolutions is trained. After every `interval` epochs the convolution with the
highest score becomes a block of seven branches (replib.blocks.dyrep), and the weak branches of all
blocks are cut. The function in eval mode stays what it is; the deployed network never changes.

Source: Huang et al., "DyRep: Bootstrapping Training with Dynamic Re-parameterization", CVPR 2022,
section 3, and its released code, whose arithmetic is `fidelity="official"`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor, nn

from replib import parallel
from replib.blocks import RepBlock
from replib.blocks.block import CHANNELS_LAST, PLAIN, Geometry
from replib.blocks.dyrep import BRANCHES
from replib.blocks.dyrep import DyRep as Block
from replib.blocks.repmlp import RepMLP
from replib.branches import Chain, Convolution, Norm, Piece, Sizes, Sum
from replib.kernels import Kernel
from replib.methods.calibration import NORMS, calibrate, in_full_precision
from replib.networks import CONVOLUTIONS, computes_as_its_class, outermost, tied

VERSION = 1  # raise when the numbers of a growing network change

SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (kernel, its gradient) -> a number
    "snip": lambda weight, gradient: (weight * gradient).abs().sum(),
    "synflow": lambda weight, gradient: (weight * gradient).sum(),
    "grad_norm": lambda weight, gradient: gradient.norm(),
}
CHOICES = (*SCORES, "random")  # by what the convolution that grows is chosen
FIDELITIES = {
    "official": "as released: off by the eps of one norm, 5e-6; the grown kernel has no momentum",
    "exact": "the function to rounding; the grown kernel stays the parameter that it was",
}
OFF_CENTRE = ("1x1_kxk", "1x1_avg", "kxk")  # the branches of a convolution with other padding
SLOPE = 0.01  # of the last norm of a new branch
SPREAD, WEAK = 0.02, 0.1  # of the weights of branches: below these nothing, or a branch, is cut
NESTING = 2  # blocks inside each other


# -- where blocks can grow -------------------------------------------------------------------------
@dataclass(frozen=True)
class Site:
    """A convolution, or a block of DyRep, and what it is asked for where it stands."""

    module: nn.Module
    geometry: Geometry
    padding_mode: str
    depth: int  # how many blocks of DyRep are around it
    piece: bool  # of a block of ours, not a layer of torch.nn

    @property
    def centred(self) -> bool:
        """Whether its padding is half its kernel."""
        g = self.geometry
        sizes = zip(g.padding, g.dilation, g.kernel_size, strict=True)
        return all(2 * p == d * (k - 1) for p, d, k in sizes)

    @property
    def weight(self) -> nn.Parameter:
        """The kernel: of a block, that of its main branch."""
        return innermost(self.module).weight


def innermost(module: nn.Module) -> nn.Module:
    """The convolution at the end of the main branches."""
    while isinstance(module, Block):
        module = module.main_branch[0]
    return module


def sites(model: nn.Module) -> dict[str, Site]:
    """Path -> every convolution, inside of blocks too, and every block of DyRep; the blocks before
    what is in them. Branches that are summed before they convolve (OREPA) are left out."""
    found: dict[str, Site] = {}

    def inside(piece: Piece, path: str, padding: Sizes, stride: Sizes, depth: int) -> None:
        if isinstance(piece, Convolution | Block):
            conv = innermost(piece)
            shape = (conv.in_channels, conv.out_channels, tuple(conv.weight.shape[2:]))
            rest = (tuple(max(p, 0) for p in padding), conv.dilation, conv.groups, conv.dims)
            found[path] = Site(piece, Geometry(*shape, stride, *rest), "zeros", depth, True)
        if isinstance(piece, Chain):
            along(piece, path, padding, stride, depth)
        elif isinstance(piece, Sum) and not piece.squeezed:
            for name, branch in piece.branches.items():
                axes = zip(padding, piece.extent, branch.extent, strict=True)
                own = tuple(p - (big - e) // 2 for p, big, e in axes)
                deeper = depth + isinstance(piece, Block)
                inside(branch, f"{path}.branches.{name}", own, stride, deeper)

    def along(pieces: Chain, path: str, padding: Sizes, stride: Sizes, depth: int) -> None:
        """Padding and stride go where `Chain.run` hands them."""
        spatial = [i for i, piece in enumerate(pieces) if max(piece.extent) > 1] or [0]
        for i, piece in enumerate(pieces):
            starts = i == spatial[0] and not any(before.shifts for before in pieces[:i])
            p = padding if starts else (0,) * len(padding)
            s = stride if i == spatial[-1] else (1,) * len(stride)
            inside(piece, f"{path}.{i}", p, s, depth)

    kinds = (RepBlock, RepMLP, *CONVOLUTIONS)
    for path, module in outermost(model, lambda module: isinstance(module, kinds)).items():
        if isinstance(module, CONVOLUTIONS):
            found[path] = Site(module, geometry_of(module), module.padding_mode, 0, False)
        elif isinstance(module, RepBlock):
            g = module.geometry
            inside(module, path, g.padding, g.stride, 0)
            if path in found:
                found[path] = Site(module, g, module.padding_mode, 0, False)
    return found


def geometry_of(conv: nn.Module) -> Geometry:
    """That of a layer of torch.nn."""
    k, d = conv.kernel_size, conv.dilation
    padding = conv.padding
    if isinstance(padding, str):
        same = tuple(e * (size - 1) // 2 for e, size in zip(d, k, strict=True))
        padding = same if padding == "same" else (0,) * len(k)
    shape = (conv.in_channels, conv.out_channels, k, conv.stride, padding, d, conv.groups, len(k))
    return Geometry(*shape)


def unfit(model: nn.Module, site: Site) -> str | None:
    """Why no block can grow at a site, or None."""
    conv, size = site.module, site.geometry.kernel_size
    if isinstance(conv, Block):
        return "it is a block already"
    if len(set(size)) > 1 or size[0] % 2 == 0 or size[0] == 1:
        return "its kernel is not square, odd and larger than 1"
    if site.depth >= NESTING:
        return f"it is inside {NESTING} blocks"
    if not conv.weight.requires_grad:
        return "it is frozen"
    if site.piece:
        return None
    uses = sum(m is conv for _, m in model.named_modules(remove_duplicate=False))
    twice = "it is used in several places" if uses > 1 else None
    return computes_as_its_class(conv) or tied(model, conv) or twice


# -- what stands at a site -------------------------------------------------------------------------
def alike(module: nn.Module, site: Site) -> nn.Module:
    """The module on the device, in the dtype, memory format and mode of what is at the site."""
    weight, dims = site.weight, site.geometry.dims
    module = module.to(weight.device, weight.dtype).train(site.module.training)
    layout = CHANNELS_LAST.get(dims)
    if layout is not None and weight.is_contiguous(memory_format=layout):
        module = module.to(memory_format=layout)
    return module


def block_at(model: nn.Module, site: Site, names: Sequence[str]) -> Block:
    """A block of these branches for a site of a model, whose norms are synchronised where the
    model's are; its values mean nothing yet."""
    flags = [name in names for name in BRANCHES]
    with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
        block = Block(**vars(site.geometry), padding_mode=site.padding_mode, branches=flags)
    groups = {m.process_group for m in model.modules() if isinstance(m, nn.SyncBatchNorm)}
    for group in groups:
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block, group)
    if any(isinstance(module, parallel.Synchronised) for module in model.modules()):
        block = parallel.synchronised(block)
    return alike(block, site)


def plain_at(site: Site) -> nn.Module:
    """A convolution with bias for a site; its values mean nothing yet."""
    g = site.geometry
    with torch.random.fork_rng(devices=[]):
        if site.piece:
            shape = {"dilation": g.dilation, "groups": g.groups}
            conv = Convolution(g.in_channels, g.out_channels, g.kernel_size, **shape, bias=True)
        else:
            shape = (g.in_channels, g.out_channels, g.kernel_size, g.stride, g.padding, g.dilation)
            conv = PLAIN[g.dims](*shape, g.groups, padding_mode=site.padding_mode)
    return alike(conv, site)


def rebuild(
    model: nn.Module,
    structure: Mapping[str, Sequence[str]],
    replace: Callable[[str, nn.Module], None] | None = None,
) -> None:
    """Give a network the structure of a grown one (`DyRep.structure`), in place; the values of
    what is new are to be loaded.

    replace: what to do instead of `model.set_submodule`.
    """
    replace = replace or model.set_submodule
    for path in sorted(structure):  # a block before what is in it
        names, site = structure[path], sites(model)[path]
        if len(names) == 1:
            replace(path, plain_at(site))
        elif isinstance(site.module, Block):
            for name in [name for name in site.module.branches if name not in names]:
                del site.module.branches[name]
        else:
            replace(path, block_at(model, site, names))


@torch.no_grad()
def initialised(model: nn.Module) -> nn.Module:
    """The model, its convolutions drawn anew as in DyRep's released networks: normal of variance
    2 / (kernel size O). From torch's generator; norms and linear layers stay."""
    for module in model.modules():
        if isinstance(module, Convolution):
            module.redraw("fan_out")
        elif isinstance(module, CONVOLUTIONS):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model


# -- growing and cutting ---------------------------------------------------------------------------
def short(value: float) -> float:
    """Six digits of it: enough for a log."""
    return float(f"{value:.6g}")


def last_norm(branch: Piece) -> nn.Module | None:
    """The norm that a branch ends in, if it does."""
    last = branch[-1] if isinstance(branch, Chain) else branch
    return last.norm if isinstance(last, Norm) else None


@torch.no_grad()
def redraw(block: Block, slope: float, generator: torch.Generator | None) -> None:
    """Draw the side branches as new ones: convolutions normal by their fan-out, norms reset."""
    block.redraw("fan_out", generator)
    for branch in block.side_branches.values():
        last_norm(branch).weight.fill_(slope)


@torch.no_grad()
def take(
    block: Block,
    kernel: Kernel,
    fidelity: str,
    slope: float = SLOPE,
    generator: torch.Generator | None = None,
) -> None:
    """Let the main branch become what is left of `kernel` (float64) without the side branches, its
    norm reset: the block then computes `kernel` in eval mode.

    official: the eps of the reset norm is not made good, and where the main branch holds a block,
    that one's side branches are drawn anew.
    """
    if fidelity == "exact":
        block.restore(kernel, "preserving", "reset")
        return
    conv, norm = block.main_branch
    side = block.side_kernel()
    rest = kernel if side is None else kernel - side
    norm.redraw("default")
    if isinstance(conv, Block):
        redraw(conv, slope, generator)
        take(conv, rest, fidelity, slope, generator)
    else:
        conv.put(rest)


@torch.no_grad()
def branch_weights(block: Block) -> dict[str, float]:
    """Side branch -> mean |slope| of its last norm, relative to that of the main branch; {} where
    a branch does not end in a norm."""
    norms = {name: last_norm(branch) for name, branch in block.branches.items()}
    if None in norms.values():
        return {}
    means = {name: norm.weight.abs().double().mean() for name, norm in norms.items()}
    main = means.pop(block.main)
    return {name: (mean / main).item() for name, mean in means.items()}


def weak(weights: Mapping[str, float]) -> list[str]:
    """The branches to cut, by their weights: those below both the mean and `WEAK`, where the
    standard deviation is above `SPREAD`. A weight of exactly 1 is not counted in."""
    counted = [weight for weight in weights.values() if weight != 1]
    if len(counted) < 2 or not all(map(math.isfinite, counted)):
        return []
    mean, deviation = statistics.fmean(counted), statistics.stdev(counted)
    if deviation <= SPREAD:
        return []
    return [name for name, weight in weights.items() if weight < min(mean, WEAK)]


class DyRep:
    """Growth and cuts over the training of a network, for one's own loop.

        dyrep = DyRep(model, optimizer, interval=15, last_epoch=500)
        for epoch in range(600):
            for x, y in batches:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                dyrep.after_backward()
                optimizer.step()
            dyrep.after_epoch(x for x, _ in batches)

    The model may hold layers of torch.nn, blocks of this library, or both: a block grows in the
    place of any square convolution larger than 1x1, inside of blocks too, but not inside of two
    that have grown. A norm should follow it, since the scale of its output changes in train mode.
    interval: epochs between adjustments. last_epoch: from this epoch on, nothing is changed.
    score: of `CHOICES`, the mean over all steps since the last adjustment; the highest grows.
    "synflow" is the released default. Before a norm it is 0 but for the norm's eps and rounding
    (replib.analysis.layer_scores); "snip" says what it is meant to say.
    fidelity: of `FIDELITIES`. cut: whether weak branches are cut. slope: of the last norm of a new
    branch. calibration_batches: on which the norms of a new block are measured.
    recalibration_batches: on which all norms are measured anew after every other epoch; 0: never.
    optimizer: its groups follow the structure; what it knows of parameters that stay, stays. None:
    the loop sees to it. groups: makes the groups of a new optimizer, as many as it has and in
    their order; by default what is new joins the group of the convolution that it grew from.
    where: (path, convolution) -> whether it may grow; by default all may.
    seed: of the new branches, and of "random".
    Under DistributedDataParallel the model is the network inside, the loss comes from the wrapper,
    and all processes do the same; what has grown is in no old wrapper, so wrap the network again:
    `if dyrep.after_epoch(batches): wrapper = DistributedDataParallel(model)`. With a gradient
    scaler, unscale before `after_backward`; a step whose gradients overflow is not counted.
    `log` holds what every adjustment did, `structure` what has changed by now, `kept` the
    convolutions that are never grown, with the reason.
    Raises: ValueError for other values, and where no convolution can grow.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        interval: int,
        last_epoch: int,
        score: str = "synflow",
        fidelity: str = "exact",
        cut: bool = True,
        slope: float = SLOPE,
        calibration_batches: int = 20,
        recalibration_batches: int = 0,
        groups: Callable[[], list[dict]] | None = None,
        where: Callable[[str, nn.Module], bool] = lambda path, conv: True,
        seed: int = 0,
    ):
        for name, value, known in (
            ("score", score, CHOICES),
            ("fidelity", fidelity, FIDELITIES),
        ):
            if value not in known:
                raise ValueError(f"{name} (={value!r}) must be one of {', '.join(known)}.")
        if interval < 1:
            raise ValueError(f"interval (={interval}) must be at least 1 epoch.")
        self.model, self.optimizer, self.groups, self.where = model, optimizer, groups, where
        self.interval, self.last_epoch, self.score = interval, last_epoch, score
        self.fidelity, self.cuts, self.slope, self.seed = fidelity, cut, slope, seed
        self.calibration_batches = calibration_batches
        self.recalibration_batches = recalibration_batches
        self.current = 0
        self.total, self.count = torch.zeros(0, len(SCORES)), torch.zeros(())
        self.log: list[dict] = []
        self.structure: dict[str, list[str]] = {}
        self.homes: dict[nn.Parameter, int] = {}
        if optimizer is not None:
            for i, group in enumerate(optimizer.param_groups):
                self.homes |= dict.fromkeys(group["params"], i)
        self.foreign = self.homes.keys() - set(model.parameters())
        self.watch()
        if not self.candidates:
            why = "; ".join(sorted(set(self.kept.values()))) or "there is no convolution"
            raise ValueError(f"no block can grow in {type(model).__name__}: {why}.")

    def watch(self) -> None:
        """Look where blocks can grow now, and begin to score these convolutions."""
        found = sites(self.model)
        reasons = {path: unfit(self.model, site) for path, site in found.items()}
        for path, site in found.items():
            if reasons[path] is None and not self.where(path, site.module):
                reasons[path] = "it was not chosen by `where`"
        self.candidates = {p: s.module for p, s in found.items() if reasons[p] is None}
        self.kept = {path: reason for path, reason in reasons.items() if reason is not None}
        if len(self.candidates) == len(self.total):  # a recorded step goes on to add to them
            self.total.zero_()
            self.count.zero_()
        else:
            self.total = torch.zeros(len(self.candidates), len(SCORES), dtype=torch.float64)
            self.count = torch.zeros(())

    @property
    def tensors(self) -> list[Tensor]:
        """What `after_backward` changes, on the device of the model: sums of scores, and steps."""
        device = next(self.model.parameters()).device
        self.total, self.count = self.total.to(device), self.count.to(device)
        return [self.total, self.count]

    @torch.no_grad()
    def after_backward(self) -> None:
        """Call after backward (and clipping), before the step: adds up the scores of the step.

        Nothing waits for the device. Once for each step of the optimizer, on gradients as it sees
        them: unscaled, and of all parts of the batch. A step with scores that are no numbers, one
        that a gradient scaler leaves out, is left out.
        """
        if self.current >= self.last_epoch // self.interval * self.interval:
            return  # nothing will be chosen any more
        total, count = self.tensors
        rows = []
        for conv in self.candidates.values():
            weight, gradient = conv.weight, conv.weight.grad
            gradient = torch.zeros_like(weight) if gradient is None else gradient
            rows.append(torch.stack([score(weight, gradient) for score in SCORES.values()]))
        scores = torch.stack(rows)
        finite = scores.isfinite().all()
        total.add_(torch.where(finite, scores, 0))
        count.add_(finite)

    @property
    def due(self) -> bool:
        """Whether the next `after_epoch` is an adjustment."""
        return self.current < self.last_epoch and (self.current + 1) % self.interval == 0

    def epoch(self, epoch: int) -> None:
        """Say that epoch `epoch` (from 0) begins; `after_epoch` counts by itself."""
        self.current = epoch

    def after_epoch(self, batches: Iterable[Tensor] = ()) -> dict | None:
        """Call after every epoch: grows, cuts or measures norms anew where it is time.

        batches: inputs of the model as in training, of which as many are taken as are needed.
        Returns the entry of `log` of an adjustment, None where the structure stays.
        Raises: ValueError where batches are needed and there are none; RuntimeError where
        processes that train together do not hold the same parameters.
        """
        parallel.check(
            self.model,
            "After a change the network must be wrapped again: "
            "if dyrep.after_epoch(batches): wrapper = DistributedDataParallel(model).",
        )
        epoch, entry = self.current, None
        if self.due:
            with in_full_precision(self.model):
                entry = self.adjust(epoch, batches)
        elif epoch < self.last_epoch and self.recalibration_batches:
            calibrate(self.model, islice(batches, self.recalibration_batches))
        self.current = epoch + 1
        return entry

    # -- one adjustment ----------------------------------------------------------------------------
    @torch.no_grad()
    def adjust(self, epoch: int, batches: Iterable[Tensor] = ()) -> dict:
        """Grow where the score is highest, then cut in all blocks; returns what was done.

        {epoch, layers, scores, grown, weights, cut, structure}: the convolutions that were scored,
        a list of means per score in their order, the one that grew (None: no score is a number),
        the weights of the branches of all blocks, those that were cut, and what is there now.
        """
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * len(self.log))
        layers, scores = list(self.candidates), self.means()
        scores["random"] = torch.rand(len(layers), generator=generator).tolist()
        rounded = {name: [short(value) for value in found] for name, found in scores.items()}
        entry = {"epoch": epoch, "layers": layers, "scores": rounded}
        values = scores[self.score]
        finite = [i for i, value in enumerate(values) if math.isfinite(value)]
        entry["grown"] = layers[max(finite, key=values.__getitem__)] if finite else None
        if finite:
            self.grow(entry["grown"], batches, generator)
        entry["weights"], entry["cut"] = self.cut_weak(generator)
        entry["structure"] = {path: list(names) for path, names in self.structure.items()}
        self.log.append(entry)
        parallel.agree(self.model)
        self.watch()
        self.follow()
        return entry

    def means(self) -> dict[str, list[float]]:
        """Score -> its mean for every candidate since the last adjustment, and over processes."""
        parallel.average(self.tensors)
        rows = (self.total / self.count).t().tolist()
        return dict(zip(SCORES, rows, strict=True))

    @torch.no_grad()
    def grow(
        self,
        path: str,
        batches: Iterable[Tensor] = (),
        generator: torch.Generator | None = None,
    ) -> Block:
        """Put a block in the place of a convolution, without changing the function in eval mode.

        Raises: ValueError where batches are needed and there are none; nothing is changed then.
        """
        batches = iter(batches)
        site, some = sites(self.model)[path], list(islice(batches, 1))
        if self.calibration_batches and not some:
            raise ValueError(
                "batches (= none) must hold inputs of the model, to measure the norms of a new "
                "block on; or say calibration_batches=0."
            )
        conv, exact = site.module, self.fidelity == "exact"
        block = block_at(self.model, site, BRANCHES if site.centred else OFF_CENTRE)
        main = block.main_branch[0]
        bias = torch.zeros_like(main.bias) if conv.bias is None else conv.bias
        kernel = Kernel(conv.weight, bias, conv.groups, tuple(conv.dilation)).to(torch.float64)
        if exact:
            main.weight = conv.weight
        main.weight.copy_(conv.weight)
        main.bias.copy_(bias)
        redraw(block, self.slope, generator)
        self.replace(path, block)
        if self.calibration_batches:
            norms = {module for module in block.modules() if isinstance(module, NORMS)}
            some = islice(chain(some, batches), self.calibration_batches)
            calibrate(self.model, some, lambda name, norm: norm in norms)
        take(block, kernel, self.fidelity, self.slope, generator)
        self.structure[path] = list(block.branches)
        return block

    def cut_weak(self, generator: torch.Generator) -> tuple[dict, dict]:
        """(path -> weights of the branches, path -> branches that were cut) of all blocks."""
        weights, cut = {}, {}
        for path, site in sites(self.model).items():
            gone = [f"{p}.branches.{name}." for p, names in cut.items() for name in names]
            if isinstance(site.module, Block) and not path.startswith(tuple(gone)):
                found = branch_weights(site.module)
                weights[path] = {name: short(value) for name, value in found.items()}
                if self.cuts and (names := weak(found)):
                    self.cut(path, names, generator)
                    cut[path] = names
        return weights, cut

    @torch.no_grad()
    def cut(self, path: str, names: Sequence[str], generator: torch.Generator | None = None):
        """Remove side branches of a block, without changing the function in eval mode; a block
        without any becomes a convolution with bias."""
        site = sites(self.model)[path]
        block, gone = site.module, [f"{path}.branches.{name}." for name in names]
        kernel = block.in_own_form(block.kernel())
        for name in names:
            del block.branches[name]
        if not block.side_branches:
            plain, gone = plain_at(site), [f"{path}."]
            plain.weight.copy_(kernel.weight)
            plain.bias.copy_(kernel.bias)
            self.replace(path, plain)
        else:
            take(block, kernel, self.fidelity, self.slope, generator)
        kept = {p: n for p, n in self.structure.items() if not p.startswith(tuple(gone))}
        self.structure = kept | {path: list(block.branches)}

    # -- the optimizer -----------------------------------------------------------------------------
    def replace(self, path: str, module: nn.Module) -> None:
        """Exchange a module; what is new in it will join the optimizer's group of the old one."""
        home = self.homes.get(innermost(self.model.get_submodule(path)).weight)
        self.model.set_submodule(path, module)
        if home is not None:
            for parameter in module.parameters():
                self.homes.setdefault(parameter, home)

    def follow(self) -> None:
        """Give the optimizer the parameters that the model has now, in the model's order."""
        if self.optimizer is None:
            return
        present = list(self.model.parameters())
        live, groups = self.foreign | set(present), self.optimizer.param_groups
        if self.groups is None:
            members = [[p for p, home in self.homes.items() if home == i and p in self.foreign]
                       + [p for p in present if self.homes.get(p) == i]
                       for i in range(len(groups))]  # fmt: skip
        else:
            members = [list(group["params"]) for group in self.groups()]
            if len(members) != len(groups):
                raise ValueError(
                    f"groups() gave {len(members)} groups, the optimizer has {len(groups)}: they "
                    "must be the same, in the same order."
                )
        self.homes = {p: i for i, parameters in enumerate(members) for p in parameters}
        for group, parameters in zip(groups, members, strict=True):
            group["params"] = parameters
        for parameter in [p for p in self.optimizer.state if p not in live]:
            del self.optimizer.state[parameter]

    # -- to stop and go on -------------------------------------------------------------------------
    def state_dict(self) -> dict:
        """What a resumed loop needs, besides the states of the model and of the optimizer."""
        total, count = self.tensors
        return {
            "epoch": self.current,
            "structure": {path: list(names) for path, names in self.structure.items()},
            "log": list(self.log),
            "total": total,
            "count": count,
        }

    def load_state_dict(self, state: dict) -> None:
        """Rebuild the structure; load the states of the model and of the optimizer afterwards."""
        self.current, self.log = state["epoch"], list(state["log"])
        rebuild(self.model, state["structure"], self.replace)
        self.structure = {path: list(names) for path, names in state["structure"].items()}
        self.watch()
        for ours, saved in zip(self.tensors, (state["total"], state["count"]), strict=True):
            ours.copy_(saved)
        self.follow()
