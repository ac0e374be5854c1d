"""Augmentation: pixels against Pillow, draws against torchvision and timm, samples one by one.

Pixels are compared with Pillow through torchvision and timm, image by image. Distributions are
compared by chi-square and Kolmogorov-Smirnov tests at fixed seeds; `ALIKE` and `UNLIKE` are the
probabilities between which none may lie, and planted faults must fall below `UNLIKE`.
"""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_augment
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.transforms import autoaugment
from torchvision.transforms import functional as F

from replib.errors import UserError
from replib.training import augmentation, pixels
from replib.training.augmentation import Augmentation
from replib.training.pixels import CODES, MOVES, adjusted, cropped, noise, resized
from replib.training.policies import policy, timm_scale

ALIKE, UNLIKE = 1e-3, 1e-9
PILLOW = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
FILL = (128, 3, 7)
EVERYTHING = Augmentation(
    crop_padding=3, flip=True, policy="raug15", policy_interpolation="random", fill=FILL,
    brightness=0.4, contrast=0.3, saturation=0.4, hue=0.4, lighting=0.1, erasing=0.5, cutout=8,
    mixup=0.4, cutmix=1.0, mix_each=True, label_smoothing=0.1,
)  # fmt: skip
EACH = [  # what the recipes use, one piece at a time
    Augmentation(crop_padding=4, flip=True),
    Augmentation(resized_crop=24, flip=True),
    Augmentation(resized_crop=24, crop_interpolation="bicubic"),
    Augmentation(brightness=0.4, saturation=0.4, hue=0.4, lighting=0.1),
    Augmentation(policy="imagenet"),
    Augmentation(policy="cifar10"),
    Augmentation(policy="svhn"),
    Augmentation(policy="randaugment"),
    Augmentation(policy="v0", policy_interpolation="bicubic"),
    Augmentation(policy="rand-m9-mstd0.5", policy_interpolation="bilinear", fill=FILL),
    Augmentation(policy="rand-m9-mstd0.5-inc1", policy_interpolation="bicubic"),
    EVERYTHING,
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=8, channels=3, height=37, width=29):
    """Smooth colours with noise; the first is flat, the second has few levels."""
    coarse = torch.rand(n, channels, 5, 5, generator=seeded(1))
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 200 + 30
    x = x + 20 * torch.randn(x.shape, generator=seeded(2))
    x[0], x[1] = 77, x[1].clamp(90, 140)
    return x.clamp(0, 255).to(torch.uint8)


def pillow(image):
    return Image.fromarray((image.permute(1, 2, 0) if len(image) == 3 else image[0]).numpy())


def tensor(image):
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1) if array.ndim == 3 else array[None]


def rows(drawn, index):
    return {name: value[index] for name, value in drawn.items()}


def repeated(image, n):
    return image.expand(n, *image.shape[-3:])


# -- pixels --------------------------------------------------------------------------------------
def affine(function):
    def reference(image, value, resample, fill):
        return function(image, value, resample=resample, fillcolor=fill)

    return reference


def plain(function):
    return lambda image, value, resample, fill: function(image, value)


FACTORS = (0.0, 0.1, 0.55, 1.0, 1.45, 1.9, 2.62)
SLOPES = (-0.3, -0.1, 0.07, 0.42)
PIXELS = (-14.0, -3.3, 0.0, 5.5, 9.0)
REFERENCE = {  # name -> (Pillow's, values)
    "AutoContrast": (plain(lambda image, _: F.autocontrast(image)), (0,)),
    "Equalize": (plain(lambda image, _: F.equalize(image)), (0,)),
    "Invert": (plain(lambda image, _: F.invert(image)), (0,)),
    "Posterize": (plain(lambda image, bits: F.posterize(image, int(bits))), (1, 2, 4, 7, 8)),
    "Solarize": (plain(F.solarize), (0, 64, 141.66667, 255, 256, 300)),
    "SolarizeAdd": (plain(lambda x, add: timm_augment.solarize_add(x, int(add))), (0, 33, 154)),
    "Brightness": (plain(F.adjust_brightness), FACTORS),
    "Contrast": (plain(F.adjust_contrast), FACTORS),
    "Color": (plain(F.adjust_saturation), FACTORS),
    "Sharpness": (plain(F.adjust_sharpness), FACTORS),
    "Hue": (plain(F.adjust_hue), (-0.5, -0.4, -0.123, 0, 0.1, 0.37, 0.5)),
    "ShearX": (affine(timm_augment.shear_x), SLOPES),
    "ShearY": (affine(timm_augment.shear_y), SLOPES),
    "TranslateX": (affine(timm_augment.translate_x_abs), PIXELS),
    "TranslateY": (affine(timm_augment.translate_y_abs), PIXELS),
    "Rotate": (affine(timm_augment.rotate), (-42.0, -30.0, -3.3, 0.0, 10.0, 30.0)),
}
CASES = [(name, way) for name in REFERENCE for way in (PILLOW if name in MOVES else ("nearest",))]


@pytest.mark.parametrize("channels", [3, 1], ids=["colour", "grey"])
@pytest.mark.parametrize("name, interpolation", CASES, ids=lambda value: value)
def test_operations_are_pillows(name, interpolation, channels):
    """Equal; filtered pixels may differ by one level, as float32 meets a whole number."""
    reference, values = REFERENCE[name]
    x = pictures(channels=channels)
    x = x.repeat_interleave(len(values), dim=0)  # all values in one batch
    value = torch.tensor(values, dtype=torch.float64).repeat(len(x) // len(values))
    kind = torch.full((len(x),), CODES[name])
    fill = FILL[:channels]
    out = adjusted(x, kind, value, [name], interpolation=interpolation, fill=fill)
    colour = fill if channels == 3 else fill[0]
    expected = [
        tensor(reference(pillow(image), v, PILLOW[interpolation], colour))
        for image, v in zip(x, value.tolist(), strict=True)
    ]
    error = (torch.stack(expected).int() - out.int()).abs()
    if interpolation == "nearest":
        assert error.max() == 0
    else:
        assert error.max() <= 1 and (error > 0).double().mean() < 0.01


def test_no_bit_is_black():
    """timm's v0 asks for 0 bits, which Pillow refuses now and made black before."""
    x = pictures()
    out = adjusted(x, torch.full((8,), CODES["Posterize"]), torch.zeros(8).double(), ["Posterize"])
    assert out.max() == 0


def test_cutout_of_raug15_is_a_square_cut_at_the_border():
    x = pictures(3)
    centre = torch.tensor([[0, 0], [20, 10], [36, 28]])
    value = torch.tensor([8.0, 7.0, 8.0], dtype=torch.float64)
    out = adjusted(x, torch.full((3,), CODES["Cutout"]), value, ["Cutout"], centre=centre)
    expected = x.clone()
    colour = torch.tensor([125, 122, 113], dtype=torch.uint8)[:, None, None]
    expected[0, :, :4, :4] = expected[1, :, 17:23, 7:13] = expected[2, :, 32:, 24:] = colour
    assert torch.equal(out, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [3, 1], ids=["colour", "grey"])
def test_resized_crops_are_pillows(interpolation, channels):
    """Within one level: float32 sums meet halves, which Pillow sums in fixed point.

    Width first, as torchvision's tensors and Pillow before 13, which takes the cheaper order.
    """
    boxes = [(3, 2, 20, 15), (0, 0, 37, 29), (5, 5, 3, 4), (10, 0, 27, 29), (36, 28, 1, 1)]
    x = pictures(5, channels)
    relative = torch.tensor(boxes) / torch.tensor([37, 29, 37, 29])
    mode = PILLOW[interpolation]
    for size in (16, 24, 40):
        out = resized(x, relative, size, interpolation)
        for image, box, ours in zip(x, boxes, out, strict=True):
            top, left, height, width = box
            cut = pillow(image).crop((left, top, left + width, top + height))
            theirs = tensor(cut.resize((size, height), mode).resize((size, size), mode))
            error = (theirs.int() - ours.int()).abs()
            assert error.max() <= 1 and (error > 0).double().mean() < 0.05


def test_crop_and_flip_are_torchvisions():
    x = pictures()
    drawn = Augmentation(crop_padding=4, flip=True).draw(8, seeded(), (37, 29))
    assert 0 < drawn["flip"].sum() < 8
    out = cropped(x, 4, drawn["corner"], drawn["flip"])
    for image, ours, corner, flip in zip(x, out, drawn["corner"], drawn["flip"], strict=True):
        theirs = F.crop(F.pad(image, [4]), *corner.tolist(), 37, 29)
        assert torch.equal(ours, F.hflip(theirs) if flip else theirs)


def test_colour_jitter_is_torchvisions_in_the_same_order():
    x = pictures()
    jitter = Augmentation(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.4)
    drawn = jitter.draw(8, seeded(), (37, 29))
    orders = {tuple(order) for order in drawn["jitter_kind"].tolist()}
    assert len(orders) > 4
    step = {"Brightness": F.adjust_brightness, "Contrast": F.adjust_contrast}
    step |= {"Color": F.adjust_saturation, "Hue": F.adjust_hue}
    step = {CODES[name]: function for name, function in step.items()}
    for i, ours in enumerate(jitter.apply(x, drawn)):
        image = pillow(x[i])
        for kind, value in zip(drawn["jitter_kind"][i], drawn["jitter_value"][i], strict=True):
            image = step[kind.item()](image, value.item())
        assert torch.equal(ours, tensor(image))


def test_lighting_adds_along_the_components():
    x = torch.full((4000, 3, 1, 1), 128, dtype=torch.uint8)
    light = Augmentation(lighting=0.1)
    added = light.apply(x, light.draw(4000, seeded(), 1))[:, :, 0, 0].double() - 128
    vectors = torch.tensor(augmentation.EIGENVECTORS).double()
    spread = vectors * torch.tensor(augmentation.EIGENVALUES).double() * 0.1 * 255
    # Rounding to levels adds 1/12; n = 4000 knows a covariance of 10 to within 5 %.
    expected = spread @ spread.T + torch.eye(3) / 12
    torch.testing.assert_close(torch.cov(added.T), expected, rtol=0.08, atol=0.05)
    assert added.mean(0).abs().max() < 0.2
    ends = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 1, 1)
    drawn = {"light": torch.tensor([[-5, 0, 5]] * 2, dtype=torch.int16)}
    assert light.apply(ends, drawn).flatten(1).tolist() == [[0, 0, 5], [250, 255, 255]]


# -- after normalisation -------------------------------------------------------------------------
def test_mixing_is_timms():
    """A batch with one share and box, against timm's arithmetic for the same numbers."""
    x = torch.randn(6, 3, 20, 16, generator=seeded())
    labels = torch.tensor([0, 3, 1, 2, 2, 4])
    augment = Augmentation(mixup=0.4, cutmix=1.0, label_smoothing=0.1)
    mixer = Mixup(0.4, 1.0, label_smoothing=0.1, num_classes=5)
    seen = set()
    for seed in range(8):
        drawn = augment.draw(6, seeded(seed), (20, 16))
        share, (top, bottom, left, right) = drawn["share"][0].item(), drawn["patch"][0].tolist()
        cut = bottom > top
        seen.add(cut)
        theirs = x.clone()
        if cut:
            theirs[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
            area = (bottom - top) * (right - left)
            assert share == pytest.approx(1 - area / 320)
        else:
            mixer._params_per_batch = lambda share=share: (share, False)
            theirs, soft = mixer(theirs, labels)
        ours, targets = augment.mixed(x, labels, 5, drawn)
        torch.testing.assert_close(ours, theirs)
        if not cut:
            torch.testing.assert_close(targets, soft)
        one_hot = torch.nn.functional.one_hot(labels, 5) * 0.9 + 0.02
        torch.testing.assert_close(targets, one_hot * share + one_hot.flip(0) * (1 - share))
    assert seen == {True, False}


def test_every_sample_mixes_with_its_own_share():
    x, labels = torch.randn(6, 3, 8, 8, generator=seeded()), torch.arange(6)
    augment = Augmentation(mixup=1.0, mix_each=True)
    drawn = augment.draw(6, seeded(), 8)
    ours, targets = augment.mixed(x, labels, 6, drawn)
    for i, share in enumerate(drawn["share"]):
        torch.testing.assert_close(ours[i], share * x[i] + (1 - share) * x[5 - i])
        torch.testing.assert_close(targets[i, i], share)
    assert len(set(drawn["share"].tolist())) == 6


def test_smoothed_targets_are_torchs():
    logits, labels = torch.randn(6, 5, generator=seeded()), torch.tensor([0, 3, 1, 2, 2, 4])
    _, targets = Augmentation(label_smoothing=0.1).mixed(logits[:, :, None, None], labels, 5, {})
    loss = torch.nn.functional.cross_entropy
    torch.testing.assert_close(loss(logits, targets), loss(logits, labels, label_smoothing=0.1))


def test_cutout_is_zero_after_normalisation():
    x = torch.randn(2000, 1, 9, 11, generator=seeded()) + 5
    augment = Augmentation(cutout=5)
    drawn = augment.draw(2000, seeded(), (9, 11), in_channels=1)
    out, _ = augment.mixed(x, torch.zeros(2000, dtype=torch.long), 2, drawn)
    assert torch.equal(out[out != 0], x[out != 0])
    expected = torch.zeros(9, 11)  # every centre is equally likely; 5 counts as 4
    for row in range(9):
        for column in range(11):
            expected[max(row - 2, 0) : row + 2, max(column - 2, 0) : column + 2] += 1 / 99
    rate = (out == 0).double().mean((0, 1))
    assert (rate - expected).abs().max() < 0.045  # 4 standard deviations of 2000 draws


def test_erased_boxes_hold_normal_noise_and_are_timms():
    n, side = 3000, 16
    augment = Augmentation(erasing=0.5)
    drawn = augment.draw(n, seeded(), side)
    x = torch.full((n, 3, side, side), 9.0)
    out, labels = augment.mixed(x, torch.arange(n), n, drawn)
    assert torch.equal(labels, torch.arange(n))
    ours = boxes_of(out != 9)
    random.seed(0)
    erasing = RandomErasing(0.5, mode="pixel", device="cpu")
    theirs = boxes_of(torch.stack([erasing(image.clone()) for image in x]) != 9)
    assert similar(ours[:, 2] > 0, theirs[:, 2] > 0) > ALIKE
    ours, theirs = (boxes[boxes[:, 2] > 0] for boxes in (ours, theirs))
    for column in range(4):
        assert similar(ours[:, column], theirs[:, column]) > ALIKE
    assert similar(ours[:, 2] * 100 + ours[:, 3], theirs[:, 2] * 100 + theirs[:, 3]) > ALIKE
    assert stats.kstest(out[out != 9].numpy(), "norm").pvalue > ALIKE
    many = augment.draw(20000, seeded(), side)["erase"]
    assert stats.binomtest(int((many[:, 1] > many[:, 0]).sum()), 20000).pvalue > ALIKE
    top, bottom, left, right = augment.draw(n, seeded(), 4)["erase"].unbind(1)
    assert (bottom - top).max() == (right - left).max() == 3  # never a whole side


def boxes_of(changed):
    """(n, 4): top, left, height, width of what changed; zeros where nothing did."""
    rows_, columns = changed.any(1).any(2).int(), changed.any(1).any(1).int()
    return torch.stack([rows_.argmax(1), columns.argmax(1), rows_.sum(1), columns.sum(1)], dim=1)


def test_noise_is_white_and_of_the_sample_alone():
    x = noise(torch.tensor([1, 2, 1 << 30]), (3, 64, 64))
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > ALIKE
    flat = x.flatten(1)
    neighbours = torch.stack([flat[:, :-1].flatten(), flat[:, 1:].flatten()])
    samples = torch.stack([flat[0], flat[1]])
    for pairs in (neighbours, samples, neighbours**2, samples**2):
        assert torch.corrcoef(pairs)[0, 1].abs() < 4 / pairs.shape[1] ** 0.5
    assert torch.equal(noise(torch.tensor([2]), (3, 64, 64))[0], x[1])


# -- distributions -------------------------------------------------------------------------------
def similar(ours, theirs):
    """Chi-square: how likely two samples of one distribution of things differ as much."""
    counts = [Counter(torch.as_tensor(sample).tolist()) for sample in (ours, theirs)]
    return similar_counts(*counts)


def similar_counts(ours, theirs, least=10):
    """The same of counted things; rare ones are counted as one."""
    names = sorted(ours | theirs)
    often = [name for name in names if ours[name] + theirs[name] >= least]
    table = [[count[name] for name in often] for count in (ours, theirs)]
    rest = [
        sum(count.values()) - sum(row) for count, row in zip((ours, theirs), table, strict=True)
    ]
    if sum(rest):
        table = [[*row, other] for row, other in zip(table, rest, strict=True)]
    if len(table[0]) == 1:
        return 1.0
    return stats.chi2_contingency(table).pvalue


def test_flip_and_crop_are_torchvisions_and_a_shifted_range_is_noticed():
    n = 6000
    drawn = Augmentation(crop_padding=4, flip=True).draw(n, seeded(), 32)
    assert stats.binomtest(int(drawn["flip"].sum()), n).pvalue > ALIKE
    torch.manual_seed(0)
    crop = transforms.RandomCrop(32, padding=4)
    theirs = [crop.get_params(torch.empty(3, 40, 40), (32, 32))[:2] for _ in range(n)]
    theirs = Counter(theirs)
    ours = drawn["corner"]
    assert similar_counts(Counter(map(tuple, ours.tolist())), theirs) > ALIKE
    for fault in (ours.clamp(max=7), ours + 1, ours[:, :1].expand(-1, 2)):
        assert similar_counts(Counter(map(tuple, fault.tolist())), theirs) < UNLIKE


def test_mean_and_variance_of_every_pixel_are_torchvisions():
    n = 3000
    image = pictures(3, height=8, width=8)[2]
    augment = Augmentation(crop_padding=2, flip=True)
    ours = augment.apply(repeated(image, n), augment.draw(n, seeded(), 8)).double()
    torch.manual_seed(0)
    both = transforms.Compose([transforms.RandomCrop(8, 2), transforms.RandomHorizontalFlip()])
    theirs = torch.stack([both(image) for _ in range(n)]).double()

    def worst(a, b):  # standard scores of the means, then of the squares
        return max(
            ((p.mean(0) - q.mean(0)) / ((p.var(0) + q.var(0)) / n).sqrt()).abs().max()
            for p, q in ((a, b), (a**2, b**2))
        )

    assert worst(ours, theirs) < 4.5  # of 2 x 192 normal numbers
    late = augment.draw(n, seeded(), 8)
    late["corner"] = late["corner"].clamp(max=3)  # the range off by one
    assert worst(augment.apply(repeated(image, n), late).double(), theirs) > 8


@pytest.mark.parametrize("size", [(64, 64), (48, 90), (300, 40)], ids=str)
def test_boxes_are_torchvisions(size):
    n = 2500 if size == (64, 64) else 800
    height, width = size
    augment = Augmentation(resized_crop=32)
    box = augment.draw(n, seeded(), size)["box"].double()
    ours = box * torch.tensor([height, width, height, width])
    assert (ours - ours.round()).abs().max() < 1e-3  # whole pixels
    torch.manual_seed(0)
    image, crop = torch.empty(3, height, width), transforms.RandomResizedCrop(32)
    theirs = torch.tensor([crop.get_params(image, crop.scale, crop.ratio) for _ in range(n)])
    ours = ours.round().long()

    def least(boxes):
        more = (boxes[:, 2] * boxes[:, 3], boxes[:, 3] * 10000 // boxes[:, 2])
        return min(
            stats.ks_2samp(a, b).pvalue
            for a, b in zip(
                (*boxes.T, *more),
                (*theirs.T, theirs[:, 2] * theirs[:, 3], theirs[:, 3] * 10000 // theirs[:, 2]),
                strict=True,
            )
        )

    assert least(ours) > ALIKE
    assert (ours[:, 0] + ours[:, 2]).max() <= height and (ours[:, 1] + ours[:, 3]).max() <= width
    if size == (64, 64):
        faults = ({"crop_area": (0.2, 1.0)}, {"crop_ratio": (0.9, 4 / 3)})
        for fault in faults:
            box = Augmentation(resized_crop=32, **fault).draw(n, seeded(), size)["box"] * 64
            assert least(box.round().long()) < UNLIKE


def test_boxes_reach_every_place():
    quarter = Augmentation(resized_crop=4, crop_area=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    box = (quarter.draw(3000, seeded(), 4)["box"] * 4).long()
    assert box[:, 2:].eq(2).all() and len(counts(box[:, 0] * 3 + box[:, 1])) == 9
    assert stats.chisquare(counts(box[:, 0] * 3 + box[:, 1])).pvalue > ALIKE


def test_boxes_follow_the_shape_of_every_file():
    sizes = torch.tensor([[64, 64], [300, 40]]).repeat(3000, 1)
    box = Augmentation(resized_crop=32).draw(6000, seeded(), sizes)["box"]
    for i, size in enumerate([(64, 64), (300, 40)]):
        alone = Augmentation(resized_crop=32).draw(3000, seeded(9), size)["box"]
        for column in range(4):
            assert stats.ks_2samp(box[i::2, column], alone[:, column]).pvalue > ALIKE


TORCHVISION_POLICIES = {
    **{
        name: autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(name))
        for name in ("imagenet", "cifar10", "svhn")
    },
    "randaugment": autoaugment.RandAugment(),
    "randaugment-n3-m20": autoaugment.RandAugment(3, 20),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("svhn", "randaugment-n3-m20")))
        for name in TORCHVISION_POLICIES
    ],
)
def test_policies_are_torchvisions(name, monkeypatch):
    """What is applied to an image, as one thing: operations in order, with their values."""
    n = 1500
    applied = []

    def record(image, operation, magnitude, **_):
        value = 1 + magnitude if operation in FACTOR else magnitude
        value = -int(value) if operation.startswith("Translate") else value
        if operation not in ("Identity", "AutoContrast", "Equalize", "Invert"):
            operation = f"{operation} {value:.4f}"
        applied.append(operation)
        return image

    monkeypatch.setattr(autoaugment, "_apply_op", record)
    torch.manual_seed(0)
    image, theirs = torch.zeros(3, 60, 40, dtype=torch.uint8), Counter()
    for _ in range(n):
        applied.clear()
        TORCHVISION_POLICIES[name](image)
        theirs[tuple(a for a in applied if a != "Identity")] += 1
    drawn = Augmentation(policy=name).draw(4 * n, seeded(), (60, 40))
    assert similar_counts(spoken(drawn), theirs) > ALIKE
    wrong = Augmentation(policy="svhn" if name == "cifar10" else "cifar10")
    assert similar_counts(spoken(wrong.draw(4 * n, seeded(), (60, 40))), theirs) < UNLIKE
    if name in ("cifar10", "randaugment"):  # translations go by the side
        transposed = Augmentation(policy=name).draw(4 * n, seeded(), (40, 60))
        assert similar_counts(spoken(transposed), theirs) < UNLIKE


FACTOR = ("Brightness", "Color", "Contrast", "Sharpness")
WITHOUT_VALUE = ("AutoContrast", "Equalize", "Invert")


def spoken(drawn):
    """Counts of what is applied, in the words of the test above."""
    names = list(CODES)
    return Counter(
        tuple(
            names[k] if names[k] in WITHOUT_VALUE else f"{names[k]} {v:.4f}"
            for k, v in zip(kind, value, strict=True)
            if names[k] != "Identity"
        )
        for kind, value in zip(
            drawn["policy_kind"].tolist(), (drawn["policy_value"] + 0.0).tolist(), strict=True
        )
    )


def recorded(transform, n):
    """What timm's transform applies to 40 x 60 images, n times: tuples of (operation, values)."""
    operations = getattr(transform, "ops", None) or [o for row in transform.policy for o in row]
    applied, result = [], []
    for operation in operations:
        name = operation.name.removesuffix("Increasing").removesuffix("Rel")
        side = {"TranslateX": 60, "TranslateY": 40}.get(name, 1)

        def record(image, *values, name=name, side=side, **_):
            applied.append((name, *(value * side + 0.0 for value in values)))  # no -0
            return image

        operation.aug_fn = record
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (timm's)
    for _ in range(n):
        applied.clear()
        transform(None)
        result.append(tuple(applied))
    return result


def test_v0_is_timms():
    n = 2500
    theirs = Counter(
        tuple(f"{a[0]} {a[1]:.4f}" if len(a) > 1 else a[0] for a in image)
        for image in recorded(timm_augment.auto_augment_transform("v0", {}), n)
    )
    drawn = Augmentation(policy="v0").draw(5 * n, seeded(), (40, 60))
    assert similar_counts(spoken(drawn), theirs) > ALIKE
    later = {**drawn, "policy_kind": drawn["policy_kind"].flip(1)}
    assert similar_counts(spoken(later), theirs) < UNLIKE


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5", "rand-m9-mstd0.5-inc1", "rand-m9-n3-mstd3-p0.8"]
)
def test_random_policies_are_timms(text):
    n = 6000
    theirs = recorded(timm_augment.rand_augment_transform(text, {}), n)
    drawn = Augmentation(policy=text).draw(n, seeded(), (40, 60))
    names = list(CODES)
    ours = [
        tuple((names[k], v) for k, v in zip(kind, value, strict=True) if names[k] != "Identity")
        for kind, value in zip(
            drawn["policy_kind"].tolist(), drawn["policy_value"].tolist(), strict=True
        )
    ]
    assert similar_counts(*(Counter(len(image) for image in x) for x in (ours, theirs))) > ALIKE
    assert similar_counts(*(Counter(a[0] for i in x for a in i) for x in (ours, theirs))) > ALIKE
    for name in policy(text).names:
        values = [[a[1] for i in x for a in i if a[0] == name and a[1:]] for x in (ours, theirs)]
        if name not in WITHOUT_VALUE:
            assert stats.ks_2samp(*values).pvalue > ALIKE, name
            wider = np.array(values[0]) * 1.3
            assert stats.ks_2samp(wider, values[1]).pvalue < 1e-6, name


@pytest.mark.parametrize("increasing", [False, True])
def test_the_scale_is_timms(increasing, monkeypatch):
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: value)
    names = (
        timm_augment._RAND_INCREASING_TRANSFORMS if increasing else timm_augment._RAND_TRANSFORMS
    )
    level = torch.linspace(0, 10, 201, dtype=torch.float64)
    for name in names:
        known = name.removesuffix("Increasing").removesuffix("Rel")
        ours = timm_scale(known, level, torch.ones(201), (60, 60), increasing=increasing)
        scale = timm_augment.LEVEL_TO_ARG[name]
        assert (ours is None) == (scale is None)
        if scale is not None:
            side = 60 if known.startswith("Translate") else 1
            theirs = [scale(x, {})[0] * side for x in level.tolist()]
            theirs = torch.tensor(theirs, dtype=torch.float64)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_raug15_draws_every_operation_at_every_level():
    """By the scale of its code: 0 to 14 of a nominal 10, both signs, no cut."""
    n = 48000
    drawn = Augmentation(policy="raug15").draw(n, seeded(), 224)
    kind, value = drawn["policy_kind"], drawn["policy_value"]
    assert stats.chisquare(counts(kind)).pvalue > ALIKE and len(counts(kind)) == 16
    pairs = kind[:, 0] * 100 + kind[:, 1]
    assert stats.chisquare(counts(pairs)).pvalue > ALIKE and len(counts(pairs)) == 256
    scale = {
        "Rotate": [3 * level for level in range(15)],
        "ShearX": [0.03 * level for level in range(15)],
        "TranslateY": [0.045 * level * 224 for level in range(15)],
        "Color": [0.18 * level + 0.1 for level in range(15)],
        "Posterize": [int(level / 10 * 4) for level in range(15)],
        "Solarize": [int(level / 10 * 256) for level in range(15)],
        "SolarizeAdd": [int(level / 10 * 110) for level in range(15)],
        "Cutout": [int(max(2, level * 4)) for level in range(15)],
    }
    for name, expected in scale.items():
        seen = value[kind == CODES[name]]
        signed = name in ("Rotate", "ShearX", "TranslateY")
        wanted = Counter(f"{v:.4f}" for v in expected)
        found = Counter(f"{v:.4f}" for v in (seen.abs() if signed else seen).tolist())
        assert found.keys() == wanted.keys()
        total = sum(found.values())
        test = stats.chisquare(
            [found[v] for v in wanted], [c * total / 15 for c in wanted.values()]
        )
        assert test.pvalue > ALIKE, name
        if signed:
            moved = seen[seen != 0]
            assert stats.binomtest(int((moved > 0).sum()), len(moved)).pvalue > ALIKE
    place = drawn["policy_centre"]
    assert place.min() == 0 and place.max() == 223


def counts(values):
    return values.flatten().unique(return_counts=True)[1].numpy()


def test_random_interpolation_is_each_half_the_time():
    drawn = Augmentation(policy="raug15", policy_interpolation="random").draw(5000, seeded(), 32)
    cubic = drawn["policy_cubic"]
    assert stats.binomtest(int(cubic.sum()), cubic.numel()).pvalue > ALIKE


def test_jitter_is_torchvisions():
    n = 6000
    augment = Augmentation(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    drawn = augment.draw(n, seeded(), 8)
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.4, 1.5, 0.2, 0.1)
    names = ("brightness", "contrast", "saturation", "hue")
    theirs = [jitter.get_params(*(getattr(jitter, name) for name in names)) for _ in range(n)]
    codes = [CODES[augmentation.JITTER[name]] for name in names]
    orders = Counter(tuple(codes[i] for i in order.tolist()) for order, *_ in theirs)
    ours = Counter(map(tuple, drawn["jitter_kind"].tolist()))
    assert similar_counts(ours, orders) > ALIKE and len(ours) == 24
    for place, code in enumerate(codes):
        values = drawn["jitter_value"][drawn["jitter_kind"] == code]
        assert stats.ks_2samp(values, [t[1 + place] for t in theirs]).pvalue > ALIKE


def test_shares_and_patches_are_timms():
    n = 4000
    drawn = Augmentation(mixup=0.8, cutmix=1.0).draw(n, seeded(), (40, 60))
    np.random.seed(0)  # noqa: NPY002 (timm's)
    mixer = Mixup(0.8, 1.0)
    theirs, flags, patches = [], [], []
    for _ in range(n):
        share, cut = mixer._params_per_batch()
        if cut:
            patch, share = cutmix_bbox_and_lam((3, 40, 60), share)
            patches.append([int(edge) for edge in patch])
        theirs.append(share)
        flags.append(cut)
    share, patch = drawn["share"], drawn["patch"]
    cut = (patch[:, 1] > patch[:, 0]) | (patch[:, 3] > patch[:, 2])
    assert similar(cut, torch.tensor(flags)) > ALIKE
    flags = torch.tensor(flags)
    theirs = torch.tensor(theirs)
    assert stats.ks_2samp(share[~cut], theirs[~flags]).pvalue > ALIKE
    assert stats.ks_2samp(share[cut], theirs[flags]).pvalue > ALIKE
    assert stats.ks_2samp(share[~cut], theirs[flags]).pvalue < UNLIKE
    for column in range(4):
        edges = [box[column] for box in patches]
        assert stats.ks_2samp(patch[cut, column], edges).pvalue > ALIKE
    within = (patch[:, 0] > 0) & (patch[:, 1] < 40) & cut
    assert set(((patch[:, 1] - patch[:, 0])[within] % 2).tolist()) == {0, 1}  # odd sides too
    only = Augmentation(mixup=0.2).draw(n, seeded(), 8)
    assert torch.equal(only["patch"][:, ::2], only["patch"][:, 1::2])  # empty
    assert stats.kstest(only["share"], "beta", (0.2, 0.2)).pvalue > ALIKE


# -- per sample, per seed, per device ------------------------------------------------------------
@pytest.mark.parametrize("augment", EACH, ids=lambda a: a.policy or str(a.crop_padding))
def test_a_batch_is_its_samples(augment, monkeypatch):
    """One by one, and with whole batches and selection as on a GPU: the same pixels."""
    n = 24
    x = repeated(pictures(3, height=32, width=32)[2], n).contiguous()
    drawn = augment.draw(n, seeded(), 32)
    together = augment.apply(x, drawn)
    assert len({image.numpy().tobytes() for image in together}) > n / 3  # different draws
    for i in range(n):
        alone = augment.apply(x[i : i + 1], rows(drawn, slice(i, i + 1)))
        assert torch.equal(alone[0], together[i])
    monkeypatch.setattr(pixels.torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(augment.apply(x, drawn), together)
    monkeypatch.undo()
    z, labels = torch.randn(n, 3, *together.shape[2:], generator=seeded()), torch.arange(n)
    out, targets = augment.mixed(z, labels, n, drawn)
    monkeypatch.setattr(pixels.torch.compiler, "is_compiling", lambda: True)
    again, same = augment.mixed(z, labels, n, drawn)
    assert torch.equal(out, again) and torch.equal(targets, same)
    for i in range(n // 2):  # with its partner of the reversed batch
        both = torch.tensor([i, n - 1 - i])
        part, _ = augment.mixed(z[both], labels[both], n, rows(drawn, both))
        assert torch.equal(part, out[both])


@pytest.mark.parametrize("augment", EACH, ids=lambda a: a.policy or str(a.crop_padding))
def test_a_seed_fixes_everything_drawn(augment):
    one, two, other = (augment.draw(50, seeded(seed), 32) for seed in (3, 3, 4))
    assert one.keys() == two.keys() == other.keys() and one
    for name, value in one.items():
        assert len(value) == 50 and value.device.type == "cpu"
        assert torch.equal(value, two[name])
        if value.numel() and name not in ("erase", "cutout", "patch"):
            assert not torch.equal(value, other[name]), name


@pytest.mark.parametrize("augment", [*EACH[:5], EVERYTHING], ids=lambda a: a.policy or None)
def test_nothing_depends_on_values(augment):
    """On meta tensors, which have none: what would wait for a GPU fails here."""
    drawn = {name: value.to("meta") for name, value in augment.draw(4, seeded(), 32).items()}
    x = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    out = augment.apply(x, drawn)
    side = augment.resized_crop or 32
    assert out.shape == (4, 3, side, side) and out.dtype == torch.uint8 and out.is_meta
    labels = torch.empty(4, dtype=torch.long, device="meta")
    mixed, targets = augment.mixed(out.to(torch.bfloat16), labels, 10, drawn)
    assert mixed.shape == out.shape and mixed.dtype == torch.bfloat16 and targets.is_meta


def test_neutral_is_the_identity():
    neutral = Augmentation()
    drawn = neutral.draw(8, seeded(), (37, 29))
    x, labels = pictures(), torch.arange(8)
    assert drawn == {} and neutral.apply(x, drawn) is x
    assert neutral.mixed(x, labels, 10, drawn) == (x, labels)
    for name, neutral_row in (("policy", "Identity"), ("jitter", "Identity")):
        kind = torch.full((8, 2), CODES[neutral_row])
        off = {f"{name}_kind": kind, f"{name}_value": torch.ones(8, 2).double()}
        augment = (
            Augmentation(policy="v0") if name == "policy" else Augmentation(hue=0.1, contrast=1)
        )
        assert torch.equal(augment.apply(x, off), x)


def test_a_box_taken_out_is_left_to_the_loader():
    augment = Augmentation(resized_crop=24, flip=True)
    drawn = augment.draw(8, seeded(), torch.full((8, 2), 500))
    drawn.pop("box")
    x = pictures(height=24, width=24)
    flipped = torch.where(drawn["flip"][:, None, None, None], x.flip(3), x)
    assert torch.equal(augment.apply(x, drawn), flipped)


def test_grey_images_and_layouts():
    """One channel; and channels last in memory gives the same pixels."""
    grey = Augmentation(crop_padding=1, flip=True, policy="randaugment", brightness=0.1, hue=0.1)
    x = pictures(channels=1, height=8, width=8)
    assert grey.apply(x, grey.draw(8, seeded(), 8, in_channels=1)).shape == x.shape
    x = pictures(height=32, width=32)
    drawn = EVERYTHING.draw(8, seeded(), 32)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(EVERYTHING.apply(last, drawn), EVERYTHING.apply(x, drawn))


@pytest.mark.slow
@pytest.mark.parametrize(
    "augment, backend",
    [(EACH[0], "inductor"), (EACH[1], "aot_eager"), (EACH[7], "aot_eager")],
    ids=["crop", "resize", "policy"],
)
def test_one_graph(augment, backend):
    """Without a break: torch.compile(fullgraph=True) gives the pixels of eager mode."""
    augment = replace(augment, cutout=8)
    x, drawn = pictures(height=32, width=32), augment.draw(8, seeded(), 32)

    def whole(x, labels, drawn):
        x = augment.apply(x, drawn)
        return x, *augment.mixed(x.float() / 255 - 0.5, labels, 10, drawn)

    labels = torch.arange(8)
    for ours, eager in zip(
        torch.compile(whole, fullgraph=True, backend=backend)(x, labels, drawn),
        whole(x, labels, drawn),
        strict=True,
    ):
        torch.testing.assert_close(
            ours, eager, rtol=0, atol=1 if ours.dtype == torch.uint8 else 5e-3
        )


# -- errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields, words",
    [
        ({"crop_padding": -1}, "crop_padding (=-1) must be a whole number, at least 0."),
        ({"crop_padding": 1.5}, "crop_padding (=1.5) must be a whole number."),
        ({"cutout": True}, "cutout (=True) must be a whole number."),
        ({"hue": 0.6}, "hue (=0.6) must be turns, from 0 to 0.5."),
        ({"erasing": 1.1}, "erasing (=1.1) must be a probability, from 0 to 1."),
        ({"mixup": float("inf")}, "mixup (=inf) must be a finite number, at least 0."),
        ({"mixup": float("nan")}, "mixup (=nan) must be a finite number, at least 0."),
        ({"crop_area": (0.5, 0.1)}, "crop_area (=(0.5, 0.1)) must be (least, most)"),
        ({"crop_area": (0.5, 1.1)}, "above 0 and at most 1."),
        ({"crop_ratio": (1.0,)}, "crop_ratio (=(1.0,)) must be two numbers"),
        ({"crop_interpolation": "nearest"}, "must be one of bilinear, bicubic."),
        ({"policy_interpolation": "cubic"}, "policy_interpolation (='cubic') must be one of"),
        ({"fill": (0, 0)}, "fill (=(0, 0)) must be 1 or 3 levels"),
        ({"fill": (256,)}, "fill (=(256,)) must be 1 or 3 levels"),
        ({"crop_padding": 4, "resized_crop": 224}, "exclude each other"),
        ({"policy": "v1"}, "policy (='v1') must be imagenet"),
        ({"policy": "rand-m9-mmax20"}, "with m, n, p, mstd, inc."),
        ({"policy": "rand-p2"}, "policy (='rand-p2') must be"),
        ({"policy": "randaugment-m31"}, "m up to 30"),
    ],
)  # fmt: skip
def test_wrong_fields(fields, words):
    with pytest.raises(UserError) as error:
        Augmentation(**fields)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, size, channels, words",
    [
        ({"policy": "v0"}, 8, 4, "need 1 or 3 channels, not 4"),
        ({"hue": 0.1}, 8, 2, "need 1 or 3 channels, not 2"),
        ({"lighting": 0.1}, 8, 1, "lighting (=0.1) needs 3 channels, not 1"),
        ({"policy": "v0", "fill": FILL}, 8, 1, "has 3 levels for images with 1 channels"),
        ({"flip": True}, torch.tensor([[8, 8]] * 3), 3, "only with resized_crop"),
    ],
)
def test_wrong_images(fields, size, channels, words):
    with pytest.raises(UserError) as error:
        Augmentation(**fields).draw(3, seeded(), size, in_channels=channels)
    assert words in str(error.value)
