"""The comparisons: each builds what it compares, checks that it is equal, and measures in turn.

Every function takes the `Setting` and returns plain data:

    ways       [{"way", "network", "milliseconds", "saved_mib", ...}]
    ratios     [{"of", "over", "what", "median", "low", "high", "rounds"}], of / over, or
               {"of", "over", "what", "refused"} where the two do not compute the same thing
    agreement  [{"way", "equal", "errors", "allowed"}]
    left_out   {way: reason}
    numbers    {name: a number, or a spread}
    profiles   {way: rows of `timing.profile`}
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib.benchmark.agreement import (
    EXACT,
    GRADIENT,
    OUTPUT,
    Pass,
    Unequal,
    agreement,
    buffers_kept,
    difference,
    distances,
    largest,
    network_pass,
    official_vectors,
    reference_pass,
    step_pass,
)
from replib.benchmark.subjects import BRANCHES, FORMATS, LeftOut, Way, body
from replib.benchmark.timing import (
    MIB,
    Action,
    alternate,
    profile,
    quiet,
    quotients,
    rounded,
    saved_bytes,
    seconds_of,
    slope,
    spread,
)
from replib.fusing import fuse
from replib.methods.cycle import Cycle, decay_groups
from replib.networks import branch_by_branch, outermost_blocks
from replib.training.augmentation import Augmentation
from replib.training.data import Dataset, derive
from replib.training.loop import Recipe, Task, fit
from replib.training.step import PRECISIONS, Step, set_rate, sgd, why_not
from replib.verification import verify


@dataclass(frozen=True)
class Subject:
    """A network, and the images (batch, channels, size, size) that it is trained on.

    few: images on which ways are checked; None: all. A compiled step is checked on all, too.
    """

    make: Callable[[], nn.Module]
    size: int
    batch: int
    channels: int = 3
    few: int | None = 16


@dataclass(frozen=True)
class Tier:
    """How large the cases are. Image sizes in pixels, batches in images."""

    name: str
    rounds: int
    body: str  # a plain body of blocks for small images
    in_channels: int
    image: int
    batch: int
    many_batch: int  # where every family of blocks is measured
    large_image: int  # ResNet-18
    large_batch: int
    full_image: int  # ResNet-18 at the size of OREPA's paper
    full_batch: int
    crossover: tuple[int, ...]  # batches
    epoch_images: int
    epochs: int
    workers: tuple[int, ...]  # packed cells
    gigabytes: float  # of the arrays whose copying is timed
    matrix: int  # rows of the matrices whose product is timed


TIERS = {
    "quick": Tier(
        "quick", 3, "digits", 3, 8, 8, 8, 64, 4, 64, 4, (1, 2), 32, 3, (1, 2), 0.002, 64
    ),
    "cpu": Tier(
        "cpu", 4, "cifar_repvgg_a1", 3, 32, 128, 32, 112, 4, 224, 64, (1, 2, 4, 8), 640, 3,
        (1, 2, 4, 8), 0.25, 2048,
    ),
    "cuda": Tier(
        "cuda", 9, "cifar_repvgg_a1", 3, 32, 128, 128, 224, 32, 224, 64, (1, 4, 16, 64, 128),
        50_000, 4, (1, 2, 4, 8), 2.0, 8192,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Where and how large a case is measured."""

    tier: Tier
    device: str = "cpu"
    deadline: float = math.inf  # of the case, on the clock of time.monotonic()
    profiled: frozenset[str] = field(default_factory=frozenset)  # ways whose profile is wanted
    vectors: Path | None = None  # a folder of official numbers

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


# -- training steps -------------------------------------------------------------------------------
@dataclass
class Running:
    """A way that is built, and has agreed with its reference."""

    way: Way
    model: nn.Module
    step: Step
    x: Tensor
    labels: Tensor
    notes: dict

    def __call__(self) -> Tensor:
        return self.step(self.x, self.labels)

    def saved(self) -> int:
        """Bytes kept for the backward pass."""

        def forward() -> Tensor:
            return self.step.forward(self.x, self.labels)

        return saved_bytes(self.model, forward, (self.x, self.labels))


def images(setting: Setting, batch: int, channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Random images and labels, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x.to(setting.device), torch.randint(10, (batch,), generator=generator).to(setting.device)


def training_step(way: Way, model: nn.Module, batch: int, said: list[str]) -> Step:
    """Our own step, at learning rate 0: all of its work is done, and the weights stay."""

    def objective(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels)

    optimizer = sgd(decay_groups(model, 0.0), momentum=0.9, nesterov=False)
    set_rate(optimizer, 0.0)
    options = {"precision": way.precision, "compile": way.mode, "say": said.append}
    return Step(model, optimizer, objective, batch=batch, **options)


def running(way: Way, reference: nn.Module, x: Tensor, labels: Tensor, device: str) -> Running:
    """A way, built and run once. Raises: LeftOut where something for it is missing."""
    if way.mode != "none" and (missing := why_not(device)):
        raise LeftOut(missing)
    if way.mode == "cudagraphs" and not device.startswith("cuda"):
        raise LeftOut("there is no GPU")
    model, said = way.model(reference, device), []
    x = laid_out(x, way)
    step = training_step(way, model, len(x), said)
    made = Running(way, model, step, x, labels, {})
    with buffers_kept(model):
        first = seconds_of(made, device)
    if said:
        raise LeftOut(said[0])
    if way.mode != "none":
        made.notes["first_step_seconds"] = rounded(first)
    return made


class Reference:
    """The branch-by-branch network that ways of one network must agree with."""

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor, few: int | None):
        self.model, self.whole, self.some = model, (x, labels), (x[:few], labels[:few])
        self.passes: dict[bool, Pass] = {}
        self.own: dict[tuple, dict[str, float]] = {}

    def exact(self, whole: bool) -> Pass:
        """Its pass in float64, over all images or some."""
        if whole not in self.passes:
            self.passes[whole] = reference_pass(self.model, *(self.whole if whole else self.some))
        return self.passes[whole]

    def own_errors(self, way: Way, whole: bool) -> dict[str, float]:
        """{part: error} of itself in the layout and in the precision of a way.

        Torch's norms sum less precisely channels last on a processor, so the layout counts.
        """
        key = (way.precision, way.layout, whole)
        if key not in self.own:
            plain = replace(way, form=BRANCHES, mode="none").model(self.model, self.device)
            x, labels = self.whole if whole else self.some
            lower = PRECISIONS[way.precision] is not torch.float32
            with torch.autocast(x.device.type, PRECISIONS[way.precision], enabled=lower):
                found = network_pass(plain, laid_out(x, way), labels)
            self.own[key] = distances(found, self.exact(whole), "everything")
        return self.own[key]

    @property
    def device(self) -> str:
        return str(self.whole[0].device)

    def check(self, made: Running) -> dict:
        """The agreement of a way: in float64, exactly; and of the very step that is timed."""
        way, model = made.way, made.model
        whole = way.mode != "none"  # what is compiled is so for one size
        named = dict(self.model.named_parameters()).keys()
        ours = dict(model.named_parameters()).keys() == named
        x, labels = self.some
        double = network_pass(copy.deepcopy(model).double(), laid_out(x.double(), way), labels)
        view = "everything" if ours else "network"
        exactly = largest(distances(double, self.exact(False), view).values())
        x, labels = self.whole if whole else self.some
        x = laid_out(x, way)
        if ours:
            found, view = step_pass(model, made.step, x, labels), "step"
        else:
            found = network_pass(model, x, labels)
        errors = distances(found, self.exact(whole), view)
        eps = torch.finfo(PRECISIONS[way.precision]).eps
        row = {"way": way.name} | agreement(errors, self.own_errors(way, whole), eps)
        row["errors"]["in float64"], row["allowed"]["in float64"] = rounded(exactly), EXACT
        row["equal"] = row["equal"] and exactly <= EXACT
        return row


def laid_out(x: Tensor, way: Way) -> Tensor:
    return x.contiguous(memory_format=FORMATS[way.layout])


def steps(
    setting: Setting,
    subjects: Mapping[str, Subject],
    ways: Sequence[Way],
    *,
    pairs: Sequence[tuple[Way, Way]] = (),
    untimed: Sequence[Way] = (),
) -> tuple[dict, dict[str, list[float]]]:
    """Training steps of several ways: their times, what they save, and that they agree.

    Of every network the first way named is the one that the others are compared with.
    pairs: more ratios (of, over). untimed: ways of which only the memory is asked.
    Returns the result, and the seconds of every round by way.
    Raises: Unequal where nothing is left to be timed.
    """
    out: dict = {"ways": [], "ratios": [], "agreement": [], "left_out": {}}
    runs: dict[str, Running] = {}
    unequal: dict[str, str] = {}
    saved: dict[str, int] = {}
    for network, subject in subjects.items():
        x, labels = images(setting, subject.batch, subject.channels, subject.size)
        reference = Reference(subject.make().to(setting.device), x, labels, subject.few)
        for way in (way for way in (*ways, *untimed) if way.network == network):
            try:
                made = running(way, reference.model, x, labels, setting.device)
                result = reference.check(made)
            except LeftOut as reason:
                out["left_out"][way.name] = str(reason)
                continue
            out["agreement"].append(result)
            if not result["equal"]:
                unequal[way.name] = difference(result)
                continue
            saved[way.name] = made.saved()
            line = {"way": way.name, "network": network, "saved_mib": in_mib(saved[way.name])}
            out["ways"].append(line | made.notes)
            if way not in untimed:
                runs[way.name] = made
    if not runs:
        raise Unequal("; ".join(unequal.values()) or "; ".join(out["left_out"].values()))
    times = timed(setting, runs)
    for line in out["ways"]:
        if line["way"] in times:
            line["milliseconds"] = spread(times[line["way"]], 1000)
            line |= {"peak_mib": peak_mib(runs[line["way"]])} if setting.on_gpu else {}
    out["ratios"] = ratios([*first_of_each(ways), *pairs], times, saved, unequal)
    out["profiles"] = {
        name: profile(run, setting.device) for name, run in runs.items() if name in setting.profiled
    }
    return out, times


def in_mib(size: int) -> float:
    return rounded(size / MIB)


def growth(
    setting: Setting,
    axis: str,
    families: Mapping[str, Callable[[int], Subject]],
    xs: Sequence[int],
    forms: Sequence[str],
    pairs: Sequence[tuple[str, str, str, str]] = (),
) -> dict:
    """Training steps over one axis: points for a figure, and slopes on logarithmic axes.

    families: the subject of a series at x. forms: of the blocks; "plain" networks have one.
    pairs: more ratios at every x, (network, form, other network, its form).
    """

    def way(name: str, form: str, x: int) -> Way:
        return Way(f"{name}, {axis} {x}", form)

    subjects = {f"{name}, {axis} {x}": f(x) for name, f in families.items() for x in xs}
    forms_of = {name: ("plain",) if name == "plain" else forms for name in families}
    series = [(name, form) for name in families for form in forms_of[name]]
    ways = [way(name, form, x) for x in xs for name, form in series]
    more = [(way(a, f, x), way(b, g, x)) for a, f, b, g in pairs for x in xs]
    out, times = steps(setting, subjects, ways, pairs=more)
    by_name = {line["way"]: line for line in out["ways"]}
    out |= {"axis": axis, "points": [], "slopes": []}
    for name, form in series:
        found = [(x, way(name, form, x).name) for x in xs if way(name, form, x).name in times]
        label = name if form == "plain" else f"{name}, {form}"
        for x, key in found:
            line = by_name[key]
            numbers = {"milliseconds": line["milliseconds"], "saved_mib": line["saved_mib"]}
            out["points"].append({"series": label, "x": x, "way": key} | numbers)
        if len(found) > 1:
            rounds = zip(*(times[key] for _, key in found), strict=False)
            slopes = slope([x for x, _ in found], list(rounds))
            out["slopes"].append({"series": label, "what": "time"} | slopes)
            saved = [by_name[key]["saved_mib"] for _, key in found]
            memory = slope([x for x, _ in found], [saved])["median"]
            out["slopes"].append({"series": label, "what": "saved", "median": memory})
    return out


def first_of_each(ways: Sequence[Way]) -> list[tuple[Way, Way]]:
    """(the first way of a network, another one of it)."""
    pairs = []
    for network in dict.fromkeys(way.network for way in ways):
        first, *others = (way for way in ways if way.network == network)
        pairs += [(first, other) for other in others]
    return pairs


def timed(setting: Setting, actions: Mapping[str, Action]) -> dict[str, list[float]]:
    """Seconds in every round."""
    options = {"device": setting.device, "rounds": setting.tier.rounds}
    return alternate(dict(actions), **options, deadline=setting.deadline)


def ratios(
    pairs: Iterable[tuple[Way, Way]],
    times: Mapping[str, list[float]],
    saved: Mapping[str, int],
    unequal: Mapping[str, str],
) -> list[dict]:
    """A line for the time and one for the saved memory of every pair; of unequal ways, why not."""
    lines = []
    for of, over in dict.fromkeys(pairs):
        names = {"of": of.name, "over": over.name}
        wrong = [f"{n}: {unequal[n]}" for n in (of.name, over.name) if n in unequal]
        if wrong:
            lines.append(names | {"what": "time", "refused": "; ".join(wrong)})
            continue
        if of.name in times and over.name in times:
            lines.append(names | {"what": "time"} | quotients(times[of.name], times[over.name]))
        if of.name in saved and over.name in saved:
            value = rounded(saved[of.name] / saved[over.name])
            lines.append(names | {"what": "saved", "median": value})
    return lines


def peak_mib(action: Action) -> float:
    """The most memory of a GPU that is allocated at once during an action."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return in_mib(torch.cuda.max_memory_allocated())


# -- an epoch -------------------------------------------------------------------------------------
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
            continue
        other = f"DataLoader and eager float32 (beside {name})"
        for label, seconds in ((name, ours), (other, theirs)):
            out["ways"].append({"way": label, "milliseconds": spread(seconds, 1000)})
        out["ratios"].append({"of": other, "over": name, "what": "time"} | quotients(theirs, ours))
        rate = [tier.epoch_images / seconds for seconds in ours]
        out["numbers"][f"{name}, images per second"] = spread(rate)
        if tier.epoch_images == 50_000:  # RepAn's recipe: 160 epochs, then 15 cycles of 30
            minutes = spread(ours, (160 + 15 * 30) / 60)
            out["numbers"][f"{name}, minutes of 610 such epochs"] = minutes
    return out


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def accuracy_by_precision(setting: Setting, make: Callable[[], nn.Module], seeds: int) -> dict:
    """Test accuracy after a short training in float32 and in bfloat16, paired by seed.

    Images are smooth patterns, one per class, in noise that hides part of them.
    """
    found: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    size, count = setting.tier.image, min(10_000, 8 * setting.tier.epoch_images)
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


# -- the cycle ------------------------------------------------------------------------------------
def cycle(setting: Setting, subject: Subject) -> dict:
    """Merging, restoring, fusing and verifying a network, in units of one training step."""
    x, labels = images(setting, subject.batch, subject.channels, subject.size)
    x = x.contiguous(memory_format=torch.channels_last)
    model = subject.make().to(setting.device, memory_format=torch.channels_last)
    step = running(Way("network"), model, x, labels, setting.device)
    official, preserving = (
        Cycle(copy.deepcopy(model), warmup=5, fidelity=f) for f in ("official", "preserving")
    )
    still = copy.deepcopy(model).eval()
    fused = fuse(still)
    verdict = verify(still, fused, x[:8])
    before = copy.deepcopy(preserving.model).eval()
    preserving.start_cycle(x)
    kept = verify(before, preserving.model.eval(), x[:8])
    preserving.model.train()
    checks = {"fuse": verdict, "merge, redraw, restore, preserving": kept}
    rows = [
        {
            "way": name,
            "equal": check.ok,
            "errors": {"outputs": rounded(check.network.error)},
            "allowed": {"outputs": rounded(check.network.allowed)},
        }
        for name, check in checks.items()
    ]
    if not all(row["equal"] for row in rows):
        raise Unequal("; ".join(difference(row) for row in rows))

    def merge() -> None:
        for block in outermost_blocks(still).values():
            block.merged()

    actions = {
        "training step": step,
        "merge": merge,
        "merge, redraw, restore": official.start_cycle,
        "merge, redraw, restore, preserving": lambda: preserving.start_cycle(x),
        "fuse": lambda: fuse(still),
        "verify, 8 images": lambda: verify(still, fused, x[:8]),
    }
    times = timed(setting, actions)
    if not all(p.isfinite().all() for p in official.model.parameters()):
        raise Unequal("the restored network is not finite")
    ways = [{"way": n, "milliseconds": spread(t, 1000)} for n, t in times.items()]
    step_times = times["training step"]
    lines = [
        {"of": name, "over": "training step", "what": "time"} | quotients(found, step_times)
        for name, found in times.items()
        if name != "training step"
    ]
    return {"ways": ways, "ratios": lines, "agreement": rows}


# -- deployed networks ----------------------------------------------------------------------------
def deployed(
    setting: Setting, subject: Subject, plain: Callable[[nn.Module], nn.Module], batches=(1, 64)
) -> dict:
    """Inference of the training form, of the deployed network and of a plain one.

    plain: a network that never had blocks, with the weights of a deployed one.
    """
    model = calibrated(subject.make(), setting, subject).eval()
    forms = {"training form": model, "deployed": fuse(model)}
    forms["plain"] = plain(forms["deployed"]).eval()
    layout = torch.channels_last
    exact = copy.deepcopy(model).double()
    forms = {k: m.to(setting.device, memory_format=layout) for k, m in forms.items()}
    out: dict = {"ways": [], "ratios": [], "agreement": []}
    actions: dict[str, Action] = {}
    with torch.inference_mode():
        for batch in batches:
            x, _ = images(setting, batch, subject.channels, subject.size)
            x = x.contiguous(memory_format=layout)
            wanted = exact(x[:8].double())
            own = {"outputs": apart(model(x[:8]), wanted)}
            for form, network in forms.items():
                name = f"{form}, batch {batch}"
                error = {"outputs": apart(network(x[:8]), wanted)}
                eps = torch.finfo(torch.float32).eps
                out["agreement"].append({"way": name} | agreement(error, own, eps))
                actions[name] = partial(network, x)
        wrong = [difference(row) for row in out["agreement"] if not row["equal"]]
        if wrong:
            raise Unequal("; ".join(wrong))
        times = timed(setting, actions)
        out["profiles"] = {
            name: profile(action, setting.device)
            for name, action in actions.items()
            if name in setting.profiled
        }
    out["ways"] = [{"way": n, "milliseconds": spread(t, 1000)} for n, t in times.items()]
    for batch in batches:
        for of, over in (("training form", "deployed"), ("deployed", "plain")):
            names = f"{of}, batch {batch}", f"{over}, batch {batch}"
            line = {"of": names[0], "over": names[1], "what": "time"}
            out["ratios"].append(line | quotients(*(times[name] for name in names)))
    return out


def apart(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def calibrated(model: nn.Module, setting: Setting, subject: Subject) -> nn.Module:
    """Running statistics as data leave them: an untrained network's outputs would fade away."""
    model = model.to(setting.device).train()
    x, _ = images(setting, min(subject.batch, 32), subject.channels, subject.size)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 1.0
    model(x)
    return model


# -- what the machine could do --------------------------------------------------------------------
def machine_rates(setting: Setting, precision: str = "float32") -> tuple[dict[str, Action], dict]:
    """(actions, {action: (what, amount)}): bytes moved, or floating-point operations done."""
    tier, device = setting.tier, setting.device
    count, n, dtype = int(tier.gigabytes * 1e9 / 4), tier.matrix, PRECISIONS[precision]
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    side, channels = (8, 16) if tier.name == "quick" else (56, 128)
    batch = 64 if setting.on_gpu else 4
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    operations = 2 * batch * channels * channels * 9 * side * side
    actions = {
        "copy": lambda: b.copy_(a),
        "triad": lambda: torch.add(a, b, alpha=3.0, out=c),
        "matrix product": lambda: left @ right,
        "convolution": lambda: F.conv2d(x, weight, padding=1),
    }
    amounts = {
        "copy": ("bytes", 8 * count),
        "triad": ("bytes", 12 * count),
        "matrix product": ("operations", 2 * n**3),
        "convolution": ("operations", operations),
    }
    return actions, amounts


def machine(setting: Setting) -> dict:
    """How fast memory is copied, and matrices and images are multiplied, here."""
    actions, amounts = machine_rates(setting)
    times = timed(setting, actions)
    numbers = {}
    for name, seconds in times.items():
        what, amount = amounts[name]
        unit = "GB/s" if what == "bytes" else "GFLOP/s"
        numbers[f"{name}, {unit}"] = spread([amount / s / 1e9 for s in seconds])
    return {"numbers": numbers}


def least_bytes(saved: int, model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Bytes that a step must move at least once.

    What is saved is written and read; a parameter is read forward and backward, its gradient
    written and read, itself and its momentum read and written; inputs are read.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    given = sum(t.numel() * t.element_size() for t in inputs)
    return 2 * saved + 8 * parameters + given


def share(setting: Setting, subjects: Mapping[str, Subject], ways: Sequence[Way]) -> dict:
    """The share of the machine's measured rates that training steps reach.

    The limit is the larger of the two times that bytes and operations need at these rates.
    """
    out: dict = {"numbers": {}, "ways": [], "left_out": {}}
    precision = ways[0].precision
    actions, amounts = machine_rates(setting, precision)
    runs, needs = {}, {}
    for way in ways:
        subject = subjects[way.network]
        x, labels = images(setting, subject.batch, subject.channels, subject.size)
        try:
            run = running(way, subject.make().to(setting.device), x, labels, setting.device)
        except LeftOut as reason:
            out["left_out"][way.name] = str(reason)
            continue
        if not run().isfinite():
            raise Unequal(f"{way.name}: the loss is not finite")
        with FlopCounterMode(display=False) as counter:
            run.step.update(run.step.eager, run.x, run.labels)
        moved = least_bytes(run.saved(), run.model, (run.x, run.labels))
        runs[way.name], needs[way.name] = run, (moved, counter.get_total_flops())
    times = timed(setting, actions | runs)
    rates = {"bytes": [], "operations": []}
    for name in actions:
        what, amount = amounts[name]
        rates[what].append([amount / seconds for seconds in times[name]])
    best = {what: [max(r) for r in zip(*found, strict=True)] for what, found in rates.items()}
    for name in runs:
        moved, operations = needs[name]
        seconds = times[name]
        by_bytes = [moved / r / s for r, s in zip(best["bytes"], seconds, strict=True)]
        by_work = [operations / r / s for r, s in zip(best["operations"], seconds, strict=True)]
        line = {"way": name, "milliseconds": spread(seconds, 1000)}
        line |= {"least_mib": in_mib(moved), "gflop": rounded(operations / 1e9)}
        out["ways"].append(line)
        out["numbers"] |= {
            f"{name}: share of the memory bandwidth, %": spread(by_bytes, 100),
            f"{name}: share of the arithmetic rate, %": spread(by_work, 100),
            f"{name}: share of the limit, %": spread(
                [max(pair) for pair in zip(by_bytes, by_work, strict=True)], 100
            ),
        }
    out["numbers"]["memory bandwidth, GB/s"] = spread(best["bytes"], 1e-9)
    out["numbers"]["arithmetic rate, GFLOP/s"] = spread(best["operations"], 1e-9)
    out["profiles"] = {
        name: profile(run, setting.device) for name, run in runs.items() if name in setting.profiled
    }
    return out


# -- several at once ------------------------------------------------------------------------------
def worker(pipe, subject: Subject, way: Way, setting: Setting) -> None:
    """In a process of its own: (steps, threads) in, the last loss out."""
    follow_parent()
    torch.set_num_threads(1)
    x, labels = images(setting, subject.batch, subject.channels, subject.size)
    run = running(way, subject.make().to(setting.device), x, labels, setting.device)
    while (order := pipe.recv()) is not None:
        count, threads = order
        if not setting.on_gpu:
            torch.set_num_threads(threads)
        for _ in range(count):
            loss = run()
        synchronise(setting.device)
        pipe.send(loss.item())


def follow_parent() -> None:
    """End with the process that started this one."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def packed(setting: Setting, subject: Subject, way: Way, steps_each: int) -> dict:
    """Training steps per second of several processes at once; on a processor, of one thread."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(max(setting.tier.workers))]
    plain = replace(setting, deadline=math.inf, profiled=frozenset())
    workers = [
        context.Process(target=worker, args=(end, subject, way, plain), daemon=True)
        for _, end in pairs
    ]
    pipes = [pipe for pipe, _ in pairs]
    losses: dict[int, float] = {}

    def together(count: int, threads: int = 1) -> None:
        for pipe in pipes[:count]:
            pipe.send((steps_each, threads))
        for index, pipe in enumerate(pipes[:count]):
            losses.setdefault(index, pipe.recv())

    try:
        for process in workers:
            process.start()
        together(len(pipes))  # all are there
        one, *others = setting.tier.workers
        actions = {named(one): partial(together, one)}
        actions |= {named(count): partial(together, count) for count in others}
        cores = os.cpu_count() or 1
        if not setting.on_gpu and cores > 1:
            actions[f"1 process, {cores} threads"] = partial(together, 1, cores)
        options = {"device": "cpu", "rounds": setting.tier.rounds, "deadline": setting.deadline}
        times = alternate(actions, **options)
    finally:
        for process in workers:
            process.kill()
            process.join()
    worst = max(abs(loss - losses[0]) / abs(losses[0]) for loss in losses.values())
    eps = torch.finfo(PRECISIONS[way.precision]).eps
    same = {"way": "all processes"} | agreement({"outputs": worst}, {"outputs": 0.0}, eps)
    if not same["equal"]:
        raise Unequal(difference(same))
    counts = {name: steps_each * int(name.split()[0]) for name in times}
    rates = {n: [counts[n] / s for s in seconds] for n, seconds in times.items()}
    base = rates[named(one)]
    return {
        "numbers": {f"{n}, steps per second": spread(r) for n, r in rates.items()},
        "ratios": [
            {"of": n, "over": named(one), "what": "throughput"} | quotients(r, base)
            for n, r in rates.items()
            if n != named(one)
        ],
        "agreement": [same],
    }


def named(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


# -- the reference itself -------------------------------------------------------------------------
def vectors(setting: Setting) -> dict:
    """The branch-by-branch blocks against what the official implementations computed."""
    if setting.vectors is None or not setting.vectors.is_dir():
        raise LeftOut("the official numbers (REPLIB_SHARED, or ../shared/vectors) are not here")
    rows = official_vectors(setting.vectors)
    if not rows or not all(row["equal"] for row in rows):
        wrong = [row["file"] for row in rows if not row["equal"]]
        raise Unequal(f"the reference differs from the official numbers: {', '.join(wrong)}")
    bounds = {"outputs": OUTPUT, "gradients": GRADIENT, "statistics": OUTPUT}
    return {
        "agreement": [
            {"way": row["file"], "equal": row["equal"], "errors": row["errors"]}
            | {"allowed": {part: bounds[part] for part in row["errors"]}}
            for row in rows
        ]
    }
