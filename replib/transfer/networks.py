"""Detectors and segmenters around a body of ours, whose stages are the feature maps.

Names of the body's tensors stay as in the classifier, so that its weights are loaded by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from replib.blocks import RepBlock
from replib.errors import UserError
from replib.foreign import in_one_line
from replib.fusing import deployed_copy
from replib.networks import dilate
from replib.transfer import HEADS

STAGES = ("stage1", "stage2", "stage3", "stage4")
STRIDES = (4, 8, 16, 32)  # of their maps
STEM = "stage0"
BEST = 100  # boxes of an image, as many as COCO's metric looks at
BINS = (1, 2, 3, 6)  # of PSPNet's pyramid
REACH = (96, 192, 288)  # pixels of the image between the taps of DeepLabV3's atrous layers
DROPPED = 0.1  # of the last map's channels, as in torchvision's FCN and PSPNet's code


def network(
    head: str,
    body: nn.Module,
    classes: int,
    *,
    channels: int | None = None,
    anchor: int = 32,
    proposals: int | None = None,
    output_stride: int = 32,
    dilated_blocks: int | None = None,
    auxiliary: float = 0.0,
    frozen_stages: int = 0,
    fixed_norms: bool = False,
) -> Detector | Segmenter:
    """A head of `HEADS` on a body of ours, whose classifier is left out.

    channels: of the pyramid (256) or of the head's inner maps (as its paper has them).
    anchor: the side in pixels of the smallest anchors. proposals: boxes that Faster R-CNN
    looks into (None: 2000 in training, 1000 else), a quarter of which it is trained on.
    output_stride, dilated_blocks: see `dilated`.
    auxiliary: weight of the loss of a second head, on the third stage.
    frozen_stages: the stem and the stages after it, so many in all, are not trained.
    fixed_norms: the body's norms keep the running statistics that they start with.
    Raises: ValueError for a body without the stages `STAGES`, of `STRIDES`.
    """
    known = dict(body.named_children())
    if not {STEM, *STAGES} <= known.keys():
        raise ValueError(f"its children are {', '.join(known)}, not stages: it is no backbone")
    check_strides(body)
    if HEADS[head] == "detection":
        made = Detector(head, body, classes, channels or 256, anchor, proposals)
    else:
        dilated([getattr(body, name) for name in STAGES[2:]], output_stride, dilated_blocks)
        made = Segmenter(head, body, classes, channels, auxiliary, output_stride)
    made.fixed_norms = fixed_norms
    made.frozen = (STEM, *STAGES)[:frozen_stages]
    for name in made.frozen:
        made.body[name].requires_grad_(False)
    return made


def check_strides(body: nn.Module) -> None:
    """Raises: ValueError where the maps of `STAGES` are not of `STRIDES`."""
    side = 2 * STRIDES[-1]
    wanted = [(side // stride, side // stride) for stride in STRIDES]
    twin = copy.deepcopy(body).to("meta").eval()  # by shapes; a block that has run is not dilated
    image = next(twin.parameters()).new_empty(1, parameter_channels(body), side, side)
    try:
        maps = IntermediateLayerGetter(twin, {name: name for name in STAGES})(image)
    except RuntimeError as error:
        raise ValueError(f"it cannot be run ({in_one_line(error)}): it is no backbone") from None
    found = [tuple(one.shape[2:]) for one in maps.values()]
    if found != wanted:
        ours, theirs = (", ".join(f"{h} x {w}" for h, w in sizes) for sizes in (found, wanted))
        raise ValueError(
            f"of an image of {side} x {side} pixels its stages give maps of {ours}, not {theirs}: "
            "it is no backbone, take another body or other strides"
        )


def tapped(body: nn.Module, stages: Sequence[str]) -> tuple[nn.Module, list[int]]:
    """The body as far as the last of these stages, giving {"0": map, ...}; and their channels."""
    getter = IntermediateLayerGetter(body, {name: str(i) for i, name in enumerate(stages)})
    parameter = next(getter.parameters())
    with torch.no_grad():
        maps = getter.eval()(parameter.new_zeros(1, parameter_channels(body), 64, 64))
    getter.train()
    return getter, [one.shape[1] for one in maps.values()]


def parameter_channels(body: nn.Module) -> int:
    """How many channels its images have: a stem need not be a block."""
    return next(m for m in body.modules() if isinstance(m, RepBlock | nn.Conv2d)).in_channels


def dilated(stages: Sequence[nn.Module], output_stride: int, last: int | None = None) -> None:
    """Let the last two stages, of strides 16 and 32, give maps of a smaller stride: their blocks
    are dilated instead, the first unit of a stage as the stage before (Chen et al., 2017).

    last: only so many blocks, the last ones (RepVGG's "fast" backbones); None: all.
    """
    blocks, dilation = [], 1
    for stage, stride in zip(stages, (16, 32), strict=True):
        if stride <= output_stride:
            continue
        before, dilation = dilation, 2 * dilation
        for i, unit in enumerate(stage):
            found = [m for m in unit.modules() if isinstance(m, RepBlock)]
            blocks += [(block, dilation if i else before) for block in found]
    for i, (block, wanted) in enumerate(blocks):
        keep = last is None or i >= len(blocks) - last
        dilate(block, wanted if keep else 1)


class OnBody(nn.Module):
    """A head on a body: what both tasks share."""

    fixed_norms: bool = False
    frozen: Sequence[str] = ()

    @property
    def body(self) -> nn.ModuleDict:
        raise NotImplementedError

    def train(self, mode: bool = True) -> OnBody:
        super().train(mode)
        if mode and self.fixed_norms:
            self.body.eval()
        for name in self.frozen if mode else ():
            self.body[name].eval()
        return self

    def load_body(self, state: Mapping[str, Tensor]) -> None:
        """Take the body's tensors out of those of a classifier. Raises: RuntimeError where one is
        missing or of another shape."""
        names = self.body.state_dict().keys()
        self.body.load_state_dict({name: state[name] for name in names if name in state})

    def fuse_body(self) -> None:
        """Make the body what is deployed of it, to be trained as such.

        Raises: UserError for a body so narrow that a processor cannot train it.
        """
        fused = deployed_copy(self.body.eval())
        for conv in (m for m in fused.modules() if isinstance(m, nn.Conv2d)):
            if max(conv.kernel_size) == 1 < max(conv.stride) and conv.in_channels < 8:
                # See replib.branches.Convolution.run: its backward pass may end the process.
                raise UserError(
                    f"transfer.fused (=true): a strided 1x1 convolution of {conv.in_channels} "
                    "channels cannot be trained on a processor: set width so that it has 8."
                )
        for name, stage in fused.items():
            self.body[name] = stage.requires_grad_(name not in self.frozen)
        self.train(self.training)


class AsIs(GeneralizedRCNNTransform):
    """Images that are resized and standardised already are only put together."""

    def __init__(self):
        super().__init__(1, 1, [0.0], [1.0])

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        return image, target


class Detector(OnBody):
    """Boxes of objects: a list of images (C, H, W) -> losses by name in train mode, given targets;
    else [{"boxes": (n, 4), "labels": (n,) from 1, "scores": (n,)}].

    As torchvision builds them: RetinaNet on stages 2 to 4 with 2 further levels, Faster R-CNN on
    stages 1 to 4 with 1; the sizes of anchors and of the box head follow `anchor` and `channels`.
    """

    def __init__(
        self,
        head: str,
        body: nn.Module,
        classes: int,
        channels: int,
        anchor: int,
        proposals: int | None,
    ):
        super().__init__()
        self.retina = head == "retinanet"
        stages = STAGES[1:] if self.retina else STAGES
        _, widths = tapped(body, stages)
        further = LastLevelP6P7(widths[-1], channels) if self.retina else LastLevelMaxPool()
        taps = {name: str(i) for i, name in enumerate(stages)}
        pyramid = BackboneWithFPN(body, taps, widths, channels, further)
        sides, ratios = [anchor * 2**i for i in range(5)], ((0.5, 1.0, 2.0),) * 5
        if self.retina:
            sizes = tuple(tuple(int(side * 2 ** (i / 3)) for i in range(3)) for side in sides)
            self.model = RetinaNet(
                pyramid,
                classes,
                anchor_generator=AnchorGenerator(sizes, ratios),
                detections_per_img=BEST,
            )
        else:
            pooled = MultiScaleRoIAlign([*taps.values()], 7, 2, canonical_scale=224 * anchor // 32)
            kept = {}
            if proposals is not None:
                names = (f"rpn_{when}_nms_top_n_{mode}" for when in ("pre", "post")
                         for mode in ("train", "test"))  # fmt: skip
                kept = dict.fromkeys(names, proposals)
                kept["box_batch_size_per_image"] = proposals // 4
            self.model = FasterRCNN(
                pyramid,
                rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in sides), ratios),
                box_roi_pool=pooled,
                box_head=TwoMLPHead(49 * channels, 4 * channels),
                box_predictor=FastRCNNPredictor(4 * channels, classes + 1),
                box_detections_per_img=BEST,
                **kept,
            )
        self.model.transform = AsIs()

    @property
    def body(self) -> nn.ModuleDict:
        return self.model.backbone.body

    def features(self, x: Tensor) -> list[Tensor]:
        """The maps that the head is given, of images (N, C, H, W)."""
        return [*self.model.backbone(x).values()]

    def layers(self, images: list[Tensor]) -> None:
        """Run every layer as `forward` does in eval mode, but the last ones of Faster R-CNN on as
        many boxes as they may be given: what is computed then follows from the images' sizes, not
        from what is found in them."""
        maps = self.features(self.model.transform(images)[0].tensors)
        if self.retina:
            self.model.head(maps)
            return
        self.model.rpn.head(maps)
        heads, boxes = self.model.roi_heads, len(images) * self.model.rpn.post_nms_top_n()
        pooled = maps[0].new_zeros(boxes, maps[0].shape[1], *heads.box_roi_pool.output_size)
        heads.box_predictor(heads.box_head(pooled))

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        shift = int(self.retina)  # its classes have no background in front
        if targets is not None:
            targets = [target | {"labels": target["labels"] - shift} for target in targets]
        if not self.retina:
            # It keeps the scales of the first batch that it sees, and a run that goes on begins
            # with another one: found anew for every batch, they are the same.
            self.model.roi_heads.box_roi_pool.scales = None
        out = self.model(images, targets)
        if self.training:
            return out
        return [found | {"labels": found["labels"] + shift} for found in out]


class Segmenter(OnBody):
    """Classes of pixels: (N, C, H, W) -> logits (N, classes, H, W); in train mode a list of these,
    the last of the auxiliary head where there is one."""

    def __init__(
        self,
        head: str,
        body: nn.Module,
        classes: int,
        channels: int | None,
        auxiliary: float,
        output_stride: int,
    ):
        super().__init__()
        getter, (third, last) = tapped(body, STAGES[2:])
        self.taps, self.auxiliary = getter, auxiliary
        if head == "fcn":
            self.classifier = plain_head(last, channels or last // 4, classes)
        elif head == "pspnet":
            inner = channels or last // 4
            pyramid = PyramidPooling(last, inner)
            self.classifier = nn.Sequential(
                pyramid, *plain_head(last + len(BINS) * inner, inner, classes)
            )
        else:
            inner = channels or 256
            # The same pixels of the image at every stride: 12, 24, 36 at 8; 6, 12, 18 at 16.
            rates = [reach // output_stride for reach in REACH]
            self.classifier = nn.Sequential(
                ASPP(last, rates, inner), *plain_head(inner, inner, classes)
            )
        self.beside = plain_head(third, third // 4, classes) if auxiliary else None

    @property
    def body(self) -> nn.ModuleDict:
        return self.taps

    def features(self, x: Tensor) -> list[Tensor]:
        """The logits."""
        return [self(x)]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        maps = self.taps(x)
        out = [self.classifier(maps["1"])]
        if self.training and self.beside is not None:
            out.append(self.beside(maps["0"]))
        size = x.shape[-2:]
        out = [F.interpolate(one, size, mode="bilinear", align_corners=False) for one in out]
        return out if self.training else out[0]


def plain_head(in_channels: int, channels: int, classes: int) -> nn.Sequential:
    """A 3x3 layer and a linear classifier of every pixel."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(DROPPED),
        nn.Conv2d(channels, classes, 1),
    )


class PyramidPooling(nn.Module):
    """A map beside its averages over 1, 4, 9 and 36 parts, each through a 1x1 layer of so many
    channels: (N, I, H, W) -> (N, I + 4 channels, H, W). Source: Zhao et al., CVPR 2017, figure 3.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
            )
            for _ in BINS
        )

    def forward(self, x: Tensor) -> Tensor:
        out, size = [x], x.shape[-2:]
        for bins, layer in zip(BINS, self.layers, strict=True):
            # As products: the gradient of adaptive pooling is not deterministic on a GPU.
            rows, columns = (averages(side, bins).to(x) for side in size)
            pooled = layer(rows @ x @ columns.T)
            out.append(F.interpolate(pooled, size, mode="bilinear", align_corners=False))
        return torch.cat(out, 1)


def averages(side: int, bins: int) -> Tensor:
    """(bins, side): the means over so many parts, those of adaptive average pooling."""
    places = torch.arange(side)
    out = torch.zeros(bins, side)
    for i in range(bins):
        inside = (places >= i * side // bins) & (places < -(-(i + 1) * side // bins))
        out[i, inside] = 1 / inside.sum()
    return out
