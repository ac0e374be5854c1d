"""replib: train rich multi-branch blocks, deploy one plain convolution."""

from replib import official
from replib.blocks import BLOCKS
from replib.convert import convert, fuse, verify

__all__ = ["BLOCKS", "convert", "fuse", "official", "verify"]
