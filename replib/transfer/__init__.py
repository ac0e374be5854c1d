"""Networks of classification as backbones: detection and segmentation.

What finds objects around a backbone is torchvision's; here are the backbone of blocks in it, COCO's
and Cityscapes' files as data of the one training loop, what is minimised, and how it is scored.
"""

from __future__ import annotations

VERSION = 2  # raise when the numbers of these tasks change
HEADS = {  # what stands on the backbone -> the task
    "retinanet": "detection",  # Lin et al., ICCV 2017, on a feature pyramid
    "faster_rcnn": "detection",  # Ren et al., NIPS 2015, on a feature pyramid
    "fcn": "segmentation",  # Long et al., CVPR 2015, as torchvision's: two layers
    "pspnet": "segmentation",  # Zhao et al., CVPR 2017
    "deeplabv3": "segmentation",  # Chen et al., 2017
}
METRICS = {"detection": "mAP", "segmentation": "mIoU"}  # of COCO; of Cityscapes
POOLING = ("pspnet", "deeplabv3")  # heads with a norm over one value an image
