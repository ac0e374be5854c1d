"""The deployed form of a whole network: every block one layer, every norm in its convolution.

The result holds plain torch.nn layers, or fx.GraphModules where a container was a class of this
library, so that it is pickled, loaded and exported where this library is not installed.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections import Counter
from itertools import takewhile

import torch
from torch import fx, nn

from replib.blocks import RepBlock
from replib.blocks.repmlp import RepMLP
from replib.networks import (
    CONVOLUTIONS,
    TRANSPOSED,
    Flow,
    FlowTracer,
    Record,
    computes_as_its_class,
    flows,
    in_train_mode,
    is_foldable_norm,
    norm_affine,
    norms_after,
    outermost,
    outermost_blocks,
    record,
    replaced,
    tied,
    without_norm,
)

# How other codes deploy their blocks, in the order in which they are tried: a method without
# arguments that returns the new module, or changes its own and returns nothing.
METHODS = (
    "fuse",  # timm (RepViT, LeViT, ...), the YOLO family
    "reparameterize",  # timm, Apple's MobileOne and FastViT
    "switch_to_deploy",  # RepVGG, ACNet, DBB, OREPA, RepMLPNet, YOLOv6, ...
    "merge_kernel",  # RepLKNet
    "fuse_repvgg_block",  # YOLOv7
    "local_inject",  # RepMLP
)


def deploy_method(module: nn.Module) -> str | None:
    """The method by which a block of another code deploys itself, if it has one."""
    ours = type(module).__module__.startswith(("torch.", "replib.")) or outermost_blocks(module)
    if ours or not any(True for _ in module.parameters()):
        return None
    for name in METHODS:
        method = getattr(type(module), name, None)
        if callable(method):
            own = list(inspect.signature(method).parameters.values())[1:]
            if all(p.default is not p.empty for p in own):
                return name
    return None


def is_unit(module: nn.Module) -> bool:
    """Whether a module is deployed as one: a block of ours, or of another code."""
    return isinstance(module, RepBlock | RepMLP) or deploy_method(module) is not None


def units(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network that are deployed as one, by name.

    A whole network of another code may offer such a method too (timm's RepViT, the YOLO family):
    then its blocks are deployed one by one, and so can be reported and verified one by one.
    """
    if deploy_method(model) is None:
        return outermost(model, is_unit)
    inner = {
        f"{child}.{name}".rstrip("."): unit
        for child, module in model.named_children()
        for name, unit in outermost(module, is_unit).items()
    }

    def within_one(place: Place) -> bool:
        names = [name for branch in place for name in branch]
        return any(all(f"{name}.".startswith(f"{unit}.") for name in names) for unit in inner)

    return inner if inner and all(map(within_one, parallel(model))) else {"": model}


def deployed_copy(model: nn.Module) -> nn.Module:
    """A copy in which every block of ours is its deployed layer and all else is as it was.

    Raises: ValueError in train mode, where the output depends on the batch and no plain
    convolution can equal it.
    """
    training = in_train_mode(model)
    if training:
        raise ValueError(
            f"{training[0]} is in train mode (so are {len(training) - 1} other modules): "
            "call model.eval() before fusing."
        )
    blocks = outermost(model, lambda module: isinstance(module, RepBlock | RepMLP))
    return replaced(model, {id(block): block.deploy() for block in blocks.values()})


@torch.no_grad()
def refill(deployed: nn.Module, model: nn.Module) -> None:
    """Give a deployed copy the present values of its network, of which nothing else has changed."""
    blocks = outermost(model, lambda module: isinstance(module, RepBlock | RepMLP))
    inside = tuple(f"{name}." for name in blocks)
    values = {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
    deployed.load_state_dict(values, strict=False)
    for name, block in blocks.items():
        layer = deployed.get_submodule(name)
        if isinstance(block, RepBlock):
            kernel = block.merged()
            layer.weight.copy_(kernel.weight)
            layer.bias.copy_(kernel.bias)
        else:
            layer.load_state_dict(block.deploy().state_dict())


@torch.no_grad()
def fuse(model: nn.Module, into: nn.Module | None = None) -> nn.Module:
    """A deployed copy of any network; the model is left as it is.

    Every block of this library becomes one layer; blocks of other codes (timm's, the official
    repositories') are deployed by their own methods (`METHODS`); a batch norm that alone consumes
    a convolution's output is folded into it. Names stay. No class of this library is left:
    containers of ours become fx.GraphModules. `.fusion` of the copy is the report: a record
    {name, class, became, reason} for every block, convolution and norm.
    into: a plain network of the same layers, such as torchvision's resnet18(); then a copy of it
    is returned, filled: where it has no convolution bias its norm carries it, and is otherwise an
    identity. Layers are matched by name, or, where names differ, by the order of their use.
    Raises: ValueError in train mode; where a block cannot be deployed, or still has parallel
    branches afterwards; where `into` does not fit. Warns where parallel convolutions of one input
    belong to no block that is known, and so stay.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted or traced module cannot be opened: fuse it before scripting.")
    fused, report = deployed_copy(model), []
    vars(fused).pop("conversion", None)  # what `convert` did is no part of the deployed network
    for name, block in units(model).items():
        if deploy_method(block) is None:
            became = type(fused.get_submodule(name)).__name__.replace("RepMLP", "RepMLP, dense")
            report.append(record(name, block, became, "merged"))
        else:
            fused = deploy_foreign(fused, name, report)
    fused = fold_norms(fused, report)
    remaining(fused, model, report)
    fused = without_our_classes(fused)
    fused.fusion = report
    return fused if into is None else filled(into, fused)


def deploy_foreign(model: nn.Module, name: str, report: list[Record]) -> nn.Module:
    """Deploy one block of another code inside a network; returns the network."""
    block = model.get_submodule(name)
    method, before = deploy_method(block), class_counts(block)
    what = f"{name or 'the model'} ({type(block).__name__})"
    dtype = next(block.parameters()).dtype
    try:
        made = getattr(block, method)()
    except Exception as error:
        said = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {said[:200]}"
        raise ValueError(f"{what} cannot be deployed: its {method}() raised {reason}.") from error
    made = made if isinstance(made, nn.Module) else block
    if getattr(made, "deploy", None) is False:
        made.deploy = True  # some released blocks forget it, and would use their old branches
    if made is not block:  # some are made anew in float32, and in train mode
        made = made.to(dtype)
    made = made.eval()
    after = class_counts(made)
    if made is block and after == before:
        report.append(record(name, block, "kept", f"its {method}() changed nothing"))
        return model
    was, now = before.total(), after.total()
    became = type(made).__name__
    report.append(record(name, block, became, f"by its own {method}(): {was} -> {now} modules"))
    left = parallel(made)
    if left:
        raise ValueError(
            f"{what} still has parallel branches after its {method}(): {written(left[0])}."
        )
    if made is block:
        return model
    return replaced(model, {id(block): made})


def class_counts(model: nn.Module) -> Counter[str]:
    """How many modules of each class there are."""
    return Counter(type(module).__name__ for module in model.modules())


# -- norms -----------------------------------------------------------------------------------------
def fold_norms(model: nn.Module, report: list[Record]) -> nn.Module:
    """A network with every norm that alone consumes a convolution's output written into it.

    The convolutions are changed in place; the norms are left out of the copy that is returned.
    """
    names, others = {module: name for name, module in model.named_modules()}, {}
    for conv, norm in norms_after(model, (*CONVOLUTIONS, *TRANSPOSED)).items():
        reason = computes_as_its_class(conv) or tied(model, conv)
        if reason is None:
            factor, shift = norm_affine(norm)
            fold(conv, factor, shift)
            others[id(norm)] = rest = without_norm(norm)
            reason = f"folded into {names[conv]}"
            report.append(record(names[norm], norm, type(rest).__name__, reason))
        else:
            report.append(record(names[norm], norm, "kept", f"{names[conv]}: {reason}"))
    return replaced(model, others) if others else model


def fold(conv: nn.Module, factor: torch.Tensor, shift: torch.Tensor) -> None:
    """conv followed by y -> factor y + shift, written into conv in its own dtype (DBB, I)."""
    weight, bias = conv.weight, conv.bias
    exact = weight.double()
    if isinstance(conv, TRANSPOSED):  # (I, O/G, *k): outputs of a group are on the second axis
        groups = exact.unflatten(0, (conv.groups, -1))
        shape = (conv.groups, 1, -1) + (1,) * (exact.dim() - 2)
        exact = (groups * factor.view(shape)).flatten(0, 1)
    else:
        exact = exact * factor.view((-1,) + (1,) * (exact.dim() - 1))
    offset = shift if bias is None else bias.double() * factor + shift
    weight.data = exact.to(weight.dtype)
    conv.bias = nn.Parameter(offset.to(weight.dtype), requires_grad=weight.requires_grad)


# -- what is left ----------------------------------------------------------------------------------
def remaining(fused: nn.Module, model: nn.Module, report: list[Record]) -> None:
    """Report what was not touched, and warn of parallel branches that nothing merges."""
    told = {entry["name"] for entry in report}
    names = {name for name, _ in model.named_modules()}
    for name, module in fused.named_modules():
        if name in told or name not in names:
            continue
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
            report.append(record(name, module, "kept", "a plain convolution"))
        elif is_foldable_norm(module):
            reason = "no convolution that can take it feeds it alone"
            report.append(record(name, module, "kept", reason))
        elif "norm" in type(module).__name__.lower():
            report.append(record(name, module, "kept", "a norm that is no constant map"))
    left = parallel(fused)
    if left:
        text = f"{len(left)} places add parallel convolutions of one input and stay"
        warnings.warn(f"{text}: {written(left[0])}", stacklevel=3)
    for place in left:
        reason = "parallel branches of a class that has no method to merge them"
        report.append({"name": written(place), "class": "", "became": "kept", "reason": reason})


ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
LINEAR = (*CONVOLUTIONS, nn.Identity, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


Place = list[tuple[str, ...]]  # the branches of a sum, each the names of its layers


def written(place: Place) -> str:
    """A sum of branches as text."""
    return " + ".join(" > ".join(branch) or "its input" for branch in place)


def parallel(model: nn.Module) -> list[Place]:
    """The sums in a network that one convolution could be: linear branches of one input."""
    return [place for ways in flows(model) for place in parallel_in(ways[0])]


def parallel_in(flow: Flow) -> list[Place]:
    """The same, of one graph."""

    def source(node: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
        """Where a branch begins, and the linear modules on its way."""
        through: tuple[str, ...] = ()
        while (module := flow.module(node)) is not None:
            if not isinstance(module, LINEAR) and not is_foldable_norm(module):
                break
            through, node = (flow.prefix + node.target, *through), node.args[0]
        return node, through

    def adds(node: fx.Node) -> bool:
        return node.op in ("call_function", "call_method") and node.target in ADDITIONS

    def terms(node: fx.Node) -> list[fx.Node]:
        """The summands; of a sum inside it too, where nothing else uses that."""
        arguments = [a for a in node.args if isinstance(a, fx.Node)]
        inner = [a for a in arguments if adds(a) and len(a.users) == 1]
        return [a for a in arguments if a not in inner] + [t for a in inner for t in terms(a)]

    found = []
    for node in flow.graph.nodes:
        if not adds(node) or (len(node.users) == 1 and adds(next(iter(node.users)))):
            continue
        begin: dict[fx.Node, list[tuple[str, ...]]] = {}
        for start, through in map(source, terms(node)):
            begin.setdefault(start, []).append(through)
        for branches in begin.values():
            if len(branches) > 1 and any(branches):
                same = takewhile(lambda names: len(set(names)) == 1, zip(*branches, strict=False))
                shared = len(list(same))  # they part after these
                found.append([branch[shared:] for branch in branches])
    return found


def without_our_classes(model: nn.Module) -> nn.Module:
    """The network with every module of a class of this library as an fx.GraphModule.

    Raises: ValueError where the control flow of one depends on the data.
    """
    # What was deployed as one stays one, so that it can be compared with its block.
    for ours in (RepMLP, nn.Module):

        def wanted(module: nn.Module, kind: type = ours) -> bool:
            return isinstance(module, kind) and type(module).__module__.startswith("replib.")

        found = outermost(model, wanted)
        graphs = {id(module): traced(name, module) for name, module in found.items()}
        model = replaced(model, graphs) if graphs else model
    return model


def traced(name: str, module: nn.Module) -> fx.GraphModule:
    """A module as a graph of torch's own layers and functions, which is pickled alone."""

    class Tracer(fx.Tracer):  # a local class: a graph that names its tracer would need us to load
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, fx.GraphModule) or super().is_leaf_module(module, name)

    kind = type(module).__name__
    try:
        graph = Tracer().trace(module)
    except Exception as error:
        raise ValueError(f"{name or 'the model'} ({kind}) cannot be traced: {error}") from error
    for node in graph.nodes:
        node.type = None  # an annotation that is a string is not found again
    return fx.GraphModule(module, graph, kind).eval()


# -- into a plain network --------------------------------------------------------------------------
def filled(plain: nn.Module, fused: nn.Module) -> nn.Module:
    """A copy of a plain network with the values of a fused one."""
    out = copy.deepcopy(plain).eval()
    norms = norms_after(out, (*CONVOLUTIONS, *TRANSPOSED))
    theirs, ours = with_values(out, set(norms.values())), with_values(fused)
    if theirs.keys() != ours.keys():
        theirs, ours = in_order_of_use(theirs, out), in_order_of_use(ours, fused)
    if len(theirs) != len(ours):
        raise ValueError(f"into has {len(theirs)} layers with weights, the network {len(ours)}.")
    for (name, target), layer in zip(theirs.items(), ours.values(), strict=True):
        wanted, given = signature(target), signature(layer)
        if wanted != given:
            raise ValueError(f"into: its layer {name} is {wanted}, the network's {given}.")
        values = dict(layer.named_parameters(recurse=False))
        values |= dict(layer.named_buffers(recurse=False))
        if target in norms:
            carry(norms[target], values.pop("bias", None))
        if isinstance(target, Weighted) and target.bias is None and "bias" in values:
            raise ValueError(f"into: its layer {name} has neither a bias nor a norm behind it.")
        target.load_state_dict(values, strict=False)
        if "bias" not in values and getattr(target, "bias", None) is not None:
            target.bias.zero_()
    return out


Weighted = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


def with_values(model: nn.Module, without: set[nn.Module] = frozenset()) -> dict[str, nn.Module]:
    """The modules that hold tensors themselves, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if module not in without
        and any(v is not None for v in (*module._parameters.values(), *module._buffers.values()))
    }


def in_order_of_use(layers: dict[str, nn.Module], model: nn.Module) -> dict[str, nn.Module]:
    """Layers by name, in the order in which a traced network first calls them."""
    try:
        graph = FlowTracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"into: the names of the layers differ, and {type(model).__name__} cannot be traced, "
            "so they cannot be matched by the order of their use either."
        ) from error
    called = dict.fromkeys(n.target for n in graph.nodes if n.op == "call_module")
    return {name: layers[name] for name in called if name in layers}


def signature(layer: nn.Module) -> str:
    """What a layer is, apart from its values and from whether it has a bias."""
    if isinstance(layer, nn.Linear):
        return f"Linear({layer.in_features}, {layer.out_features})"
    if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        shapes = {n: tuple(t.shape) for n, t in layer.state_dict().items()}
        return f"{type(layer).__name__} {shapes}"
    base = next(kind for kind in (*CONVOLUTIONS, *TRANSPOSED) if isinstance(layer, kind))
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    values = ", ".join(str(getattr(layer, name)) for name in (*names, "groups", "padding_mode"))
    return f"{base.__name__}({values})"


def carry(norm: nn.Module, bias: torch.Tensor | None) -> None:
    """Make a norm the map y = x + bias."""
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1)
    if bias is not None and norm.bias is None:
        norm.running_mean.copy_(-bias)
    elif norm.bias is not None:
        norm.bias.zero_() if bias is None else norm.bias.copy_(bias)
