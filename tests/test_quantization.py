"""Networks in 8 bits: against plain loops, against integers of ONNX Runtime, in training."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from reference import scramble
from torch import nn

from replib import fuse, quantization
from replib.blocks import BLOCKS
from replib.errors import UserError
from replib.models import build
from replib.networks import outermost_blocks
from replib.quantization import converted, layer_ranges, quantize, trainable

torch.set_num_threads(1)
