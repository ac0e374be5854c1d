"""The families of blocks by name."""

from replib.blocks.block import RepBlock
from replib.blocks.convbn import ConvBN
from replib.blocks.repvgg import RepVGG

BLOCKS: dict[str, type[RepBlock]] = {"repvgg": RepVGG, "convbn": ConvBN}
