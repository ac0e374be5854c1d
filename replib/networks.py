"""Whole networks as trees of modules: what is in them, what follows what, and copies with changes.

Everything here works on any nn.Module, by the modules that it finds and never by their names: at
the root, nested, used in several places, inside a larger network.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from replib import parallel
from replib.blocks import RepBlock
from replib.blocks.repmlp import RepMLP
from replib.branches import Chain, Convolution, Filter, Sum

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Record = dict[str, str]


def record(name: str, module: nn.Module, became: str, reason: str = "") -> Record:
    """What became of one module, as plain data: pandas.DataFrame shows a list of these."""
    return {"name": name, "class": type(module).__name__, "became": became, "reason": reason}


def outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The wanted modules of a network by name, without those inside another one.

    A module that is used in several places appears once, under its first name.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def search(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if wanted(module):
            found[name] = module
            return
        for child_name, child in module.named_children():
            search(child, f"{name}.{child_name}".lstrip("."))

    search(model, "")
    return found


def outermost_blocks(model: nn.Module) -> dict[str, RepBlock]:
    """The re-parameterizable convolutions of a network by name."""
    return outermost(model, lambda module: isinstance(module, RepBlock))


def branch_by_branch(model: nn.Module) -> nn.Module:
    """Make every block evaluate its branches one by one, in place: the reference of all others.

    The same numbers up to rounding, slower; setting `block.shared = True` undoes it.
    """
    for module in model.modules():
        if isinstance(module, RepBlock):
            module.shared = False
    return model


def fold_norms_in_training(model: nn.Module, folded: bool = True) -> nn.Module:
    """Make every block fold its norms into the kernels around them in train mode, in place.

    The same numbers up to rounding, and a third less memory saved for the backward pass. The price
    is many operations on vectors: slower unless maps are large; torch.compile then takes longer.
    """
    for module in model.modules():
        if isinstance(module, RepBlock):
            module.folded = folded
    return model


def dilate(block: RepBlock, dilation: int, stride: int = 1) -> None:
    """Give a block another dilation and stride, padded so that its map keeps its size at stride 1;
    its weights stay. Not for a block that has been run, whose plans are of its old shape."""
    g = block.geometry
    sizes = (dilation,) * g.dims
    for piece in reversed([*block.modules()]):  # what is inside first
        if isinstance(piece, Convolution | Filter):
            piece.dilation = sizes
            piece.extent = tuple(dilation * (k - 1) + 1 for k in piece.weight.shape[2:])
        elif isinstance(piece, Chain):
            axes = zip(*(part.extent for part in piece), strict=True)
            piece.extent = tuple(sum(e - 1 for e in axis) + 1 for axis in axes)
        elif isinstance(piece, Sum):
            axes = zip(*(part.extent for part in piece.branches.values()), strict=True)
            piece.extent = tuple(map(max, axes))
    padding = tuple(dilation * (k - 1) // 2 for k in g.kernel_size)
    block.geometry = replace(g, dilation=sizes, padding=padding, stride=(stride,) * g.dims)


def unique_modules(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules of some kinds, without those inside a block."""
    blocks = outermost(model, lambda module: isinstance(module, RepBlock | RepMLP)).values()
    inside = {id(m) for block in blocks for m in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and id(module) not in inside:
            yield name, module


def replaced(model: nn.Module, others: dict[int, nn.Module]) -> nn.Module:
    """A copy of a network in which modules, by their id, are others.

    deepcopy takes what its memo already holds, also at the root and where one module is used in
    several places, or is held by a list that torch does not know of.
    Raises: ValueError for a network that cannot be copied so.
    """
    try:
        out = copy.deepcopy(model, dict(others))
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error}): it holds results of a forward "
            "pass; copy its weights into a new one, or remove what it keeps."
        ) from error
    missing = {id(module) for module in others.values()} - {id(module) for module in out.modules()}
    if out is model or missing:
        raise ValueError(
            f"{type(model).__name__}, or a part of it, has a __deepcopy__ of its own that does not "
            "copy its modules one by one."
        )
    return out


def in_train_mode(model: nn.Module) -> list[str]:
    """The names of the modules that are in train mode."""
    return [name or "the model" for name, module in model.named_modules() if module.training]


# -- norms -----------------------------------------------------------------------------------------
PLAIN_NORM = tuple(
    kind.forward
    for kind in (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm, parallel.Synchronised)
)
LIKE_NORM = (  # the same map under other classes
    "FrozenBatchNorm2d",  # torchvision, detectron2
    "BatchNormAct2d",  # timm: a batch norm, then its `act`
)


def is_foldable_norm(module: nn.Module) -> bool:
    """A batch norm with running statistics: torch's, SyncBatchNorm, a frozen one, timm's.

    A subclass with a forward of its own is another map.
    """
    known = isinstance(module, nn.modules.batchnorm._BatchNorm)
    known = known and type(module).forward in PLAIN_NORM
    like = type(module).__name__ in LIKE_NORM and hasattr(module, "eps")
    statistics = getattr(module, "running_var", None) is not None
    return (known or like) and statistics and changed_by_hand(module) is None


def changed_by_hand(module: nn.Module) -> str | None:
    """Why a module may compute something else than its class, or None."""
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return "its forward was replaced"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which would be lost"
    return None


def fits(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether a norm's channels are those of a convolution: same number, same dimensions."""
    dims = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
    of_norm = [d for kind, d in dims.items() if isinstance(norm, kind)]
    size = getattr(conv, "geometry", conv).kernel_size
    return len(norm.running_var) == conv.out_channels and of_norm in ([], [len(size)])


def without_norm(norm: nn.Module) -> nn.Module:
    """What stands in the place of a norm that another layer has taken over."""
    if type(norm).__name__ != "BatchNormAct2d":
        return nn.Identity().train(norm.training)
    drop, act = norm.drop, norm.act
    return act if isinstance(drop, nn.Identity) else nn.Sequential(drop, act).train(norm.training)


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(factor, shift) of a norm in eval mode, in float64."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()


class FlowTracer(fx.Tracer):
    """A symbolic tracer that steps into everything but torch's own layers and our blocks."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = (*CONVOLUTIONS, *TRANSPOSED, RepBlock, RepMLP)
        return (
            isinstance(module, known)
            or is_foldable_norm(module)
            or super().is_leaf_module(module, name)
        )


@dataclass(frozen=True)
class Flow:
    """The graph of a network, or of a part of it, with its modules by the targets of its nodes."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    prefix: str

    def module(self, node: fx.Node) -> nn.Module | None:
        """What a node calls, if it calls a module."""
        return self.modules.get(node.target) if node.op == "call_module" else None


def flows(model: nn.Module, training: bool = False) -> list[list[Flow]]:
    """The graphs of a network: of the whole, or, where its control flow depends on the data, of
    the largest parts that can be traced; for each, one or several that may all be taken.

    An optional argument decides the way through a module: it is traced as absent and as given.
    Of a plain nn.Sequential inside something that cannot be traced nothing is concluded: what is
    around it may take its layers one by one.
    """
    # A traced module may keep symbols (caches of attention biases do): a copy is traced, which
    # shares all tensors.
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).train(training)

    def search(part: nn.Module, prefix: str, trusted: bool) -> Iterator[list[Flow]]:
        graphs = traces(part) if trusted else []
        if graphs:
            original = model.get_submodule(prefix.rstrip("."))
            modules = dict(original.named_modules(remove_duplicate=False))
            yield [Flow(graph, modules, prefix) for graph in graphs]
            return
        for name, child in part.named_children():
            yield from search(child, f"{prefix}{name}.", type(child) is not nn.Sequential)

    with quiet_tracing():
        return list(search(twin, "", True))


def traces(part: nn.Module) -> list[fx.Graph]:
    """The graphs of a module, or none where it cannot be traced."""
    if "forward" in vars(part) or isinstance(part, torch.jit.ScriptModule):
        return []
    parameters = inspect.signature(type(part).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        graphs = [FlowTracer().trace(part, defaults)]
    except Exception:  # whatever a model does when it is run on symbols
        return []
    if defaults:
        try:
            graphs.append(FlowTracer().trace(part))
        except Exception:  # the other way through it stays unknown, and so is not concluded from
            pass
    return graphs


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """What fx has to say of a trace that fails is not for our user: a smaller part is tried."""
    logger = logging.getLogger("torch.fx.proxy")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def norms_after(
    model: nn.Module, kinds: tuple[type, ...] = CONVOLUTIONS, modes: tuple[bool, ...] = (False,)
) -> dict[nn.Module, nn.Module]:
    """module of some kinds -> the norm that alone consumes its output, each used once.

    Found by symbolic tracing, in eval mode (False) and, if asked for, in train mode (True).
    """
    uses: Counter[nn.Module] = Counter(
        module for parent in model.modules() for module in parent._modules.values() if module
    )

    def pairs(flow: Flow) -> dict[nn.Module, nn.Module]:
        nodes, found = flow.graph.nodes, {}
        calls = Counter(flow.module(node) for node in nodes)
        read = {flow.modules.get(n.target.rpartition(".")[0]) for n in nodes if n.op == "get_attr"}
        for node in nodes:
            conv, users = flow.module(node), list(node.users)
            if not isinstance(conv, kinds) or len(users) != 1 or conv in read:
                continue
            norm = flow.module(users[0])
            if norm is None or norm in read or not is_foldable_norm(norm) or not fits(conv, norm):
                continue
            if calls[conv] == calls[norm] == 1 and uses[conv] <= 1 and uses[norm] <= 1:
                found[conv] = norm
        return found

    every = []
    for mode in modes:
        found: dict[nn.Module, nn.Module] = {}
        for ways in flows(model, mode):
            found |= dict(set.intersection(*(set(pairs(flow).items()) for flow in ways)))
        every.append(found)
    first, *others = every
    return {c: n for c, n in first.items() if all(found.get(c) is n for found in others)}


def computes_as_its_class(conv: nn.Module) -> str | None:
    """None where a convolution is just one, else why it is not."""
    kind = type(conv)
    plain = next(base for base in (*CONVOLUTIONS, *TRANSPOSED) if isinstance(conv, base))
    if torch.nn.utils.parametrize.is_parametrized(conv):
        return "its weight is parametrized: call remove_parametrizations first"
    if kind.forward is not plain.forward or getattr(kind, "_conv_forward", None) is not getattr(
        plain, "_conv_forward", None
    ):
        return f"{kind.__name__} computes something else than {plain.__name__}"
    if conv.weight.is_complex():
        return "its weight is complex"
    return changed_by_hand(conv)


def tied(model: nn.Module, conv: nn.Module) -> str | None:
    """Why a convolution may not be changed alone: its weight is another module's too."""
    holders = [m for m in model.modules() if any(p is conv.weight for p in m._parameters.values())]
    return "its weight is another module's too" if len(holders) > 1 else None
