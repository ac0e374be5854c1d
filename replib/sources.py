"""What the released codes call the tensors of a block; data for `replib.official`.

A row of a table is: official prefix -> our prefix; or official key -> `Entry`, where a tensor of
theirs holds some of ours in another layout, or follows from the block. Rows are in the official
order. The tree knows true composition only: what a released code does
otherwise (OREPA's unflipped stem, its permuted rows) is undone here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from replib.blocks import BLOCKS, RepBlock
from replib.blocks.dyrep import BRANCHES, DyRep
from replib.blocks.repmlp import RepMLP

State = Mapping[str, Tensor]
Renames = tuple[tuple[str, str], ...]


class Entry(NamedTuple):
    """One official tensor: the keys of ours that it holds, the way there, and the way back.

    shape: what `write` gives, where it is costly to find out by doing it.
    """

    ours: tuple[str, ...]
    write: Callable[..., Tensor]
    read: Callable[[Tensor], Iterable[Tensor]]
    shape: tuple[int, ...] | None = None


Table = dict[str, str | Entry]
BN: Table = {"bn": "post_norm.norm"}  # of the blocks with one norm after the sum


def derived(compute: Callable[[], Tensor], shape: tuple[int, ...] | None = None) -> Entry:
    """An official tensor that follows from the block: written on export, ignored on load."""
    return Entry((), compute, lambda tensor: (), shape)


def rearranged(ours: str, write: Callable[[Tensor], Tensor], read: Callable) -> Entry:
    """One tensor of ours in another layout."""
    return Entry((ours,), write, lambda tensor: (read(tensor),))


def flipped(ours: str, axes: tuple[int, ...]) -> Entry:
    """One tensor of ours, mirrored along some axes."""
    return rearranged(ours, lambda t: t.flip(axes), lambda t: t.flip(axes))


@dataclass(frozen=True)
class Source:
    """How a released code names the tensors of one block.

    build: (its arguments, its file) -> our block; names: our block -> table.
    deployed: the name of the one convolution that its deployed form consists of.
    around: (pattern of our path, official path) of the layers around the block.
    kept: what the official names begin with that are the same in the deployed form.
    """

    build: Callable[[Mapping, State], nn.Module]
    names: Callable[[nn.Module], Table]
    deployed: str
    around: Renames = (("block", ""),)
    kept: tuple[str, ...] = ()


def family(name: str, **renamed: str) -> Callable[[Mapping, State], RepBlock]:
    """Build a block of this family; renamed: our option = their argument."""

    def build(kwargs: Mapping, state: State) -> RepBlock:
        arguments = dict(kwargs)
        options = {o: arguments.pop(a) for o, a in renamed.items() if a in arguments}
        return BLOCKS[name](**arguments | options)

    return build


def layers(ours: str, conv: str, norm: str) -> Table:
    """A convolution and its norm."""
    return {conv: f"branches.{ours}.0", norm: f"branches.{ours}.1.norm"}


def merged(prefix: str, block: RepBlock) -> Table:
    """RepAn keeps a merged convolution in every block; in its files it may be stale.

    Merged once for both rows: a table is made for one reading or writing.
    """
    kernel, g = cache(block.merged), block.geometry
    shape = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
    return {
        f"{prefix}.weight": derived(lambda: kernel().weight, shape),
        f"{prefix}.bias": derived(lambda: kernel().bias, shape[:1]),
    }


def always_merged(prefix: str, names: Callable) -> Callable[[RepBlock], Table]:
    """The names of a block, after those of its merged convolution."""
    return lambda block: merged(prefix, block) | names(block)


# -- RepVGG, ACNet, MobileOne, RepLKNet, plain -----------------------------------------------------
def repvgg(block: RepBlock) -> Table:
    return {
        "rbr_identity": "branches.identity.norm",
        **layers("dense", "rbr_dense.conv", "rbr_dense.bn"),
        **layers("1x1", "rbr_1x1.conv", "rbr_1x1.bn"),
    }


def repopt_repvgg(block: RepBlock) -> Table:
    table = layers("dense", "conv_3x3", "bn_3x3") | layers("1x1", "conv_1x1", "bn_1x1")
    return table | {"bn_identity": "branches.identity.norm"}


def timm_repvgg(block: RepBlock) -> Table:
    """As timm and DyRep name it; DyRep grows a block in the place of the first convolution."""
    table = layers("dense", "conv_kxk.conv", "conv_kxk.bn")
    table |= layers("1x1", "conv_1x1.conv", "conv_1x1.bn")
    grown = block.branches["dense"][0]
    if isinstance(grown, DyRep):
        rows = {f"conv_kxk.conv.{k}": f"branches.dense.0.{v}" for k, v in dyrep(grown).items()}
        table = replaced(table, "conv_kxk.conv", rows)
    return {"identity": "branches.identity.norm", **table}


def repan_repvgg(block: RepBlock) -> Table:
    table = layers("dense", "conv_3", "bn_3") | layers("1x1", "conv_1", "bn_1")
    return table | {"bn_0": "branches.identity.norm"} | merged("rep_conv", block)


def build_repan_repvgg(kwargs: Mapping, state: State) -> RepBlock:
    # The first block of a stage has no identity branch, whatever its shape.
    return BLOCKS["repvgg"](**kwargs, identity="bn_0.weight" in state)


def build_mobileone(kwargs: Mapping, state: State) -> RepBlock:
    # The released default is one branch, ours the paper's usual four.
    return family("mobileone", n="num_conv_branches")({"num_conv_branches": 1, **kwargs}, state)


def acb(block: RepBlock) -> Table:
    return {
        **layers("square", "square_conv", "square_bn"),
        "ver_conv": "branches.axis0.0",
        "hor_conv": "branches.axis1.0",
        "ver_bn": "branches.axis0.1.norm",
        "hor_bn": "branches.axis1.1.norm",
    }


def mobileone(block: RepBlock) -> Table:
    table: Table = {"rbr_skip": "branches.skip.norm"}
    for name in block.branches:
        if name.startswith("conv"):
            prefix = f"rbr_conv.{name.removeprefix('conv')}"
            table |= layers(name, f"{prefix}.conv", f"{prefix}.bn")
    return table | layers("scale", "rbr_scale.conv", "rbr_scale.bn")


def replk(block: RepBlock) -> Table:
    return {
        **layers("large", "lkb_origin.conv", "lkb_origin.bn"),
        **layers("small", "small_conv.conv", "small_conv.bn"),
    }


def csla(block: RepBlock) -> Table:
    return {
        "conv": "branches.conv.0",
        "scale_conv": "branches.conv.1",
        "conv_1x1": "branches.1x1.0",
        "scale_1x1": "branches.1x1.1",
        "scale_identity": "branches.identity",
        **BN,
    }


def convbn(block: RepBlock) -> Table:
    return layers("conv", "conv", "bn")


# -- DBB and DyRep ---------------------------------------------------------------------------------
def pooling(theirs: str, ours: str, block: RepBlock) -> Table:
    """[1x1, padded norm,] average pool, norm; the bracket is missing in depthwise blocks."""
    at = f"branches.{ours}"
    if len(block.branches[ours]) == 2:
        return {f"{theirs}.avgbn": f"{at}.1.norm"}
    return {
        f"{theirs}.conv": f"{at}.0",
        f"{theirs}.bn.bn": f"{at}.1.norm",
        f"{theirs}.avgbn": f"{at}.3.norm",
    }


def pair(theirs: str, ours: str, first: str) -> Table:
    """1x1, padded norm, k x k, norm."""
    at = f"branches.{ours}"
    return {
        f"{theirs}.{first}": f"{at}.0",
        f"{theirs}.bn1.bn": f"{at}.1.norm",
        f"{theirs}.conv2": f"{at}.2",
        f"{theirs}.bn2": f"{at}.3.norm",
    }


def dbb(block: RepBlock) -> Table:
    first = "idconv1" if block.branches["1x1_kxk"][0].offset else "conv1"
    return {
        **layers("origin", "dbb_origin.conv", "dbb_origin.bn"),
        **pooling("dbb_avg", "avg", block),
        **layers("1x1", "dbb_1x1.conv", "dbb_1x1.bn"),
        **pair("dbb_1x1_kxk", "1x1_kxk", first),
    }


def rep(block: RepBlock) -> Table:
    origin = layers("origin", "dbb_origin.conv", "dbb_origin.bn")
    return origin | layers("1x1", "dbb_1x1.conv", "dbb_1x1.bn")


NESTED = {"dbb_kxk.conv": ("kxk", 0), "dbb_1x1_kxk.conv2": ("1x1_kxk", 2)}  # may be blocks again


def build_dyrep(kwargs: Mapping, state: State) -> RepBlock:
    """The branches are read from the file, those of blocks in the block too."""
    flags = [any(key.startswith(f"dbb_{name}.") for key in state) for name in BRANCHES]
    block = DyRep(**{**kwargs, "branches": kwargs.get("branches", flags)})
    for prefix, (name, at) in NESTED.items():
        inner = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(prefix)}
        if any(key.startswith("dbb_") for key in inner):
            chain, own = block.branches[name], {k: v for k, v in kwargs.items() if k != "branches"}
            own |= {"in_channels": chain[at].in_channels, "stride": 1, "padding": None}
            setattr(chain, str(at), build_dyrep(own, inner))
    return block


def dyrep(block: RepBlock) -> Table:
    table = {
        **layers("1x1", "dbb_1x1.conv", "dbb_1x1.bn"),
        **pair("dbb_1x1_kxk", "1x1_kxk", "conv1"),
        **(pooling("dbb_1x1_avg", "1x1_avg", block) if "1x1_avg" in block.branches else {}),
        **layers("kxk", "dbb_kxk.conv", "dbb_kxk.bn"),
        **layers("1xk", "dbb_1xk.conv", "dbb_1xk.bn"),
        **layers("kx1", "dbb_kx1.conv", "dbb_kx1.bn"),
        "dbb_id": "branches.id.norm",
    }
    for prefix, (name, at) in NESTED.items():
        if name in block.branches and isinstance(block.branches[name][at], DyRep):
            inside = dyrep(block.branches[name][at])
            rows = {f"{prefix}.{k}": f"branches.{name}.{at}.{v}" for k, v in inside.items()}
            table = replaced(table, prefix, rows)
    return table


def replaced(table: Table, key: str, rows: Table) -> Table:
    """The table with other rows in the place of one."""
    return {k: v for old in table for k, v in (rows if old == key else {old: table[old]}).items()}


# -- OREPA -----------------------------------------------------------------------------------------
def linear_branches(tree: nn.Module, at: str, name: str, spare_row: bool = False, flip=False):
    """OREPA's branches: `tree.branches` under the path `at`, official names `name` + ...

    spare_row: the released `vector` has a row that nothing reads. flip: a released stem does
    not flip the kernels of its later layers, as true composition does.
    """
    branches, conv = tree.branches, {"avg": "avg_conv", "prior": "pfir_conv", "1x1": "1x1"}
    axes = tuple(range(-branches["origin"][0].dims, 0)) if flip else ()
    groups = branches["origin"][0].groups
    sums = tuple(f"{at}.{b}.{len(chain) - 1}.weight" for b, chain in branches.items())

    def regrouped(rows: Tensor, outer: int) -> Tensor:
        return rows.view(outer, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    def stacked(*rows: Tensor) -> Tensor:
        return torch.stack([*rows, *[torch.zeros_like(rows[0])] * spare_row])

    pooled = branches["avg"][1]
    table: Table = {
        f"{name}origin": flipped(f"{at}.origin.0.weight", axes),
        **{f"{name}{conv[b]}": f"{at}.{b}.0.weight" for b in conv if b in branches},
        f"{name}1x1_kxk_idconv1": f"{at}.1x1_kxk.0.weight",
        f"{name}1x1_kxk_conv2": flipped(f"{at}.1x1_kxk.1.weight", axes),
        f"{name}gconv_dw": flipped(f"{at}.separable.0.weight", axes),
        # Released rows run over the groups first: row q G + c is output q of group c.
        f"{name}gconv_pw": rearranged(
            f"{at}.separable.1.weight",
            lambda t: regrouped(t, groups),
            lambda t: regrouped(t, len(t) // groups),
        ),
        "vector": Entry(sums, stacked, lambda t: t[: len(sums)].unbind()),
        f"{name}avg_avg": derived(lambda: pooled.kernel(torch.float32).weight[0, 0]),
        "id_tensor": derived(lambda: branches["1x1_kxk"][0].identity_weight(torch.float32)),
        f"{name}prior": rearranged(
            f"{at}.prior.1.weight",
            lambda t: t.squeeze(1).flip(axes),
            lambda t: t.flip(axes).unsqueeze(1),
        ),
    }
    return table


def orepa(block: RepBlock) -> Table:
    return linear_branches(block, "branches", "weight_orepa_") | BN


def orepa_1x1(block: RepBlock) -> Table:
    scales = ("branches.origin.1.weight", "branches.product.2.weight")
    return {
        "weight_or1x1_origin": "branches.origin.0.weight",
        "weight_or1x1_l2i_conv1": "branches.product.0.weight",
        "weight_or1x1_l2i_conv2": "branches.product.1.weight",
        "vector": Entry(scales, lambda *rows: torch.stack(rows), torch.unbind),
        **BN,
    }


def orepa_stem(block: RepBlock) -> Table:
    table: Table = {}
    for i, layer in enumerate(block.branches["layers"]):
        at = f"branches.layers.{i}.branches"
        rows = linear_branches(layer, at, "weight_orepa_", flip=i > 0)
        table |= {f"weight{i}.{key}": row for key, row in rows.items()}
    return table | BN


def orepa_stem_base(block: RepBlock) -> Table:
    depth = len(block.branches["layers"])
    kernels = {
        f"weight{i}": flipped(f"branches.layers.{i}.weight", (-2, -1) if i else ())
        for i in range(depth)
    }
    return kernels | BN


def orepa_repvgg(block: RepBlock) -> Table:
    inner, at = block.branches["dense"][0], "branches.dense.0.branches"
    spare = "identity" in block.branches
    rows = linear_branches(inner, at, "weight_rbr_", spare_row=spare)
    return {
        "rbr_identity": "branches.identity.norm",
        **{f"rbr_dense.{key}": row for key, row in rows.items()},
        "rbr_dense.bn": "branches.dense.1.norm",
        **layers("1x1", "rbr_1x1.conv", "rbr_1x1.bn"),
    }


# -- RepMLP ----------------------------------------------------------------------------------------
def build_repmlp(kwargs: Mapping, state: State) -> RepMLP:
    if kwargs["in_channels"] != kwargs["out_channels"]:
        raise ValueError(
            f"in_channels (={kwargs['in_channels']}) must be out_channels "
            f"(={kwargs['out_channels']}): RepMLP keeps the shape."
        )
    return RepMLP(
        kwargs["in_channels"],
        kwargs["h"],
        kwargs["w"],
        kwargs.get("num_sharesets", 1),
        tuple(kwargs.get("reparam_conv_k") or ()),
        official_order=True,
    )


def repmlp(block: RepMLP) -> Table:
    table: Table = {
        "gp.fc1": "reduce",
        "gp.fc2": "expand",
        "fc3": "dense",
        "fc3_bn": "norm.norm",
    }
    for k in block.local:
        table |= {f"repconv{k}.conv": f"local.{k}.0", f"repconv{k}.bn": f"local.{k}.1.norm"}
    return table


RENAMED_EXCITE = (
    ("block", ""),
    (r"(se|post_se)\.reduce", r"\1.down"),
    (r"(se|post_se)\.expand", r"\1.up"),
)
SOURCES = {
    "repvgg": Source(family("repvgg"), repvgg, "rbr_reparam", RENAMED_EXCITE),
    "acb": Source(family("acb"), acb, "fused_conv"),
    "dbb": Source(family("dbb", inner_channels="internal_channels_1x1_3x3"), dbb, "dbb_reparam"),
    "orepa": Source(family("orepa"), orepa, "orepa_reparam"),
    "orepa_1x1": Source(family("orepa_1x1"), orepa_1x1, "or1x1_reparam"),
    "orepa_stem": Source(family("orepa_stem"), orepa_stem, "or_large_reparam"),
    "orepa_stem_base": Source(family("orepa_stem_base"), orepa_stem_base, "or_large_reparam"),
    "orepa_repvgg": Source(family("orepa_repvgg"), orepa_repvgg, "rbr_reparam", RENAMED_EXCITE),
    "mobileone": Source(build_mobileone, mobileone, "reparam_conv"),
    "replk": Source(family("replk", small="small_kernel"), replk, "lkb_reparam"),
    "convbn": Source(family("convbn"), convbn, "conv"),
    "dyrep": Source(build_dyrep, dyrep, "conv_deployed"),
    "repopt_csla": Source(family("csla"), csla, "conv"),
    "repopt_repvgg": Source(family("repvgg"), repopt_repvgg, "rbr_reparam"),
    "timm_repvgg": Source(family("repvgg"), timm_repvgg, "reparam_conv"),
    "repmlp": Source(build_repmlp, repmlp, "fc3", kept=("gp.",)),
    "repan_repvgg": Source(build_repan_repvgg, repan_repvgg, "rep_conv"),
    "repan_dbb": Source(family("dbb"), always_merged("dbb_reparam", dbb), "dbb_reparam"),
    "repan_acb": Source(family("acb"), always_merged("fused_conv", acb), "fused_conv"),
    "repan_rep": Source(family("rep"), always_merged("dbb_reparam", rep), "dbb_reparam"),
    "repan_convbn": Source(family("convbn"), always_merged("rep_conv", convbn), "rep_conv"),
}
