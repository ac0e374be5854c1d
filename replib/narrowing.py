"""Channels that can be removed from a network: which layers know them, what they cost, and removal.

The channels that one convolution gives are known to the norm behind it, to the depthwise layers and
norms that follow, and to the layers that take them in. `spans` finds these by tracing, by what
layers do and never by their names; `narrowed` removes channels from all of them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from replib.blocks import RepBlock
from replib.blocks.convbn import ConvBN
from replib.networks import (
    CONVOLUTIONS,
    Flow,
    computes_as_its_class,
    flows,
    is_foldable_norm,
    norms_after,
    outermost_blocks,
    replaced,
    tied,
)

Targets = Sequence[str] | Mapping[str, Sequence[str]] | None
Kept = dict[str, Tensor]  # source of a span -> the channels that stay, in rising order

# What acts on every channel alone: the names of torch's modules and functions.
ALONE = {
    "ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Hardswish",
    "Hardsigmoid", "Hardtanh", "Sigmoid", "Tanh", "Softplus", "Softsign", "Identity", "Dropout",
    "Dropout1d", "Dropout2d", "Dropout3d", "MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d",
    "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "Upsample", "ZeroPad2d",
    "relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softplus", "dropout", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "contiguous", "interpolate",
}  # fmt: skip
ASKED = ("size", "dim", "getattr")  # of a tensor, without using its values


class Unfit(Exception):
    """Why channels cannot be removed."""


@dataclass(frozen=True)
class Span:
    """The channels that a convolution, or a block, gives; the layers that know them, by path."""

    source: str
    norm: str | None  # that alone consumes what the source gives
    followers: tuple[str, ...]  # depthwise convolutions or blocks, and norms
    consumers: tuple[str, ...]  # convolutions, blocks and linear layers that take them in
    width: int

    @property
    def end(self) -> str:
        """Behind this layer the channels are whole."""
        return self.norm or self.source

    @property
    def outputs(self) -> tuple[str, ...]:
        """The layers whose outputs they are."""
        return (self.source, *((self.norm,) if self.norm else ()), *self.followers)


# -- which layers know which channels --------------------------------------------------------------
def spans(model: nn.Module, targets: Targets = None) -> dict[str, Span]:
    """source -> span, in the order of the network.

    targets: names of convolutions or blocks, or patterns of names; or source -> the layers that
    know its channels, in their order, for a network that cannot be traced; None: every convolution
    whose channels a single layer takes in.
    Raises: ValueError for a target whose channels cannot be removed, with the reason, and where
    there is none at all.
    """
    if isinstance(targets, Mapping):
        return {name: named(model, name, layers) for name, layers in targets.items()}
    found, reasons = traced(model)
    if targets is None:
        chosen = {name: span for name, span in found.items() if len(span.consumers) == 1}
    else:
        chosen = {}
        for pattern in targets:
            here = [n for n in (*found, *reasons) if fnmatchcase(n, pattern)]
            if not here:
                raise ValueError(
                    f"targets (={pattern!r}) names no convolution of this network; there are "
                    f"{', '.join([*found, *reasons][:8]) or 'none'}, ..."
                )
            fit = {name: found[name] for name in here if name in found}
            if not fit:
                raise ValueError(
                    f"targets (={pattern!r}): channels of {here[0]} cannot be removed: "
                    f"{reasons[here[0]]}."
                )
            chosen |= fit
        chosen = {name: span for name, span in found.items() if name in chosen}
    if not chosen:
        why = next(iter(reasons.values()), "there is no convolution")
        raise ValueError(f"no channels of {type(model).__name__} can be removed: {why}.")
    return chosen


def traced(model: nn.Module) -> tuple[dict[str, Span], dict[str, str]]:
    """(source -> span, source -> why it has none) of every convolution and block."""
    found: dict[str, Span] = {}
    reasons: dict[str, str] = {}
    norms = norms_after(model)
    names = {module: name for name, module in model.named_modules()}
    for ways in flows(model):
        for node in ways[0].graph.nodes:
            conv = ways[0].module(node)
            if not isinstance(conv, (*CONVOLUTIONS, RepBlock)):
                continue
            source = ways[0].prefix + node.target
            try:
                found[source] = the_same(
                    [span_in(model, flow, source, norms, names) for flow in ways]
                )
            except Unfit as reason:
                reasons[source] = str(reason)
    return found, reasons


def the_same(ways: list[Span]) -> Span:
    """The one span that all ways through the network have."""
    if any(way != ways[0] for way in ways):
        raise Unfit("its channels are used in different ways, by an optional argument")
    return ways[0]


def span_in(model: nn.Module, flow: Flow, source: str, norms: dict, names: dict) -> Span:
    """The span of a source in one graph. Raises: Unfit."""
    calls = Counter(flow.prefix + node.target for node in flow.graph.nodes if flow.module(node))
    node = next((n for n in flow.graph.nodes if flow.prefix + str(n.target) == source), None)
    if node is None:
        raise Unfit("it is not used in every way through the network")
    conv = flow.module(node)
    shape = conv.geometry if isinstance(conv, RepBlock) else conv
    if shape.groups > 1:
        raise Unfit("it is grouped: its kernel has no place for other inputs")
    norm = norms.get(conv)
    followers, consumers = behind(flow, node, shape.out_channels)
    if norm is not None:
        if type(norm).__name__ == "BatchNormAct2d":
            raise Unfit(f"{names[norm]} is a norm and an activation in one")
        followers.remove(names[norm])
    for path in (source, *followers, *consumers):
        layer = model.get_submodule(path)
        reason = "it is used in several places" if calls[path] > 1 else None
        if isinstance(layer, CONVOLUTIONS):
            reason = reason or computes_as_its_class(layer) or tied(model, layer)
        if reason:
            raise Unfit(reason if path == source else f"of {path}, {reason}")
    pointwise = (is_pointwise(model.get_submodule(path)) for path in consumers)
    if followers and not all(pointwise):
        raise Unfit("what a follower gives of a zero channel would meet the padding of a consumer")
    return Span(
        source,
        None if norm is None else names[norm],
        tuple(dict.fromkeys(followers)),
        tuple(dict.fromkeys(consumers)),
        shape.out_channels,
    )


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a constant channel is, for this consumer, the same everywhere: nothing is padded."""
    if isinstance(layer, nn.Linear):
        return True
    shape = layer.geometry if isinstance(layer, RepBlock) else layer
    return shape.padding == "valid" or not any(shape.padding)


def behind(flow: Flow, start: fx.Node, width: int) -> tuple[list[str], list[str]]:
    """(followers, consumers) of what a node gives, norms among the followers. Raises: Unfit."""
    followers, consumers = [], []
    waiting = [(user, False) for user in start.users]  # (node, whether its input is (N, features))
    while waiting:
        node, flat = waiting.pop(0)
        module, path = flow.module(node), flow.prefix + str(node.target)
        if module is None and node.op != "call_module" and is_asked(node):
            continue
        if isinstance(module, (*CONVOLUTIONS, RepBlock)):
            shape = module.geometry if isinstance(module, RepBlock) else module
            if shape.groups == 1:
                consumers.append(path)
                continue
            if not shape.groups == shape.in_channels == shape.out_channels:
                raise Unfit(f"its output goes into {path}, which is grouped")
            followers.append(path)
        elif isinstance(module, nn.Linear) and flat and module.in_features % width == 0:
            consumers.append(path)
            continue
        elif module is not None and is_foldable_norm(module) and not flat:
            followers.append(path)
        elif flattens(node, module):
            flat = True
        elif type(module).__name__ not in ALONE and name_of(node) not in ALONE:
            end = node.op == "output"
            raise Unfit(f"its output {'is one of the network' if end else f'goes into {path}'}")
        waiting += [(user, flat) for user in node.users]
    if not consumers:
        raise Unfit("no layer takes its output in")
    return followers, consumers


def name_of(node: fx.Node) -> str:
    """The name of a function or method that a node calls."""
    if node.op == "call_method":
        return node.target
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def is_asked(node: fx.Node) -> bool:
    """Whether a node only asks for the shape of a tensor."""
    return name_of(node) in ASKED


def flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node makes (N, C, *space) into (N, features), the channels outermost."""
    arguments = [*node.args[1:], *node.kwargs.values()]
    if module is not None:
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    name = name_of(node)
    if name == "flatten":
        return arguments in ([1], [1, -1])
    if name == "mean":
        axes = arguments[0] if len(arguments) == 1 else None
        axes = [axes] if isinstance(axes, int) else axes or []
        return bool(axes) and all(a >= 2 or a in (-1, -2) for a in axes)
    return name in ("view", "reshape") and len(arguments) == 2 and arguments[1] == -1


def named(model: nn.Module, source: str, layers: Sequence[str]) -> Span:
    """A span that the user names: `layers` are those that know the channels of `source`.

    Raises: ValueError for a name or a layer that cannot be.
    """
    found = dict(model.named_modules())
    for path in (source, *layers):
        if path not in found:
            raise ValueError(f"targets (={source!r}): this network has no layer {path!r}.")
    conv = found[source]
    if not isinstance(conv, (*CONVOLUTIONS, RepBlock)):
        raise ValueError(f"targets (={source!r}): {type(conv).__name__} is no convolution.")
    shape = conv.geometry if isinstance(conv, RepBlock) else conv
    width, norm, followers, consumers = shape.out_channels, None, [], []
    for i, path in enumerate(layers):
        layer = found[path]
        own = layer.geometry if isinstance(layer, RepBlock) else layer
        if is_foldable_norm(layer) and len(layer.running_var) == width:
            followers.append(path)
            if i == 0:
                norm = followers.pop()
        elif isinstance(layer, nn.Linear) and layer.in_features % width == 0:
            consumers.append(path)
        elif isinstance(layer, (*CONVOLUTIONS, RepBlock)) and own.in_channels == width:
            depthwise = own.groups == own.in_channels == own.out_channels > 1
            if own.groups > 1 and not depthwise:
                raise ValueError(f"targets (={source!r}): {path} is grouped.")
            (followers if depthwise else consumers).append(path)
        else:
            kind = type(layer).__name__
            raise ValueError(
                f"targets (={source!r}): {path} ({kind}) does not take {width} channels."
            )
    if shape.groups > 1 or not consumers:
        what = "is grouped" if shape.groups > 1 else "names no layer that takes its channels in"
        raise ValueError(f"targets (={source!r}) {what}.")
    return Span(source, norm, tuple(followers), tuple(consumers), width)


# -- what they cost --------------------------------------------------------------------------------
class Cost:
    """FLOPs of the deployed network on one image, as a function of the widths of its spans.

    images (N, C, H, W): an example, whose first image is used. Counted once by torch's
    FlopCounterMode, two per multiply-add; a layer's are proportional to the channels it takes and
    gives, so that all other widths follow exactly.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, Span], images: Tensor):
        net = plain(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(images[:1].to(next(net.parameters())))
        counts, root = counter.get_flop_counts(), type(net).__name__
        self.total = counter.get_total_flops()
        self.widths = {name: span.width for name, span in chosen.items()}
        self.factors: dict[str, list[str]] = {}  # layer -> spans whose widths multiply it
        for name, span in chosen.items():
            for path in (*span.outputs, *span.consumers):
                self.factors.setdefault(path, []).append(name)
        self.units: dict[str, int] = {}
        for path, names in self.factors.items():
            whole = 1
            for name in names:
                whole *= self.widths[name]
            self.units[path] = sum(counts.get(f"{root}.{path}", {}).values()) // whole
        self.layers = {  # span -> the layers that its width multiplies
            name: [path for path, names in self.factors.items() if name in names] for name in chosen
        }

    def of(self, paths: Iterable[str], widths: Mapping[str, int]) -> int:
        """FLOPs of some layers."""
        total = 0
        for path in paths:
            value = self.units[path]
            for name in self.factors[path]:
                value *= widths[name]
            total += value
        return total

    def __call__(self, widths: Mapping[str, int]) -> int:
        """FLOPs of the network with these widths, of all spans."""
        return self.total - self.of(self.units, self.widths) + self.of(self.units, widths)


def plain(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose blocks are convolutions; norms outside of blocks stay."""
    blocks = outermost_blocks(model).values()
    others = {id(block): block.deploy() for block in blocks}
    return (replaced(model, others) if others else copy.deepcopy(model)).eval()


def smallest(
    ranked: Iterable[tuple[str, int]], cost: Cost, target: float, most: int | None = None
) -> dict[str, list[int]]:
    """span -> the channels to drop, in the order of `ranked`, until the network costs at most
    `target` FLOPs, or `most` channels were looked at. Every span keeps one."""
    widths, flops = dict(cost.widths), cost.total
    dropped: dict[str, list[int]] = {name: [] for name in widths}
    for visited, (name, channel) in enumerate(ranked):
        if flops <= target or visited == most:
            break
        if widths[name] > 1:
            flops -= cost.of(cost.layers[name], widths)
            widths[name] -= 1
            flops += cost.of(cost.layers[name], widths)
            dropped[name].append(channel)
    return dropped


def uniform(cost: Cost, target: float) -> dict[str, int]:
    """Widths that are all the same fraction of what they were, the largest within `target` FLOPs.

    Raises: ValueError where even widths of 1 cost more.
    """
    for step in range(1000, -1, -1):
        widths = {name: max(1, width * step // 1000) for name, width in cost.widths.items()}
        if cost(widths) <= target:
            return widths
    raise ValueError(
        f"target (={target / cost.total:.4g}) is out of reach: with one channel each, "
        f"{cost(widths) / cost.total:.4g} of the FLOPs are left."
    )


# -- removal ---------------------------------------------------------------------------------------
@torch.no_grad()
def narrowed(model: nn.Module, chosen: Mapping[str, Span], kept: Kept) -> nn.Module:
    """A copy with only the channels of `kept`; the others are dropped, whatever they carry.

    Layers of torch.nn, and blocks of one convolution and its norm ("convbn"), are of new sizes.
    Raises: ValueError for other blocks.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, tuple[Tensor, int]] = {}
    for name, span in chosen.items():
        if len(kept[name]) < span.width:
            rows |= dict.fromkeys(span.outputs, kept[name])
            columns |= dict.fromkeys(span.consumers, (kept[name], span.width))
    others = {}
    for path in dict.fromkeys([*rows, *columns]):
        layer = model.get_submodule(path)
        others[id(layer)] = smaller(layer, path, rows.get(path), columns.get(path))
    return replaced(model, others) if others else copy.deepcopy(model)


def smaller(
    layer: nn.Module, path: str, rows: Tensor | None, columns: tuple[Tensor, int] | None
) -> nn.Module:
    """A layer with only some outputs, `rows`, and only some inputs, `columns` of so many."""

    def cut(value: Tensor) -> Tensor:
        if columns is not None and value.dim() > 1:
            kept, width = columns
            value = value.unflatten(1, (width, -1))[:, kept.to(value.device)].flatten(1, 2)
        if rows is not None and value.dim():
            value = value[rows.to(value.device)]
        return value

    if isinstance(layer, RepBlock):
        return smaller_block(layer, path, rows, columns, cut)
    made = copy.deepcopy(layer)
    for key, value in layer.named_parameters():
        made.register_parameter(key, nn.Parameter(cut(value), value.requires_grad))
    for key, value in layer.named_buffers():
        setattr(made, key, cut(value))
    changes = {}
    if rows is not None:
        changes |= dict.fromkeys(("out_channels", "out_features", "num_features"), len(rows))
        if getattr(layer, "groups", 1) > 1:  # depthwise
            changes |= dict.fromkeys(("in_channels", "groups"), len(rows))
    if columns is not None:
        features = getattr(layer, "in_features", columns[1]) // columns[1] * len(columns[0])
        changes |= dict.fromkeys(("in_channels", "in_features"), features)
    for key, value in changes.items():
        if hasattr(layer, key):
            setattr(made, key, value)
    return in_format_of(layer, made)


def smaller_block(
    layer: RepBlock,
    path: str,
    rows: Tensor | None,
    columns: tuple[Tensor, int] | None,
    cut: Callable[[Tensor], Tensor],
) -> RepBlock:
    """The same of a block."""
    if not isinstance(layer, ConvBN):
        kind = type(layer).__name__
        raise ValueError(f"{path} ({kind}) has branches that cannot lose channels: merge it first.")
    shape = {key: value for key, value in vars(layer.geometry).items()}
    if rows is not None:
        shape["out_channels"] = len(rows)
        if shape["groups"] > 1:
            shape["in_channels"] = shape["groups"] = len(rows)
    if columns is not None:
        shape["in_channels"] = len(columns[0])
    state = {key: cut(value) for key, value in layer.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
        made = ConvBN(**shape, padding_mode=layer.padding_mode)
    if made.state_dict().keys() != state.keys():
        raise ValueError(f"{path} has other norms than one behind its convolution: merge it first.")
    like = next(layer.parameters())
    made = made.to(like.device, like.dtype)
    made.load_state_dict(state)
    return in_format_of(layer, made.train(layer.training))


def in_format_of(layer: nn.Module, made: nn.Module) -> nn.Module:
    """`made` in the memory format of `layer`."""
    spread = any(p.dim() == 4 and not p.is_contiguous() for p in layer.parameters())
    return made.to(memory_format=torch.channels_last) if spread else made


@torch.no_grad()
def emptied(model: nn.Module, chosen: Mapping[str, Span], kept: Kept, images: Tensor) -> nn.Module:
    """A copy with only the channels of `kept`, of a network whose other channels are to count as
    zero: what the layers behind make of a zero channel goes into the biases of those that took it.

    model: in eval mode, of layers of torch.nn alone, no norm behind a source (`merged`); changed.
    images (N, C, H, W): an example, on which these constants are read off.
    Raises: ValueError where a zero channel does not become a constant.
    """
    masks = {name: torch.ones(span.width, dtype=torch.bool) for name, span in chosen.items()}
    for name in chosen:
        masks[name][kept[name].cpu()] = False
        conv = model.get_submodule(name)
        gone = masks[name].to(conv.weight.device)
        conv.weight[gone] = 0
        conv.bias[gone] = 0
    seen: dict[tuple[str, str], Tensor] = {}
    hooks = []
    for name, span in chosen.items():
        if not masks[name].any():
            continue
        for path in span.consumers:

            def look(module, inputs, name=name, path=path, width=span.width):
                x = inputs[0][:1]
                x = x.unflatten(1, (width, -1)) if isinstance(module, nn.Linear) else x
                seen[name, path] = x[0, masks[name].to(x.device)].double().flatten(1)

            hooks.append(model.get_submodule(path).register_forward_pre_hook(look))
    try:
        model(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    for (name, path), x in seen.items():
        low, high = x.amin(1), x.amax(1)
        layer = model.get_submodule(path)
        spread = (high - low) > 1e-5 * high.abs()  # rounding apart
        if spread.any() or (low.any() and not is_pointwise(layer)):
            raise ValueError(f"{name}: a zero channel does not reach {path} as one constant.")
        if low.any():
            gone = masks[name].to(low.device)
            weight = layer.weight.double()
            taps = weight.unflatten(1, (len(gone), -1)).flatten(2)[:, gone].sum(2)
            shift = taps @ low
            bias = shift if layer.bias is None else layer.bias.double() + shift
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
    return narrowed(model, chosen, kept)
