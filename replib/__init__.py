"""replib: train rich multi-branch blocks, deploy one plain convolution."""

from replib import official
from replib.blocks import BLOCKS
from replib.convert import convert
from replib.export import export
from replib.fusing import fuse
from replib.verification import verify

__all__ = ["BLOCKS", "convert", "export", "fuse", "official", "verify"]
