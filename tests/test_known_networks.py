"""convert, fuse and verify on networks that people use: torchvision's, detectors and segmentation
included, and timm's re-parameterized ones; inputs are not square, norms are scrambled."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models as vision
from torchvision.models import detection, segmentation
from whole import scrambled

from replib import convert, fuse, verify

pytestmark = pytest.mark.slow
X = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))


def proved(model, fused, x):
    """The proof holds, every block was reached, and a wrong tap of one layer breaks it."""
    proof = verify(model, fused, x)
    assert proof.ok, str(proof)
    wrong = copy.deepcopy(fused)
    layers = dict(wrong.named_modules())
    places = [check.name for check in proof.blocks]
    place = places[len(places) // 2]
    conv = next(m for m in layers[place].modules() if isinstance(m, nn.Conv2d))
    conv.weight.data[:, 0, 0, 0] += conv.weight.data.abs().max() * 0.01
    caught = verify(model, wrong, x)
    assert not caught.ok and [check.name for check in caught.blocks if not check.ok] == [place]
    return proof


@pytest.mark.parametrize(
    "name, block, blocks",
    [
        ("resnet18", "dbb", 17),
        ("resnet50", "acb", 17),
        ("resnext50_32x4d", "dbb", 17),
        ("vgg16_bn", "repvgg", 13),
        ("mobilenet_v3_large", "dbb", 16),
    ],
)
def test_torchvision_classifiers(name, block, blocks):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "vgg16_bn" else {}
    model = scrambled(getattr(vision, name)(num_classes=5, **options))
    converted = convert(model, block)
    assert sum(entry["became"] == block for entry in converted.conversion) == blocks
    assert verify(model, converted, X).network.ok, "the conversion keeps the function"
    converted = scrambled(converted)
    fused = fuse(converted)
    assert len(proved(converted, fused, X).blocks) >= blocks
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_detector(dtype):
    """Boxes and scores, of images that are not square and not of one size."""
    torch.manual_seed(0)
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5
    )
    model = scrambled(convert(scrambled(model).to(dtype), "repvgg"))
    fused = fuse(model)
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.rand(3, *size, generator=generator).to(dtype) for size in ((120, 200), (90, 160))
    ]
    proof = proved(model, fused, (images,))
    assert "200 detections" in str(proof)
    if dtype == torch.float64:  # no near ties: the very same boxes and scores, in order
        with torch.no_grad():
            for got, wanted in zip(fused(images), model(images), strict=True):
                assert (got["boxes"] - wanted["boxes"]).abs().max() < 1e-8
                assert (got["scores"] - wanted["scores"]).abs().max() < 1e-10
                assert torch.equal(got["labels"], wanted["labels"])


def test_a_detector_whose_boxes_move_is_caught():
    """The blocks are all right, what comes after them is not."""
    torch.manual_seed(0)
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5
    )
    model = convert(scrambled(model), "repvgg", "backbone.body.1[0-9]*")
    fused = fuse(model)
    images = [torch.rand(3, 120, 200, generator=torch.Generator().manual_seed(0))]
    assert verify(model, fused, (images,)).ok
    fused.roi_heads.box_predictor.bbox_pred.bias.data += 0.1
    proof = verify(model, fused, (images,))
    assert not proof.ok and all(check.ok for check in proof.blocks)


def test_segmentation():
    """A dictionary of maps; dilated convolutions."""
    torch.manual_seed(0)
    model = segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, aux_loss=True
    )
    model = scrambled(convert(scrambled(model), "repvgg"))
    proved(model, fuse(model), X)


@pytest.mark.parametrize(
    "name, blocks",
    [
        ("repvgg_a0", 22),
        ("mobileone_s1", 43),
        ("fastvit_t8", 30),
        ("repvit_m1", 84),
        ("repghostnet_050", 48),
        ("efficientvit_m0", 113),
    ],
)
@pytest.mark.filterwarnings("ignore:.*places add parallel:UserWarning")
def test_timm(name, blocks):
    """Their blocks, by their own methods, through our fuse."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = scrambled(timm.create_model(name, num_classes=5))
    x = torch.randn(1, 3, 224, 224) if name == "efficientvit_m0" else X
    fused = fuse(model)
    proof = proved(model, fused, x)
    assert len(proof.blocks) == blocks
    before, after = (
        sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (model, fused)
    )
    assert after == 0 < before
    theirs = timm.utils.model.reparameterize_model(model)
    with torch.no_grad():
        assert verify(model, theirs.eval(), x).network.ok  # what timm itself makes
