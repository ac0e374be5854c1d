"""replib: train rich multi-branch blocks, deploy one plain convolution."""

from replib import official
from replib.blocks import BLOCKS
from replib.convert import fuse

__all__ = ["BLOCKS", "fuse", "official"]
