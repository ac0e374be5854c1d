"""A block is drawn from its declaration: every leaf is there, and the SVG is well-formed."""

from xml.etree import ElementTree

import pytest

from replib.blocks import BLOCKS
from replib.branches import Chain, Piece, Sum
from replib.report.diagram import diagram

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", BLOCKS)
def test_every_leaf_and_every_branch_is_drawn_once(name):
    size = {"replk": 13}.get(name, BLOCKS[name].default_kernel_size)
    block = BLOCKS[name](8, 8, size)
    root = ElementTree.fromstring(diagram(block))
    sums = [m for m in block.modules() if isinstance(m, Sum)]
    leaves = [m for m in block.modules() if isinstance(m, Piece) and not isinstance(m, Chain | Sum)]
    assert len(root.findall(f".//{SVG}rect")) == len(leaves)
    assert len(root.findall(f".//{SVG}circle")) == len(sums)
    words = [element.text for element in root.iter(f"{SVG}text")]
    for part in sums:
        assert all(branch in words for branch in part.branches)


def test_names_are_escaped():
    assert "<script>" not in diagram(BLOCKS["repvgg"](4, 4), title="<script>x</script>")
