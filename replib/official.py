"""Official checkpoints in and out: one reader, one writer, over two tables.

`replib.sources` names the tensors of a block, `replib.architectures` the layers of a network.
What our module would export is also what a file must hold, so a file is checked against that.
"""

from __future__ import annotations

import copy
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from replib.architectures import ARCHITECTURES, Architecture
from replib.blocks import BLOCKS, RepBlock
from replib.blocks.repmlp import RepMLP
from replib.blocks.repvgg import RepVGG
from replib.foreign import refuse_claims, unpickled
from replib.models.layers import SqueezeExcite
from replib.networks import outermost_blocks
from replib.sources import SOURCES, Entry, Renames, Source

State = dict[str, Tensor]
OPTIONAL = "num_batches_tracked"  # files older than torch 0.4.1 lack it
WB = ("weight", "bias")
# What released files hold beside tensors: settings, read as plain data.
SETTINGS = [Namespace, (OrderedDict, "yacs.config.CfgNode")]
SQUEEZE_EXCITE = {"use_se": ("se", 16), "use_post_se": ("post_se", 4)}  # name, reduction


def joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def renamed(path: str, renames: Renames) -> str:
    """The official path of one of our modules."""
    for pattern, official in renames:
        if match := re.fullmatch(pattern, path):
            return match.expand(official)
    return path


def verbatim(key: str) -> Entry:
    return Entry((key,), torch.clone, lambda tensor: (tensor,))


def block_entries(block: nn.Module, source: Source) -> Iterator[tuple[str, Entry]]:
    """(official key, Entry) for every tensor of a block, in the official order."""
    keys = [key for key in block.state_dict() if key.rpartition(".")[2] != "rate"]
    for theirs, ours in source.names(block).items():
        if isinstance(ours, Entry):
            yield theirs, ours
            continue
        for key in keys:
            if key == ours or key.startswith(f"{ours}."):
                yield theirs + key.removeprefix(ours), verbatim(key)


def entries(
    module: nn.Module,
    sources: Mapping[type, Source],
    renames: Renames,
    path: str = "",
    deployed: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Entry]]:
    """(official key, Entry) for every tensor of a network, in the order of its modules.

    deployed: our path of a block -> the official name of the convolution it is deployed as.
    """
    theirs, deployed = renamed(path, renames), deployed or {}
    if path in deployed and isinstance(module, nn.Conv2d):
        theirs = joined(theirs, deployed[path])
    if isinstance(module, RepBlock | RepMLP):
        if type(module) not in sources:
            known = ", ".join(family.__name__ for family in sources)
            raise ValueError(f"{path} is a {type(module).__name__}; the layout has {known} only.")
        for key, entry in block_entries(module, sources[type(module)]):
            ours = tuple(joined(path, name) for name in entry.ours)
            yield joined(theirs, key), entry._replace(ours=ours)
        return
    for name in module.state_dict():
        if "." not in name:
            yield joined(theirs, name), verbatim(joined(path, name))
    # Released codes register squeeze-excite before the branches.
    for name, child in sorted(module.named_children(), key=lambda c: isinstance(c[1], RepBlock)):
        yield from entries(child, sources, renames, joined(path, name), deployed)


@torch.no_grad()
def written(module: nn.Module, table: Mapping[str, Entry]) -> State:
    """The tensors of a module under their official names."""
    own = module.state_dict()
    if missing := [name for e in table.values() for name in e.ours if name not in own]:
        raise ValueError(f"the model is of another layout: it has no {missing[0]}.")
    return {key: e.write(*(own[name] for name in e.ours)).detach() for key, e in table.items()}


@torch.no_grad()
def check(module: nn.Module, table: Mapping[str, Entry], state: State) -> None:
    """Raises: ValueError that lists what of a state is missing, unexpected or of another shape."""
    own = module.state_dict()
    shapes = {
        key: e.shape or tuple(e.write(*(own[name] for name in e.ours)).shape)
        for key, e in table.items()
    }
    optional = {key for key, e in table.items() if not e.ours or key.endswith(OPTIONAL)}
    wrong = {
        "missing": [key for key in shapes if key not in state and key not in optional],
        "unexpected": [key for key in state if key not in shapes],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {shape}"
            for key, shape in shapes.items()
            if key in state and state[key].shape != shape
        ],
    }
    if any(wrong.values()):
        lists = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in wrong.items() if keys)
        raise ValueError(f"the file does not fit this architecture; {lists}.")


def fill(module: nn.Module, table: Mapping[str, Entry], state: State) -> nn.Module:
    """Load an official state into a module.

    Raises: ValueError that lists what is missing, unexpected or of another shape.
    """
    check(module, table, state)
    own = module.state_dict()
    for key, entry in table.items():
        if key in state:
            own |= zip(entry.ours, entry.read(state[key]), strict=True)
    module.load_state_dict(own)
    return module


def read_state(source: str | Path | Mapping) -> State:
    """The tensors of a checkpoint by name, whatever it is wrapped in.

    Reads no code; unwraps `model_state`, `state_dict` and `model`; strips `module.`.
    Raises: ValueError for a file that is damaged or holds something else.
    """
    state = source
    if not isinstance(source, Mapping):
        try:
            state = unpickled(Path(source), SETTINGS)
        except ValueError as error:
            raise ValueError(f"{source} cannot be read as a checkpoint: {error}") from None
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"a checkpoint must be a dictionary of tensors, not {type(state)}.")
    if other := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"a checkpoint must hold tensors only; these are none: {other[:9]}.")
    if other := [key for key in state if not isinstance(key, str)]:
        raise ValueError(f"a checkpoint must name its tensors; these are no names: {other[:9]}.")
    if not isinstance(source, Mapping):
        refuse_claims(state)
    return {key.removeprefix("module."): value for key, value in state.items()}


def named(kind: str, name: str, known: Mapping):
    """known[name], or a ValueError that lists what there is."""
    if name not in known:
        raise ValueError(f"{kind} (={name!r}) must be one of {', '.join(known)}.")
    return known[name]


def block_table(module: nn.Module, source: str) -> dict[str, Entry]:
    """Official key -> Entry for what `load_block` returns."""
    layout = named("source", source, SOURCES)
    family = type(getattr(module, "block", module))
    return dict(entries(module, {family: layout}, layout.around))


def sources_of(layout: Architecture) -> dict[type, Source]:
    """What names the blocks of a network, by their class."""
    families = {**BLOCKS, "repmlp": RepMLP}
    return {families[family]: SOURCES[source] for family, source in layout.sources.items()}


def model_table(
    model: nn.Module, layout: Architecture, deployed: Mapping[str, str] | None = None
) -> dict[str, Entry]:
    """Official key -> Entry for a network."""
    return dict(entries(model, sources_of(layout), layout.renames, deployed=deployed))


def deployable(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network by our path."""
    mlps = {path: m for path, m in model.named_modules() if isinstance(m, RepMLP)}
    return outermost_blocks(model) | mlps


def deployed_names(model: nn.Module, layout: Architecture) -> dict[str, str]:
    """Our path of every block -> the official name of the convolution it is deployed as."""
    sources = sources_of(layout)
    return {path: sources[type(block)].deployed for path, block in deployable(model).items()}


def made_for(layout: Architecture, state: Mapping) -> nn.Module:
    """Our body with the options and the number of classes that a file has."""
    return layout.build(classes=len(state[layout.classifier]), **layout.options(state))


def structured(model: nn.Module, layout: Architecture, state: State) -> dict[str, str]:
    """Give our body the grown and the deployed blocks of a file; returns `deployed_names`."""
    if layout.grows:
        grow(model, layout, state)
    deployed, sources = deployed_names(model, layout), sources_of(layout)
    for path, block in deployable(model).items():
        source, theirs = sources[type(block)], renamed(path, layout.renames)
        conv = {joined(theirs, source.deployed, name) for name in WB}
        rows = [key for key, _ in block_entries(block, source) if not key.startswith(source.kept)]
        gone = {joined(theirs, key) for key in rows} - conv
        if conv <= state.keys() and gone.isdisjoint(state):
            # Without values, which are in the file: merging takes long.
            empty = copy.deepcopy(block).to("meta").deploy()
            device = next(block.parameters()).device
            model.set_submodule(path, empty.to_empty(device=device))
    return deployed


def grow(model: nn.Module, layout: Architecture, state: State) -> None:
    """Put DyRep blocks where a file has them in the place of a convolution.

    One that was cut down to a single branch again is a convolution with bias.
    """
    for path, conv in [*model.named_modules()]:
        theirs, g = renamed(path, layout.renames), conv
        if isinstance(conv, RepVGG):
            path, g = joined(path, "branches.dense.0"), conv.geometry
            theirs = joined(theirs, "conv_kxk.conv")
        elif not isinstance(conv, nn.Conv2d):
            continue
        start = f"{theirs}."
        own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        if any(key.startswith("dbb_") for key in own):
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
            kwargs = {name: getattr(g, name) for name in names}
            model.set_submodule(path, SOURCES["dyrep"].build(kwargs, own))
        elif "bias" in own and getattr(conv, "bias", own) is None:
            conv.bias = nn.Parameter(torch.empty(conv.out_channels))


def load_block(source: str, kwargs: Mapping, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """One block of a released code, from its arguments and its state: a RepBlock.

    With squeeze-excite it is nn.Sequential(block, se), or (block, relu, post_se); otherwise the
    activation is left out. A deployed file gives one plain convolution.
    Raises: ValueError for a source that is not known, or a state that does not fit.
    """
    layout, state = named("source", source, SOURCES), read_state(state_dict)
    options = dict(kwargs)
    excite = [SQUEEZE_EXCITE[name] for name in SQUEEZE_EXCITE if options.pop(name, False)]
    module = layout.build(options, state)
    if isinstance(module, RepBlock) and set(state) == {f"{layout.deployed}.{n}" for n in WB}:
        module = module.deploy()
        return fill(module, {f"{layout.deployed}.{n}": verbatim(n) for n in WB}, state)
    for name, reduction in excite:
        channels = module.out_channels
        around = {"relu": nn.ReLU()} if name == "post_se" else {}
        around[name] = SqueezeExcite(channels, channels // reduction)
        module = nn.Sequential(OrderedDict(block=module, **around))
    return fill(module, block_table(module, source), state)


def export_block(module: nn.Module, source: str) -> State:
    """The state of what `load_block` returned, as the released code names it."""
    return written(module, block_table(module, source))


def load_model(path_or_state: str | Path | Mapping, arch: str) -> nn.Module:
    """A released network, whole or deployed; the number of classes is read from the file.

    A block of which the file holds the deployed convolution only becomes that convolution.
    Raises: ValueError for an architecture that is not known, or a file that does not fit it.
    """
    layout, state = named("arch", arch, ARCHITECTURES), read_state(path_or_state)
    if layout.classifier not in state:
        raise ValueError(f"the file does not fit this architecture; missing: {layout.classifier}.")
    model = made_for(layout, state)
    deployed = structured(model, layout, state)
    return fill(model, model_table(model, layout, deployed), state)


def export(model: nn.Module, arch: str, epoch: int = 0) -> dict:
    """What the original script loads, in its names and order: {"epoch", "model_state"} or so.

    The state is under the key where that script looks for it, or bare where it expects no more.
    Merged convolutions are filled from the current merge; lambda is not part of the layout. The
    model may be deployed (`replib.fusing.deployed_copy`, which keeps our containers).
    Raises: ValueError for an architecture that is not known, or a model of another one.
    """
    layout = named("arch", arch, ARCHITECTURES)
    plain = model_table(model, layout)
    if layout.classifier not in plain:
        raise ValueError(f"the model is no {arch}: it has no {layout.classifier}.")
    with torch.device("meta"):
        classes = model.state_dict()[plain[layout.classifier].ours[0]]
        like = made_for(layout, plain | {layout.classifier: classes})
    state = written(model, model_table(model, layout, deployed_names(like, layout)))
    with torch.device("meta"):
        deployed = structured(like, layout, state)
        check(like, model_table(like, layout, deployed), state)
    return state if layout.wrapper is None else {"epoch": epoch, layout.wrapper: state}
