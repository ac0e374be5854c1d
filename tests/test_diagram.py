"""A block is drawn from its declaration: every leaf is there, and nothing overlaps."""

import itertools
from xml.etree import ElementTree

import pytest
import torch
from test_blocks import scrambled

from replib.blocks import BLOCKS
from replib.blocks.repmlp import RepMLP
from replib.branches import Chain, Convolution, Piece, Sum
from replib.report.diagram import before_after, diagram

SVG = "{http://www.w3.org/2000/svg}"


def block_of(name, **options):
    size = {"replk": 13}.get(name, BLOCKS[name].default_kernel_size)
    return scrambled(BLOCKS[name](8, 8, size, **options).eval())


def words_of(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def boxes_of(root):
    """(left, top, right, bottom) of every box, rounding allowed for."""
    for rect in root.iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        yield x + 0.1, y + 0.1, x + width - 0.1, y + height - 0.1


def assert_nothing_overlaps(root):
    """No two boxes, and all of them and all words inside the picture."""
    _, _, width, height = map(float, root.get("viewBox").split())
    boxes = list(boxes_of(root))
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert all(a[0] >= 0 and a[1] >= 0 and a[2] <= width and a[3] <= height for a in boxes)
    for element in root.iter(f"{SVG}text"):
        x, y, size = (float(element.get(key)) for key in ("x", "y", "font-size"))
        half = 0.25 * size * len(element.text)  # a narrow letter is half as wide as it is high
        centre = x + {"start": half, "middle": 0, "end": -half}[element.get("text-anchor")]
        assert half <= centre <= width - half and 0 < y < height, element.text


def test_overlaps_would_be_found():
    for rects in (
        '<rect x="5" y="5" width="9" height="9"/>' * 2,
        '<rect x="15" y="0" width="9" height="9"/>',
    ):
        root = ElementTree.fromstring(f'<svg xmlns="{SVG[1:-1]}" viewBox="0 0 20 20">{rects}</svg>')
        with pytest.raises(AssertionError):
            assert_nothing_overlaps(root)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_leaf_and_every_branch_is_drawn_once(name):
    block = block_of(name)
    root = ElementTree.fromstring(diagram(block))
    sums = [m for m in block.modules() if isinstance(m, Sum)]
    leaves = [m for m in block.modules() if isinstance(m, Piece) and not isinstance(m, Chain | Sum)]
    assert len(list(boxes_of(root))) == len(leaves)
    assert len(root.findall(f".//{SVG}circle")) == sum(len(m.branches) > 1 for m in sums)
    words = words_of(root)
    for part in sums:
        assert all(branch in words for branch in part.branches)
    squeezed = any(m.squeezed for m in sums)
    assert words.count("squeezed into one kernel,") == squeezed, "once, for all that is inside"
    assert_nothing_overlaps(root)


@pytest.mark.parametrize("name", BLOCKS)
def test_before_and_after_stand_side_by_side(name):
    block = block_of(name)
    block.set_rate(0.3)
    before, root = (ElementTree.fromstring(draw(block)) for draw in (diagram, before_after))
    words, size = words_of(root), "×".join(map(str, block.geometry.kernel_size))
    assert len(list(boxes_of(root))) == len(list(boxes_of(before))) + 1
    assert words.count(f"{size} conv, bias") == words.count("merge") == 1
    for module in (block, block.deploy()):
        count = sum(parameter.numel() for parameter in module.parameters())
        assert f"{count:,} parameters".replace(",", "\u202f") in words
    assert words.count("× λ") == len(block.side_branches)
    assert words.count("λ = 0.3") == bool(block.side_branches)
    assert_nothing_overlaps(root)


def test_the_geometry_is_said():
    options = {"stride": (2, 1), "dilation": 2, "groups": 4, "padding_mode": "reflect"}
    block = BLOCKS["dbb"](8, 16, (3, 5), **options)
    root = ElementTree.fromstring(before_after(block))
    words = words_of(root)
    assert words[0] == "DBB: 8 → 16 channels, stride 2×1" or words[-1].endswith("stride 2×1")
    after = words[words.index("3×5 conv, bias") :][:7]
    expected = ["8 → 16", "4 groups", "stride 2×1", "padding 2×4", "dilation 2", "reflect"]
    assert after[1:] == expected
    # In the branches: all convolutions have the groups, those with several taps the dilation.
    convolutions = [m for m in block.modules() if isinstance(m, Convolution)]
    assert words.count("4 groups") == len(convolutions) + 1
    spread = sum(max(m.weight.shape[2:]) > 1 for m in convolutions)
    assert words.count("dilation 2") == spread + 2, "and the average, and the deployed one"


def test_depthwise_widened_and_biased_convolutions_are_said():
    words = words_of(ElementTree.fromstring(diagram(BLOCKS["dyrep"](8, 16, groups=8))))
    assert "depthwise" in words and "8 → 16" in words and "bias" in words


def test_a_block_in_a_block_is_framed_and_named():
    block = BLOCKS["dyrep"](4, 4)
    inner = BLOCKS["acb"](4, 4, 1, padding=0)
    block.branches["1x1"] = Chain(inner, *list(block.branches["1x1"])[1:])
    words = words_of(root := ElementTree.fromstring(before_after(block)))
    assert words.count("ACB") == 1 and {"square", "axis0", "axis1"} <= set(words)
    assert words.count("× λ") == len(block.side_branches) + len(inner.side_branches)
    assert_nothing_overlaps(root)


def test_repmlp_becomes_one_dense_map():
    block = scrambled(RepMLP(8, 3, 4, sets=2).eval())
    root = ElementTree.fromstring(before_after(block))
    words = words_of(root)
    assert words.count("fully connected") == words.count("× gate") == 2
    assert words.count("3×3 conv") == words.count("1×1 conv") == 1, "before, not after"
    assert words.count("bias") == 1, "after"
    assert_nothing_overlaps(root)


def test_names_are_escaped():
    for draw in (diagram, before_after):
        assert "<script>" not in draw(BLOCKS["repvgg"](4, 4), title="<script>x</script>")


def test_pictures_are_the_same_every_time_and_leave_the_generator_alone():
    block = block_of("dbb")
    before = torch.random.get_rng_state()
    assert before_after(block) == before_after(block)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_is_no_block_is_refused():
    with pytest.raises(TypeError, match=r"block \(=Conv2d\) must be a RepBlock or a RepMLP"):
        before_after(torch.nn.Conv2d(1, 1, 1))
