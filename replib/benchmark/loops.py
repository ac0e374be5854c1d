"""Epochs of our loop and of the usual one, in turn; accuracy by precision."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib.benchmark.agreement import Unequal, agreement, difference
from replib.benchmark.setting import Setting
from replib.benchmark.subjects import body
from replib.benchmark.timing import quiet, quotients, spread, synchronise
from replib.methods.cycle import decay_groups
from replib.networks import branch_by_branch
from replib.training.augmentation import Augmentation
from replib.training.data import Dataset, derive
from replib.training.loop import Recipe, Task, fit


def random_data(count: int, size: int, tests: int) -> Dataset:
    """Random images and labels: an epoch costs the same whatever is in them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (count + tests, 3, size, size), generator=generator, dtype=torch.uint8)
    y = torch.randint(10, (count + tests,), generator=generator)
    statistics = (0.5, 0.5, 0.5), (0.29, 0.29, 0.29)
    names = tuple(map(str, range(10)))
    return Dataset(
        "random", x[:count], y[:count], x[count:], y[count:], names, *statistics, "random"
    )


class Files(torch.utils.data.Dataset):
    """The images as torchvision's data sets give them: one PIL image and label at a time."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable):
        self.pixels, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Usual:
    """How one trains without this library: DataLoader, torchvision's transforms, eager steps."""

    def __init__(self, model: nn.Module, data: Dataset, recipe: Recipe, device: str, order=None):
        from torchvision import transforms

        self.model, self.device = model.to(device), device
        padding, flip = recipe.augmentation.crop_padding, recipe.augmentation.flip
        side = data.train_images.shape[-1]
        last = [transforms.ToTensor(), transforms.Normalize(data.mean, data.deviation)]
        first = [transforms.RandomCrop(side, padding)] if padding else []
        first += [transforms.RandomHorizontalFlip()] if flip else []
        options = {
            "batch_size": recipe.batch_size,
            "num_workers": 0 if order else 2,
            "persistent_workers": not order,
            "pin_memory": device.startswith("cuda"),
        }
        files = Files(data.train_images, data.train_labels, transforms.Compose(first + last))
        chosen = {"sampler": order} if order else {"shuffle": True}
        self.train = torch.utils.data.DataLoader(files, **chosen, **options)
        files = Files(data.test_images, data.test_labels, transforms.Compose(last))
        self.test = torch.utils.data.DataLoader(files, **options)
        groups = decay_groups(model, recipe.weight_decay)
        self.optimizer = torch.optim.SGD(groups, recipe.learning_rate, momentum=recipe.momentum)

    def __call__(self) -> float:
        """One epoch, and the accuracy on the test images."""
        dtype = next(self.model.parameters()).dtype
        self.model.train()
        for x, y in self.train:
            x = x.to(self.device, dtype, non_blocking=True)
            y = y.to(self.device, non_blocking=True)
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.model.eval()
        right = 0
        with torch.no_grad():
            for x, y in self.test:
                logits = self.model(x.to(self.device, dtype, non_blocking=True))
                right += (logits.argmax(1).cpu() == y).sum().item()
        return right / len(self.test.dataset)


def recipe_of(batch: int, epochs: int, augmentation: Augmentation, precision: str) -> Recipe:
    return Recipe(
        phases=1,
        epochs=epochs,
        batch_size=batch,
        learning_rate=0.01,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        clip_norm=None,
        clip="all",
        augmentation=augmentation,
        next_start="last",
        select="test",
        reseed_each_phase=False,
        precision=precision,
    )


def task_of(model: nn.Module, data: Dataset, recipe: Recipe, device: str, mode: str, said) -> Task:
    """Our own training of a model on all images."""
    return Task(
        model,
        data,
        train=torch.arange(len(data.train_labels)),
        validation=torch.arange(0),
        recipe=recipe,
        groups=lambda: decay_groups(model, recipe.weight_decay),
        loss=lambda logits, targets, inputs: F.cross_entropy(logits, targets),
        seed=0,
        device=device,
        compile=mode,
        say=said.append,
    )


def same_training(size: int) -> dict:
    """Whether both loops train alike: an epoch of 4 batches without augmentation.

    Of a network of 4 blocks: in a deep one, float32's own errors grow with every step. The
    distance between the weights, relative to how far they moved.
    """
    data, recipe = random_data(64, size, 16), recipe_of(16, 1, Augmentation(), "float32")
    start = body("digits", "repvgg")
    ours, theirs = copy.deepcopy(start), branch_by_branch(copy.deepcopy(start))
    generator = torch.Generator().manual_seed(derive(0, "order", 0, 0))
    order = torch.randperm(64, generator=generator).tolist()
    fit(task_of(ours, data, recipe, "cpu", "none", []))
    Usual(theirs, data, recipe, "cpu", order)()
    trained = zip(start.parameters(), ours.parameters(), theirs.parameters(), strict=True)
    moved = [(b - a, c - b) for a, b, c in trained]
    error = math.hypot(*(d.norm().item() for _, d in moved))
    error /= math.hypot(*(m.norm().item() for m, _ in moved))
    result = agreement({"weights": error}, {"weights": 1e-4}, torch.finfo(torch.float32).eps)
    return {"way": "our loop and DataLoader, 4 steps"} | result


def epochs(
    setting: Setting, make: Callable[[], nn.Module], ways: Sequence[tuple[str, str]]
) -> dict:
    """An epoch, with its evaluation, of our loop and of the usual one, in turn.

    ways: (precision, mode of compiling) of our loop.
    """
    tier = setting.tier
    out: dict = {"ways": [], "ratios": [], "left_out": {}, "numbers": {}}
    out["agreement"] = [same_training(tier.image)]
    if not out["agreement"][0]["equal"]:
        raise Unequal(difference(out["agreement"][0]))
    data = random_data(tier.epoch_images, tier.image, tier.epoch_images // 5)
    batch = min(tier.batch, tier.epoch_images // 2)
    for precision, mode in ways:
        said: list[str] = []
        recipe = recipe_of(batch, tier.epochs + 1, Augmentation(4, True), precision)
        usual = Usual(branch_by_branch(make()), data, recipe, setting.device)
        stamps: list[tuple[float, float]] = []

        def turn(usual=usual, stamps=stamps) -> None:
            """Between two epochs of ours, one of the other."""
            synchronise(setting.device)
            begin = time.perf_counter()
            usual()
            synchronise(setting.device)
            stamps.append((begin, time.perf_counter()))

        task = task_of(make(), data, recipe, setting.device, mode, said)
        with quiet():
            fit(task, tick=turn)
        theirs = [end - begin for begin, end in stamps][1:]
        ours = [after[0] - before[1] for before, after in pairwise(stamps)]
        name = f"our loop, {precision}" + ("" if mode == "none" else ", compiled")
        name += ", CUDA graph" if mode == "cudagraphs" else ""
        if said:
            out["left_out"][name] = said[0]
            if task.compile != mode:
                continue
        other = f"DataLoader and eager float32 (beside {name})"
        for label, seconds in ((name, ours), (other, theirs)):
            out["ways"].append({"way": label, "milliseconds": spread(seconds, 1000)})
        out["ratios"].append({"of": other, "over": name, "what": "time"} | quotients(theirs, ours))
        rate = [tier.epoch_images / seconds for seconds in ours]
        out["numbers"][f"{name}, images per second"] = spread(rate)
        if setting.on_gpu:  # RepAn's recipe: 160 epochs, then 15 cycles of 30
            minutes = spread(ours, (160 + 15 * 30) / 60 * 50_000 / tier.epoch_images)
            out["numbers"][f"{name}, minutes of 610 epochs of 50,000 images"] = minutes
    return out


def accuracy_by_precision(setting: Setting, make: Callable[[], nn.Module], seeds: int) -> dict:
    """Test accuracy after a short training in float32 and in bfloat16, paired by seed.

    Images are smooth patterns, one per class, in noise that hides part of them.
    """
    found: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    size, count = setting.tier.image, min(7_500, 8 * setting.tier.epoch_images)
    for seed in range(seeds):
        data = patterns(count, size, seed)
        for precision, accuracies in found.items():
            recipe = recipe_of(setting.tier.batch, 4, Augmentation(0, False), precision)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = make()
            progress = fit(task_of(model, data, recipe, setting.device, "none", []))
            accuracies.append(100 * progress.history[-1]["test_accuracy"])
    gaps = [b - a for a, b in zip(*found.values(), strict=True)]
    numbers = {f"{name}, test accuracy in %": spread(values) for name, values in found.items()}
    return {"numbers": numbers | {"bfloat16 less float32, points": spread(gaps)}}


def patterns(count: int, size: int, seed: int) -> Dataset:
    """Images of 10 classes that can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(10, 3, 4, 4, generator=generator)
    shapes = F.interpolate(coarse, size=(size, size), mode="bilinear")
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.randn(count, 3, size, size, generator=generator)
    x = (128 + 12 * shapes[labels] + 60 * noise).clamp(0, 255).to(torch.uint8)
    tests = count // 5
    named = replace(random_data(2, size, 0), name="patterns")
    parts = x[tests:], labels[tests:], x[:tests], labels[:tests]
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    return replace(named, **dict(zip(keys, parts, strict=True)))
