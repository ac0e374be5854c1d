"""The kernels of the picture add up to the merged one, and each is that of its branch."""

import re
from xml.etree import ElementTree

import pytest
import torch
from conftest import TINY
from test_blocks import CASES, close, scrambled
from test_blocks import build as scrambled_block
from test_diagram import SVG, assert_nothing_overlaps, words_of

from replib.blocks import BLOCKS
from replib.blocks.block import Geometry, RepBlock
from replib.blocks.repmlp import RepMLP
from replib.branches import Chain, Piece
from replib.experiments.cells import new_model
from replib.report.kernel_picture import (
    DIVERGING,
    SHIFT,
    ColourScale,
    branch_kernels,
    channel_pairs,
    kernel_picture,
)
from replib.report.page import NO_BLOCK, Page

RATE = 0.3
FAMILIES = [(name, "kernel 1" if name == "orepa_1x1" else "plain") for name in BLOCKS]
SOME = (
    "plain",
    "kernel 1",
    "grouped",
    "depthwise, wider",
    "strided",
    "rectangular",
    "1-D",
    "3-D, mixed",
)


def build(family, case):
    block, x = scrambled_block(family, case)
    block.set_rate(RATE)
    return block, x


@pytest.mark.parametrize("family, case", [p for p in CASES if p.values[1] in SOME])
@torch.no_grad()
def test_the_branches_add_up_to_the_merged_kernel(family, case):
    block, _ = build(family, case)
    found, merged = branch_kernels(block), block.merged()
    assert next(iter(found)) == block.main
    assert set(found) - {SHIFT} == set(block.branches)
    assert (SHIFT in found) == (block.post_norm is not None)
    for kernel in found.values():
        assert kernel.weight.shape == merged.weight.shape
        assert (kernel.groups, kernel.dilation) == (merged.groups, merged.dilation)
    close(sum(kernel.weight for kernel in found.values()), merged.weight)
    close(sum(kernel.bias for kernel in found.values()), merged.bias)


@pytest.mark.parametrize("family, case", FAMILIES)
@torch.no_grad()
def test_every_kernel_is_that_of_its_own_branch(family, case):
    """A sum does not notice two that have changed places."""
    block, x = build(family, case)
    factor = torch.ones(6).double() if block.post_norm is None else block.post_norm.affine()[0]
    for name, branch in block.branches.items():
        kernel = branch_kernels(block)[name]
        axes = zip(block.geometry.padding, block.extent, branch.extent, strict=True)
        padding = tuple(p - (big - small) // 2 for p, big, small in axes)
        out = branch.run(x, padding, block.geometry.stride) * factor.view(-1, 1, 1)
        if name != block.main:
            out = out * RATE
        drawn = torch.nn.functional.conv2d(
            x, kernel.weight, kernel.bias, padding=block.geometry.padding
        )
        close(drawn, out)


# -- what is drawn --------------------------------------------------------------------------------
def drawn(root):
    """(name of the map, {tap: value}) of every heat map, from their tooltips."""
    for group in root.iter(f"{SVG}g"):
        if group.get("class") == "kernel":
            name, *taps = (title.text for title in group.iter(f"{SVG}title"))
            pairs = (re.fullmatch(r"\(([\d, ]+)\): (\S+)", tap).groups() for tap in taps)
            yield name, {tuple(map(int, at.split(", "))): float(v) for at, v in pairs}


@pytest.mark.parametrize("family, case", [*FAMILIES, ("dbb", "1-D"), ("acb", "3-D")])
@torch.no_grad()
def test_the_picture_shows_these_numbers(family, case):
    block, _ = build(family, case)
    root = ElementTree.fromstring(kernel_picture(block))
    kernels = branch_kernels(block) | {"merged": block.in_own_form(block.kernel())}
    bias_only = kernels.pop(SHIFT, None)
    pairs, maps = channel_pairs(block), dict(drawn(root))
    slots = block.in_channels // block.geometry.groups
    assert len(maps) == (len(pairs) + 1) * len(kernels)
    for name, kernel in kernels.items():
        wanted = {f"{name}, input {i} → output {o}": kernel.weight[o, i % slots] for o, i in pairs}
        wanted[f"{name}, mean |K| over all channels"] = kernel.weight.abs().mean((0, 1))
        for title, values in wanted.items():
            shown = torch.zeros_like(values)
            for tap, value in maps[title].items():
                shown[tap] = value
            torch.testing.assert_close(shown, values, rtol=1e-3, atol=0)  # 4 digits are written
    words = words_of(root)
    assert set(kernels) <= set(words) and (SHIFT in words) == (bias_only is not None)
    terms = len(kernels) - 1
    biases = 2 * (terms - 1 + (bias_only is not None))
    assert words.count("+") == len(pairs) * (terms - 1) + biases
    assert words.count("=") == len(pairs) + 2
    assert any(f"λ = {RATE}" in word for word in words) == bool(block.side_branches)
    assert "<script" not in ElementTree.tostring(root, "unicode")
    assert_nothing_overlaps(root)


def test_printed_numbers_are_the_values_in_their_unit():
    for largest, unit in ((0.0413, 0.001), (1.1, 0.01), (1.99, 0.01), (2.0, 0.1), (350.0, 10.0)):
        assert ColourScale(DIVERGING, -largest, largest).unit == pytest.approx(unit)
    block, _ = build("repvgg", "plain")
    root = ElementTree.fromstring(kernel_picture(block, [1], [1]))
    (group, *_) = (g for g in root.iter(f"{SVG}g") if g.get("class") == "kernel")
    numbers = [int(t.text.replace("\N{MINUS SIGN}", "-")) for t in group.iter(f"{SVG}text")]
    values = branch_kernels(block)["dense"].weight[1, 1].flatten()
    (unit,) = {
        float(u) for word in words_of(root) for u in re.findall(r"units of (\S+) for K", word)
    }
    assert numbers == [round(value.item() / unit) for value in values]
    assert max(map(abs, numbers)) > 1


def test_colours_are_centred_at_zero_and_written_on_legibly():
    scale = ColourScale.of(DIVERGING, [torch.tensor([0.2, -0.5])], True)
    assert (scale.low, scale.high) == (-0.5, 0.5)
    assert [scale.colour(v) for v in (-0.5, -0.25, 0.0, 0.25, 0.5)] == list(DIVERGING)
    assert scale.colour(0.125) == "#f6cebc"  # half way from f7f7f7 to f4a582
    assert scale.ink(-0.5) == scale.ink(0.5) == "#fff" != scale.ink(0.0)


class Odd(RepBlock):
    main_name = "<script>alert(1)</script>"

    def declare(self, g: Geometry) -> dict[str, Piece]:
        return {self.main_name: Chain(g.conv(), g.norm()), "a & b": g.conv(1)}


def test_names_are_escaped():
    picture = kernel_picture(scrambled(Odd(2, 2).eval()), title="<script>x</script>")
    words = words_of(ElementTree.fromstring(picture))
    assert "<script" not in picture and {Odd.main_name, "a & b", "<script>x</script>"} <= {*words}


# -- which channels -------------------------------------------------------------------------------
def test_pairs_are_those_that_are_connected():
    plain, grouped = BLOCKS["repvgg"](4, 6), BLOCKS["repvgg"](4, 6, groups=2)
    depthwise = BLOCKS["repvgg"](3, 3, groups=3)
    assert channel_pairs(plain) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert channel_pairs(grouped, outputs=[2, 3]) == [(2, 0), (2, 1), (3, 2), (3, 3)]
    assert channel_pairs(grouped, outputs=[2, 3], inputs=[1, 2]) == [(2, 1), (3, 2)]
    assert channel_pairs(depthwise) == [(0, 0), (1, 1)]
    assert channel_pairs(BLOCKS["repvgg"](1, 1)) == [(0, 0)]


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"outputs": [6]}, r"outputs \(=\(6,\)\) must be channels from 0 to 5"),
        ({"inputs": [-1]}, r"inputs \(=\(-1,\)\) must be channels from 0 to 3"),
        ({"outputs": [0], "inputs": [2]}, "no pair in one group: there are 2 groups of 2 inputs"),
        ({"outputs": []}, "no pair"),
    ],
)
def test_channels_that_are_not_there_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        kernel_picture(BLOCKS["repvgg"](4, 6, groups=2), **chosen)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(TypeError, match=r"block \(=Conv2d\) must be a RepBlock"):
        kernel_picture(torch.nn.Conv2d(1, 1, 1))
    block = BLOCKS["repvgg"](2, 2)
    with torch.no_grad():
        block.branches["1x1"][0].weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        kernel_picture(block)


# -- on a page ------------------------------------------------------------------------------------
def evil_page(project):
    label = "<script>x</script>"
    project.table("tiny9", TINY.replace('base: {label: "Base"', f'base: {{label: "{label}"'))
    return Page("tiny9", "tiny")


def test_a_page_shows_the_kernels_as_initialised_where_nothing_is_trained(project):
    page, state = evil_page(project), torch.random.get_rng_state()
    picture, kernels = page.block().data, page.kernels().data
    assert (picture, kernels) == (page.block().data, page.kernels().data)
    assert torch.equal(state, torch.random.get_rng_state())
    assert "RepVGG: " in picture and "in training" in picture and "deployed" in picture
    assert "as initialised: norms are fresh" in kernels and "selected weights" not in kernels
    assert "RepVGG: " in Page("table2", "smoke").block().data, "its first row is a plain network"
    assert "<script" not in picture + kernels and "&lt;script" in kernels


def test_a_page_shows_the_kernels_of_the_weights_that_are_here(project):
    page = evil_page(project)
    planned = page.results.plan.cells[page.results.plan.by_row["official", 0]]
    model = scrambled(new_model(planned.cell))
    page.results.store.save(planned.key, "weights", {"model": model.state_dict()})
    blocks = {n: m.eval() for n, m in model.named_modules() if isinstance(m, RepBlock)}
    most = max(len(block.branches) for block in blocks.values())
    name, block = next((n, b) for n, b in blocks.items() if len(b.branches) == most)
    shown = page.kernels().data
    assert most == 3 and kernel_picture(block) in shown
    assert f"{name} of Official, seed 0, the selected weights." in shown


def test_a_page_of_networks_without_convolution_blocks_says_so(project, monkeypatch):
    page = evil_page(project)
    for network, drawn in (
        (torch.nn.Conv2d(1, 1, 1), NO_BLOCK),
        (torch.nn.Sequential(BLOCKS["rep"](2, 2), RepMLP(4, 2, 2)), "fully connected"),
    ):
        monkeypatch.setattr("replib.report.page.new_model", lambda cell, made=network: made)
        assert drawn in page.block().data
        assert (drawn in page.kernels().data) == (drawn is NO_BLOCK), "RepMLP is no convolution"
