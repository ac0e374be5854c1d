"""A declared tree with other ends: what ends its branches, and which of them are left out.

Every family can be had with a norm at the end of each branch, with one norm behind their sum, or
with none; where a branch has no norm, a factor per channel, one factor or nothing stands there.
OREPA's linearization of a block is norms="sum", scaling="channel"; DBB's purely linear blocks and
RepVGG's variant with a norm after the addition are norms="sum".

Sources: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3; Ding et al.,
"Diverse Branch Block", CVPR 2021, table 4; Ding et al., "RepVGG", CVPR 2021, table 7.
"""

from __future__ import annotations

from collections.abc import Collection

from replib.branches import AveragePool, Chain, Norm, Piece, Scalar, Scale, Sum

NORMS = {
    "branches": "one at the end of every branch, none after the sum",
    "sum": "one after the sum; those of the branches are left out",
    "none": "no norm at all",
}
SCALINGS = {
    "channel": "a factor per output channel",
    "scalar": "one factor",
    "none": "no factor",
}


def with_ends(
    branches: dict[str, Piece], norms: str | None, scaling: str | None
) -> dict[str, Piece]:
    """Branches with their norms and scales as keys of `NORMS` and `SCALINGS`; None: as declared.

    Raises: ValueError for other keys, and for a scaling where branches have norms.
    """
    for name, value, known in (("norms", norms, NORMS), ("scaling", scaling, SCALINGS)):
        if value is not None and value not in known:
            raise ValueError(f"{name} (={value!r}) must be one of {', '.join(known)}.")
    scales = any(isinstance(part, Scale) for b in branches.values() for part in b.modules())
    if scaling is not None and (norms == "branches" or (norms is None and not scales)):
        raise ValueError(
            f"scaling (={scaling!r}) is for branches that do not end in a norm: say norms='sum' "
            "or norms='none' too."
        )
    return {name: rewritten(branch, norms, scaling) for name, branch in branches.items()}


def rewritten(branch: Piece, norms: str | None, scaling: str | None) -> Piece:
    """A branch of which a norm that is left out is gone; at its end a scaling takes its place."""
    if norms is scaling is None:
        return branch
    if isinstance(branch, Sum):
        inside = {name: rewritten(part, norms, scaling) for name, part in branch.branches.items()}
        return Sum(inside, branch.main, squeezed=branch.squeezed and norms != "branches")
    links = links_of(branch)
    last = links.pop() if isinstance(links[-1], Norm | Scale) else None
    if norms in ("sum", "none"):
        links = [link for link in links if not isinstance(link, Norm)]
    links = [rewritten(link, norms, scaling) if isinstance(link, Sum) else link for link in links]
    if last is not None or not isinstance(links[-1], Sum):  # a sum's branches have their own ends
        links += ending(branch, last, norms, scaling)
    if isinstance(branch, Chain) or len(links) > 1:
        return Chain(*links)
    return links[0] if links else AveragePool(branch.out_channels, (1,) * branch.dims)


def ending(
    branch: Piece, last: Norm | Scale | None, norms: str | None, scaling: str | None
) -> list[Norm | Scale]:
    """What ends a branch that was declared to end in `last`."""
    shape = branch.out_channels, branch.dims
    if norms == "branches":
        return [last if isinstance(last, Norm) else Norm(*shape)]
    if isinstance(last, Norm) and norms is not None:
        last = None if scaling is None else Scale(*shape)
    if isinstance(last, Scale) and scaling == "scalar":
        last = Scalar(*shape, last.initial, last.parameter.requires_grad)
    return [] if last is None or (isinstance(last, Scale) and scaling == "none") else [last]


def links_of(piece: Piece) -> list[Piece]:
    """The links of a chain, and of the chains in it."""
    if not isinstance(piece, Chain):
        return [piece]
    return [link for part in piece for link in links_of(part)]


def left_out(
    branches: dict[str, Piece], names: Collection[str], known: dict[str, Piece], main: str
) -> dict[str, Piece]:
    """The branches without those of these names; in the sums inside them, too.

    known: all branches of the family. Raises: ValueError for the main one, or one it never has.
    """
    sides = {*known, *(name for part in sums_in(known) for name in part.branches)} - {main}
    for name in names:
        if name not in sides:
            raise ValueError(
                f"without (={list(names)}): {name!r} must be a side branch: "
                f"{', '.join(sorted(sides)) or 'there is none'}."
            )
    for part in sums_in(branches):
        for name in set(names) & {*part.branches} - {part.main}:
            del part.branches[name]
    return {name: branch for name, branch in branches.items() if name not in names}


def sums_in(branches: dict[str, Piece]) -> list[Sum]:
    """The sums inside branches."""
    return [part for b in branches.values() for part in b.modules() if isinstance(part, Sum)]
