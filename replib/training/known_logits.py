"""The logits of a fixed network on every training image, computed once and looked up in training.

A teacher to which nothing random is shown says the same of an image in every epoch. Mirror images
are two inputs to an image; whatever else is drawn makes too many, and the teacher is asked at every
step.

What is looked up is what the teacher would say, bit for bit. The bits of a logit depend on the
size of the batch, by which libraries choose how to sum: on a processor, ResNet-110 says something
else alone than in a batch of 32, RepVGG in up to 3, MobileNetV3 and EfficientNet in up to 11. They
may depend on the place in the batch; in 8 networks, in batches of 20 to 128, none did. So the table
is computed in batches of the recipe's size, as the loop makes them, a smaller last one is asked
anew at every step, and the whole table is computed once more in another order before it is used:
where a bit differs, the teacher is asked at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from replib.training import loader
from replib.training.augmentation import Augmentation
from replib.training.data import Dataset, derive
from replib.training.evaluation import Normalise
from replib.training.step import autocast

MOST_BYTES = 2**29  # of a table
PASSES = 2  # over the training images: the table, and its check


def views(augmentation: Augmentation) -> int:
    """How many inputs an image can become: 1, 2 with mirror images; 0: too many to keep."""
    flip, smoothing = augmentation.flip, augmentation.label_smoothing  # that is of targets only
    alone = augmentation == Augmentation(flip=flip, label_smoothing=smoothing)
    return 1 + flip if alone else 0


def left_over(images: int, batch: int, part: int) -> int:
    """How many of an epoch's images are in batches, or in parts of one, that are not full."""
    return images // batch * (batch % part) + images % batch % part


@torch.no_grad()
def known_logits(
    network: nn.Module,
    data: Dataset,
    train: Tensor,
    augmentation: Augmentation,
    *,
    batch: int,
    epochs: int,
    precision: str = "float32",
    seed: int = 0,
    device: str = "cpu",
    decoders: int | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Tensor | None, int]:
    """((views, N, classes), images that the network was run on) for N training images.

    network: in eval mode on `device`; train: indices (N,) of the images; batch: how many of them a
    step hands it at once; epochs: for which the table is wanted; precision: of
    replib.training.step.PRECISIONS, that of the steps; seed: of the order of the second pass. Row
    [v, i] is of image train[i], mirrored where v is 1.
    None instead of a table where there are too many views or bytes, where it would cost more than
    it saves, and, with a line to `say`, where a bit of it depends on the place in the batch.
    """
    kinds, count, classes = views(augmentation), len(train), len(data.classes)
    full = count - count % batch  # images of an epoch that are in full batches
    worth = kinds and epochs * full > PASSES * kinds * count
    if not worth or 4 * kinds * count * classes > MOST_BYTES:
        return None, 0
    normalise = Normalise(data, device)
    images = data.train_images

    def logits(places: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(view, places, logits) batch by batch; the last batch is filled up from the front."""
        chunks = places[torch.arange(math.ceil(count / batch) * batch) % count].split(batch)
        for view in range(kinds):
            batches = loader.batches(images, [train[c] for c in chunks], device, workers=decoders)
            for chunk, x in zip(chunks, batches, strict=True):
                if augmentation.flip:
                    mirrored = torch.full((batch,), bool(view), device=device)
                    x = augmentation.apply(x, {"flip": mirrored})
                with autocast(device, precision):
                    found = network(normalise(x))
                yield view, chunk.to(device), found.contiguous()

    if isinstance(images, Tensor):
        images = images.to(device)
    table, asked = None, 0
    for view, places, found in logits(torch.arange(count)):
        if table is None:
            table = found.new_empty(kinds, count, found.shape[1])
        table[view, places] = found
        asked += len(places)
    generator = torch.Generator().manual_seed(derive(seed, "known logits"))
    same = torch.ones((), dtype=torch.bool, device=device)
    for view, places, found in logits(torch.randperm(count, generator=generator)):
        bits = found.view(torch.uint8) == table[view, places].view(torch.uint8)
        same &= bits.all()
        asked += len(places)
    if not same:
        say(
            "the teacher's logits are not kept: here their last bits depend on the place in the "
            "batch; it is asked at every step."
        )
        return None, asked
    return table, asked
