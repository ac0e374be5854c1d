"""Image operations with one parameter per sample, in Pillow's arithmetic.

The official recipes augment Pillow images, so Pillow's rounding is the rule here: what it computes
in integers or by tables is equal, what it interpolates agrees within one grey level.

Images are uint8 (N, C, H, W), C 1 or 3. Nothing here draws, loops over samples, or waits for the
device. A step of a policy holds another operation for every sample; most of them are a table of 256
grey levels, so a step is at most five passes over the batch, whatever the number of operations.
On the CPU, where a count of rows costs nothing, a pass takes only the samples that need it; on a
GPU that would wait for the device, so there a pass takes the whole batch and selects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

TONES = (  # a grey level becomes another: a table per sample and channel
    "AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness",
    "Contrast",
)  # fmt: skip
BLENDS = ("Color", "Sharpness")  # towards, or away from, a grey or a blurred image
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
KINDS = ("Identity", *TONES, *BLENDS, *MOVES, "Hue", "Cutout")
CODES = {name: code for code, name in enumerate(KINDS)}
CUTOUT_COLOUR = (125, 122, 113)  # of raug15's Cutout


def colour(values: tuple[int, ...], like: Tensor) -> Tensor:
    """(1, C or 1, 1, 1), in the dtype and on the device of `like`; filled there, not copied."""
    return torch.cat([like.new_full((1, 1, 1, 1), value) for value in values], dim=1)


def on_rows(
    chosen: Tensor, function: Callable[..., Tensor], images: Tensor, *rows: Tensor
) -> Tensor:
    """`function(images, *rows)` for the chosen samples, the others as they are."""
    if images.is_cpu and not torch.compiler.is_compiling():
        index = chosen.nonzero().squeeze(1)
        if len(index) == len(images):
            return function(images, *rows)
        if len(index):
            done = function(images[index], *(row[index] for row in rows))
            images = images.clone()
            images[index] = done
        return images
    return torch.where(chosen.view(-1, 1, 1, 1), function(images, *rows), images)


def inside(box: Tensor, height: int, width: int) -> Tensor:
    """(N, 1, H, W): whether a pixel is in the sample's box (N, 4): top, bottom, left, right."""
    y = torch.arange(height, device=box.device)
    x = torch.arange(width, device=box.device)
    top, bottom, left, right = box[:, :, None].unbind(1)
    return (
        (((top <= y) & (y < bottom))[:, None, :, None])
        & (((left <= x) & (x < right))[:, None, None, :])
    )


# -- crops ---------------------------------------------------------------------------------------
def cropped(images: Tensor, padding: int, corner: Tensor | None, flip: Tensor | None) -> Tensor:
    """A crop of the size of the image, after padding with black, then a mirror image.

    corner: (N, 2), top and left within the padded image; flip: (N,) bool.
    """
    n, channels, height, width = images.shape
    y = torch.arange(height, device=images.device).expand(n, -1)
    x = torch.arange(width, device=images.device).expand(n, -1)
    if flip is not None:
        x = torch.where(flip[:, None], width - 1 - x, x)
    if corner is not None:
        images = torch.nn.functional.pad(images, (padding,) * 4)
        y, x = y + corner[:, :1], x + corner[:, 1:]
    index = (y[:, :, None] * images.shape[3] + x[:, None, :]).view(n, 1, -1)
    chosen = images.flatten(2).gather(2, index.expand(-1, channels, -1))
    return chosen.view(n, channels, height, width)


def resized(images: Tensor, box: Tensor, size: int, interpolation: str) -> Tensor:
    """Crop every image to its box and resize to (size, size), smoothed where it shrinks.

    box: (N, 4), top, left, height, width as fractions of the image. Both axes are products with a
    matrix of weights per sample, width first, rounded in between as Pillow does (13 and later do
    the cheaper axis first, which may change a pixel by some levels).
    """
    n, channels, height, width = images.shape
    box = box.double()
    top, rows = (box[:, 0] * height).round(), (box[:, 2] * height).round()
    left, columns = (box[:, 1] * width).round(), (box[:, 3] * width).round()
    across = resizing(left, columns, width, size, interpolation)  # (N, size, W)
    down = resizing(top, rows, height, size, interpolation)
    x = images.flatten(1, 2).float() @ across.transpose(1, 2)  # (N, C * H, size)
    x = (x + 0.5).floor_().clamp_(0, 255)
    x = x.view(n, channels, height, size).transpose(1, 2).flatten(2)  # (N, H, C * size)
    x = (down @ x + 0.5).floor_().clamp_(0, 255).to(torch.uint8)
    return x.view(n, size, channels, size).permute(0, 2, 1, 3)


def resizing(start: Tensor, length: Tensor, extent: int, size: int, interpolation: str) -> Tensor:
    """Weights (N, size, extent) that resize `length` pixels from `start` to `size` pixels.

    Pillow's: a triangle, or the cubic with a = -1/2, as wide as a pixel of the coarser grid.
    """
    scale = (length / size)[:, None, None]
    wide = scale.clamp(min=1)
    reach = wide * (2 if interpolation == "bicubic" else 1)
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = torch.arange(extent, device=start.device) - start[:, None, None]
    used = (x >= (centre - reach + 0.5).trunc().clamp(min=0)) & (
        x < torch.minimum((centre + reach + 0.5).trunc(), length[:, None, None])
    )
    d = ((x - centre + 0.5) / wide).abs()
    if interpolation == "bicubic":
        weight = torch.where(
            d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
        ) * (d < 2)
    else:
        weight = (1 - d).clamp(min=0)
    weight = weight * used
    return (weight / weight.sum(2, keepdim=True)).float()


# -- one step of a policy ------------------------------------------------------------------------
def adjusted(
    images: Tensor,
    kind: Tensor,
    value: Tensor,
    names: Iterable[str],
    *,
    interpolation: str = "nearest",
    fill: tuple[int, ...] = (0,),
    cubic: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """One operation per sample.

    kind: (N,), of `CODES`; value: (N,) float64, what the operation takes: a factor, a number of
    bits, a threshold, degrees (counter-clockwise), pixels, a slope, a shift of hue in turns.
    names: the operations that can occur; fill: colour of what moves in, one or C levels.
    cubic: (N,) bool, with interpolation "random"; centre: (N, 2) of the squares of "Cutout".
    """
    names = set(names)
    spare = torch.zeros_like(kind)
    cubic = spare.bool() if cubic is None else cubic
    centre = spare[:, None].expand(-1, 2) if centre is None else centre

    def move(images: Tensor, kind: Tensor, value: Tensor, cubic: Tensor) -> Tensor:
        return moved(images, matrices(images, kind, value), interpolation, fill, cubic)

    steps = (
        (TONES, lambda *row: toned(*row, names), (kind, value)),
        (BLENDS, lambda *row: blended(*row, names), (kind, value)),
        (MOVES, move, (kind, value, cubic)),
        (("Hue",), hued, (value,)),
        (("Cutout",), covered, (value, centre)),
    )
    for group, function, rows in steps:
        codes = [CODES[name] for name in group if name in names]
        if codes:  # codes of a group are neighbours
            chosen = (kind >= min(codes)) & (kind <= max(codes))
            images = on_rows(chosen, function, images, *rows)
    return images


def grey(images: Tensor) -> Tensor:
    """(N, 1, H, W) int32: ITU-R 601 luma, rounded."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def blend(base: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    """base + factor (image - base), cut to whole levels; all float32."""
    return (base + factor * (image - base)).clamp(0, 255)


def toned(images: Tensor, kind: Tensor, value: Tensor, names: set[str]) -> Tensor:
    """The operations of `TONES`: a table (N, C, 256) per sample, then one look-up."""
    n, channels, height, width = images.shape
    pixels = images.flatten(2).long()
    level = torch.arange(256, device=images.device).expand(n, channels, 256)
    kind, value = kind.view(-1, 1, 1), value.view(-1, 1, 1)
    darkest, brightest = images.flatten(2).aminmax(dim=2, keepdim=True)
    darkest, brightest = darkest.long(), brightest.long()

    def auto_contrast() -> Tensor:
        most = torch.full_like(darkest, 255).double()  # 255 / x would be 255 times 1 / x
        scale = most / (brightest - darkest).clamp(min=1)
        stretched = (level * scale + -darkest * scale).long().clamp(0, 255)
        return torch.where(brightest > darkest, stretched, level)

    def equalize() -> Tensor:
        one = torch.ones((), dtype=torch.long, device=images.device)
        counts = torch.zeros_like(level).scatter_add_(2, pixels, one.expand_as(pixels))
        step = (height * width - counts.gather(2, brightest)) // 255
        below = counts.cumsum(2) - counts
        flat = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
        return torch.where(step > 0, flat, level)

    def posterize() -> Tensor:
        lost = (8 - value.long()).clamp(0, 8)
        return (level >> lost) << lost

    def contrast() -> Tensor:
        area = height * width
        mean = (2 * grey(images).long().sum((1, 2, 3)) + area) // (2 * area)  # rounded
        return blend(mean.view(-1, 1, 1).float(), level.float(), value.float()).long()

    tables = {
        "AutoContrast": auto_contrast,
        "Equalize": equalize,
        "Invert": lambda: 255 - level,
        "Posterize": posterize,
        "Solarize": lambda: torch.where(level >= value, 255 - level, level),
        "SolarizeAdd": lambda: torch.where(
            level < 128, (level + value.long()).clamp(max=255), level
        ),
        "Brightness": lambda: blend(
            value.new_zeros(()).float(), level.float(), value.float()
        ).long(),
        "Contrast": contrast,
    }
    table = level
    for name in TONES:
        if name in names:
            table = torch.where(kind == CODES[name], tables[name](), table)
    return table.to(torch.uint8).gather(2, pixels).view(images.shape)


def blended(images: Tensor, kind: Tensor, value: Tensor, names: set[str]) -> Tensor:
    """Color: a blend with the grey image. Sharpness: with a blurred one, except at the border."""
    x, base = images.float(), None
    if "Sharpness" in names:
        base = x.clone()
        total = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
        total = total[..., :-2, :] + total[..., 1:-1, :] + total[..., 2:, :]
        total = total + 4 * x[..., 1:-1, 1:-1]  # of 13: the centre counts five times
        base[..., 1:-1, 1:-1] = ((2 * total + 13) / 26).floor()  # rounded; never a tie
    if "Color" in names:
        level = grey(images).float()
        colours = (kind == CODES["Color"]).view(-1, 1, 1, 1)
        base = level if base is None else torch.where(colours, level, base)
    return blend(base, x, value.float().view(-1, 1, 1, 1)).to(torch.uint8)


def hued(images: Tensor, value: Tensor) -> Tensor:
    """Turn the hue, which Pillow keeps in 256 steps; grey images have none."""
    if images.shape[1] == 1:
        return images
    shift = (value.double() * 255).long().view(-1, 1, 1)  # towards zero
    red, green, blue = images.float().unbind(1)
    least, most = images.aminmax(dim=1)
    bright, spread = most.float(), (most - least).float()
    some = spread.clamp(min=1)
    r, g, b = ((bright - channel) / some for channel in (red, green, blue))
    first = b - g
    r, g, b = r.double(), g.double(), b.double()  # single and double precision as in Pillow
    rest = torch.where(green == bright, 2 + r - b, 4 + g - r).float()
    hue = torch.where(red == bright, first, rest)
    hue = torch.fmod(hue.double() / 6 + 1, 1).float()
    hue = (hue.double() * 255).long() * (spread > 0)
    saturation = ((spread / bright.clamp(min=1)).double() * 255).long()

    sixths = ((hue + shift) % 256) * 6
    sector = sixths // 255
    part = (sixths.double() / 255 - sector).float()
    strong = (saturation.double() / 255).float()
    most, bright = most.long(), bright.double()

    def level(amount: Tensor) -> Tensor:
        return (bright * (1 - amount.double()) + 0.5).floor().long()

    low, falling, rising = level(strong), level(strong * part), level(strong * (1 - part))
    sector = sector % 6
    order = (  # red, green, blue in each sixth of the circle
        (most, falling, low, low, rising, most),
        (rising, most, most, falling, low, low),
        (low, low, rising, most, most, falling),
    )
    channels = []
    for choices in order:
        channel = choices[0]
        for number in range(1, 6):
            channel = torch.where(sector == number, choices[number], channel)
        channels.append(torch.where(saturation == 0, most, channel))
    return torch.stack(channels, dim=1).to(torch.uint8)


def covered(images: Tensor, value: Tensor, centre: Tensor) -> Tensor:
    """A square of `CUTOUT_COLOUR` with sides of 2 (value // 2) pixels, cut at the border."""
    height, width = images.shape[2:]
    box = square(centre, value.long()[:, None])
    shade = CUTOUT_COLOUR if images.shape[1] == 3 else CUTOUT_COLOUR[:1]
    return torch.where(inside(box, height, width), colour(shade, images), images)


def square(centre: Tensor, side: Tensor | int) -> Tensor:
    """Boxes (N, 4): top, bottom, left, right of a square around (N, 2) row, column."""
    y, x = centre.split(1, dim=1)
    return torch.cat([y - side // 2, y + side // 2, x - side // 2, x + side // 2], dim=1)


# -- geometry ------------------------------------------------------------------------------------
def matrices(images: Tensor, kind: Tensor, value: Tensor) -> Tensor:
    """(N, 6) float64: a, b, c, d, e, f; pixel (x, y) comes from (a x + b y + c, d x + e y + f).

    Coordinates are those of pixel centres, 1/2 for the first. A rotation is about the middle.
    """
    height, width = images.shape[2:]
    angle = -(value % 360) * (math.pi / 180)
    turns = kind == CODES["Rotate"]
    cos = torch.where(turns, angle.cos(), 1.0)
    sin = torch.where(turns, angle.sin(), 0.0)
    x, y = width / 2, height / 2

    def only(name: str) -> Tensor:
        return torch.where(kind == CODES[name], value, 0.0)

    return torch.stack(
        [
            cos,
            sin + only("ShearX"),
            x - cos * x - sin * y + only("TranslateX"),
            only("ShearY") - sin,
            cos,
            y + sin * x - cos * y + only("TranslateY"),
        ],
        dim=1,
    )


def moved(
    images: Tensor, matrix: Tensor, interpolation: str, fill: tuple[int, ...], cubic: Tensor
) -> Tensor:
    """An affine map per sample: matrix as from `matrices`; what comes from outside is `fill`.

    The nearest pixel is found in 16.16 fixed point. Filters take the border's pixels again where
    they reach over it; the cubic has a = -1 (unlike grid_sample's, -3/4, and Pillow's own
    resizing, -1/2).
    """
    channels, height, width = images.shape[1:]
    flat = images.flatten(2)
    y = torch.arange(height, device=images.device).view(1, -1, 1)
    x = torch.arange(width, device=images.device).view(1, 1, -1)
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)

    def pixels(row: Tensor, column: Tensor) -> Tensor:
        """(N, C, H, W) of the nearest that exist to row and column (N, H, W), int64."""
        index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        return flat.gather(2, index.flatten(1)[:, None].expand(-1, channels, -1)).view(images.shape)

    if interpolation == "nearest":

        def fixed(number: Tensor) -> Tensor:
            return (number * 65536 + 0.5).floor().long()

        column = (fixed(a) * x + fixed(b) * y + fixed(c + a * 0.5 + b * 0.5)) >> 16
        row = (fixed(d) * x + fixed(e) * y + fixed(f + d * 0.5 + e * 0.5)) >> 16
        known = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        return torch.where(known[:, None], pixels(row, column), colour(fill, images))

    column = a * (x + 0.5) + b * (y + 0.5) + c
    row = d * (x + 0.5) + e * (y + 0.5) + f
    known = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = column - 0.5, row - 0.5
    left, above = column.floor(), row.floor()
    dx, dy = (column - left).float()[:, None], (row - above).float()[:, None]
    left, above = left.long(), above.long()

    def linear(one: Tensor, two: Tensor, d: Tensor) -> Tensor:
        return one + (two - one) * d

    def curve(zero: Tensor, one: Tensor, two: Tensor, three: Tensor, d: Tensor) -> Tensor:
        p2, p3, p4 = two - zero, 2 * (zero - one) + two - three, one - zero - two + three
        full = one + d * (p2 + d * (p3 + d * p4))
        if interpolation == "bicubic":
            return full
        return torch.where(cubic.view(-1, 1, 1, 1), full, linear(one, two, d))

    if interpolation == "bilinear":
        lines = [linear(*(pixels(above + i, left + j).float() for j in (0, 1)), dx) for i in (0, 1)]
        out = linear(*lines, dy)
    else:
        lines = [
            curve(*(pixels(above + i, left + j).float() for j in range(-1, 3)), dx)
            for i in range(-1, 3)
        ]
        out = curve(*lines, dy)
    out = out.clamp(0, 255).to(torch.uint8)
    return torch.where(known[:, None], out, colour(fill, images))


# -- after normalisation -------------------------------------------------------------------------
def noise(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers (N, *shape), a function of each sample's seed (N,) and the place.

    Hashed, not drawn, so that the numbers are the same on every device and in every batch; numbers
    for every pixel of an epoch would not fit in memory. All products stay below 2^63.
    """

    def mix(x: Tensor) -> Tensor:
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    place = mix(torch.arange(1, math.prod(shape) + 1, device=seed.device))
    x = mix((place + mix(seed)[:, None]) & 0xFFFFFFFF) >> 8
    uniform = (2 * x + 1 - (1 << 24)).float() / (1 << 24)  # exact, within (-1, 1)
    return (uniform.erfinv() * math.sqrt(2)).view(-1, *shape)
