"""The one training loop: phases of epochs, each with a fresh optimizer and a fresh schedule.

What a network is trained for is a `Task.kind`: without one, the classes of images; detection and
segmentation are kinds of replib.transfer, with images, losses and scores of their own.

A plain run is one phase. A cycle is several: at the start of each, the method restructures the
network. DyRep restructures it between epochs of one phase: the optimizer then keeps what it knows
of the parameters that stay. Everything random is drawn from (seed, purpose, phase, epoch), so a run
that is killed and resumed computes what the undisturbed run computes, bit for bit on the same CPU
where nothing is compiled. It stops and goes on between any two steps.

Within an epoch nothing waits for the device: images, labels, their order and all random numbers of
the epoch are there at its start, and its loss is read at its end.

Several processes (replib.parallel) compute together what one computes, to rounding: the parts of
every batch, `Recipe.accumulate`, are dealt out to them. What the network draws itself, as dropout
does, is another's in each, and DBB's padding sees the statistics of its own process until the step
is over.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib import parallel
from replib.errors import UserError
from replib.fusing import deployed_copy, refill
from replib.training import loader
from replib.training.augmentation import Augmentation
from replib.training.data import Dataset, derive
from replib.training.evaluation import Normalise, Split, accuracy, relative_jump, right
from replib.training.loader import Folder
from replib.training.optimisation import Average, Schedule
from replib.training.step import Step, adamw, parameters_of, set_rate, sgd

VERSION = 2  # raise when the numbers of a training run change
KNOWN = "known"  # the name of rows of `Task.known` beside what is drawn
PROBE_IMAGES = 256  # un-augmented training images on which a function jump is measured


class OutOfTime(Exception):
    """The time budget is spent; a checkpoint was written."""


@dataclass(frozen=True)
class Recipe:
    """How a network is optimised; the defaults are SGD and, in every phase, a cosine to 0 that is
    stepped per epoch."""

    phases: int
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    nesterov: bool
    weight_decay: float
    clip_norm: float | None
    clip: str  # "all", or "decayed": the group with weight decay only, as RepAn's cycles
    augmentation: Augmentation
    next_start: str  # the next phase goes on from the "best" or the "last" epoch
    select: str  # by "validation" or "test" accuracy, or the "last" epoch
    reseed_each_phase: bool  # every phase sees the same order, as RepAn's released code
    precision: str = "float32"  # of replib.training.step.PRECISIONS
    schedule: Schedule = field(default_factory=Schedule)  # of the learning rate within a phase
    learning_rate_decay: float = 1.0  # phase k begins at learning_rate times this to the power k
    optimizer: str = "sgd"  # of replib.training.step.OPTIMIZERS
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW, as epsilon
    epsilon: float = 1e-8
    ema: float = 0.0  # decay of the average that is evaluated in the network's place; 0: none
    drop_last: bool = False  # an epoch leaves out the images that fill no whole batch
    accumulate: int = 1  # parts of a batch that go through the network one after the other
    carry_momentum: bool = False  # a phase goes on with the optimizer's state of the one before

    def images(self, available: int) -> int:
        """How many of the training images an epoch takes."""
        return available - available % self.batch_size if self.drop_last else available

    def steps(self, available: int) -> int:
        """The steps of an epoch."""
        return -(-self.images(available) // self.batch_size)

    def rate(self, phase: int, epoch: int, step: int, steps: int) -> float:
        """The learning rate of one step, all counted from 0."""
        base = self.learning_rate * self.learning_rate_decay**phase
        return self.schedule.rate(base, epoch, self.epochs, step, steps)


@dataclass
class Task:
    """What is trained, on what, and how the method takes part."""

    model: nn.Module
    data: Dataset
    train: Tensor  # indices of training images
    validation: Tensor
    recipe: Recipe
    groups: Callable[[], list[dict]]  # parameter groups for a new optimizer
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits, targets, inputs) -> scalar
    seed: int
    method: object | None = None  # replib.methods.cycle.Cycle, or replib.methods.dyrep.DyRep
    device: str = "cpu"
    decoders: int | None = None  # processes that read image files; None: as many as cores
    compile: str = "none"  # of replib.training.step.MODES, not "auto"; after `fit`: what ran
    say: Callable[[str], None] = print  # takes a line for the user
    known: Tensor | None = None  # (views, images, ...), see known_logits: `loss` is given its rows
    # Makes the optimizer of the groups, its state allocated; None: the one that the recipe says.
    optimizer: Callable[[list[dict]], torch.optim.Optimizer] | None = None
    observe: Callable[[], dict] = dict  # what the log of every epoch is given besides
    kind: object | None = None  # of replib.transfer.tasks; None: classes of images, accuracy

    @property
    def metric(self) -> str:
        """What scores are called in the history, behind "validation_" and "test_"."""
        return "accuracy" if self.kind is None else self.kind.metric


@dataclass
class Progress:
    """All that a resumed run needs, besides the model."""

    phase: int = 0
    epoch: int = 0  # of this phase: the one to run, or to go on with
    batch: int = 0  # of this epoch: the next one to run
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum over this epoch's images
    history: list[dict] = field(default_factory=list)
    restarts: list[dict] = field(default_factory=list)
    trained: dict | None = None  # of this epoch, once it is over: the structure that was trained
    best: dict | None = None  # {"score", "index", "weights", "structure"} over the whole run
    phase_best: dict | None = None


def fit(
    task: Task,
    *,
    resume: dict | None = None,
    checkpoint: Callable[[dict], None] | None = None,
    checkpoint_seconds: float = 15,
    deadline: float | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Progress:
    """Train; returns the history and the selected weights.

    resume: what `checkpoint` was given by a run that was stopped.
    deadline: `time.monotonic()` after which the run checkpoints and raises OutOfTime; at least one
    step, or one evaluation, is done before.
    tick: called after every epoch.
    Of several processes all call it with the same task; `checkpoint` is called in the first one.
    """
    gpus = [task.device] if task.device.startswith("cuda") else []
    with torch.random.fork_rng(gpus):  # what a network draws itself is seeded, see `train_epoch`
        return Run(task, checkpoint, checkpoint_seconds, deadline, tick).whole(resume)


class Run:
    """One call of `fit`."""

    def __init__(
        self,
        task: Task,
        checkpoint: Callable[[dict], None] | None,
        checkpoint_seconds: float,
        deadline: float | None,
        tick: Callable[[], None],
    ):
        check_shares(task)
        self.task, self.checkpoint, self.tick = task, checkpoint, tick
        self.seconds, self.deadline = checkpoint_seconds, deadline
        self.written, self.worked = time.monotonic(), False
        data, device = task.data, task.device
        self.model = task.model.to(device, memory_format=torch.channels_last)
        dtype = next(self.model.parameters()).dtype
        self.normalise = Normalise(data, device, dtype)
        self.images = data.train_images
        if isinstance(self.images, Tensor):
            self.images = self.images.to(device)
        self.labels = data.train_labels.to(device)
        # Each process evaluates on a share of the images; what is no count, on all of them.
        kind = Split if task.kind is None else task.kind.split
        shared = slice(parallel.place(), None, parallel.processes())
        own = shared if task.kind is None else slice(None)
        tests, held_out = torch.arange(len(data.test_labels))[own], task.validation[own]
        self.test = kind(data.test_images, data.test_labels, tests, data, device, dtype)
        self.held_out = kind(self.images, data.train_labels, held_out, data, device, dtype)
        self.step: Step | None = None
        self.average: Average | None = None
        self.deployed: nn.Module | None = None
        self.size: dict | None = None  # of the network that is trained, while it stays what it is
        self.images_per_epoch = task.recipe.images(len(task.train))
        self.steps_per_epoch = task.recipe.steps(len(task.train))
        if not self.steps_per_epoch:
            raise UserError(
                f"batch_size (={task.recipe.batch_size}) with drop_last (=true) must be at most "
                f"{len(task.train)}, the number of training images."
            )
        self.progress = Progress(loss=torch.zeros((), device=device))

    def whole(self, resume: dict | None) -> Progress:
        """All phases, or what is left of them."""
        task, recipe = self.task, self.task.recipe
        if resume is not None:
            self.progress = Progress(**resume["progress"])
            self.progress.loss = self.progress.loss.to(task.device)
            if task.method is not None:  # first the structure, then what is in it
                task.method.load_state_dict(resume["method"])
            self.model.load_state_dict(resume["model"])
            self.prepare_step()
            optimizer = self.step.optimizer
            # The recipe says what the groups are; a checkpoint, what they have gathered.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(resume["optimizer"] | {"param_groups": groups})
            if self.average is not None:
                self.average.model.load_state_dict(resume["average"])
        progress, started = self.progress, resume is not None
        while progress.phase < recipe.phases:
            if not started:
                self.start_phase()
                self.prepare_step()
            while progress.epoch < recipe.epochs:
                if task.method is not None:
                    task.method.epoch(progress.epoch)
                rate = self.rate(0)
                set_rate(self.step.optimizer, rate)
                self.train_epoch()
                self.after_epoch()
                self.record(rate)
                progress.epoch, progress.batch, progress.trained = progress.epoch + 1, 0, None
                progress.loss = torch.zeros_like(progress.loss)
                self.tick()
                self.pause()
            progress.phase, progress.epoch, started = progress.phase + 1, 0, False
        task.compile = self.step.mode if self.step is not None else task.compile
        return progress

    def rate(self, step: int) -> float:
        """The learning rate of a step of the present epoch."""
        at = self.progress
        return self.task.recipe.rate(at.phase, at.epoch, step, self.steps_per_epoch)

    def pause(self) -> None:
        """Between two steps: write the checkpoint that is due; stop where time is over."""
        if self.checkpoint is None and self.deadline is None:
            return
        now = time.monotonic()
        late = self.deadline is not None and now > self.deadline and self.worked
        due = self.checkpoint is not None and (late or now - self.written > self.seconds)
        late, due = parallel.of_the_first([late, due])
        if due:
            method = self.task.method
            state = {
                "progress": vars(self.progress),
                "model": self.model.state_dict(),
                "method": method.state_dict() if method is not None else {},
                "optimizer": self.step.optimizer.state_dict(),
                "average": self.average.model.state_dict() if self.average else {},
            }
            if parallel.place() == 0:
                self.checkpoint(state)
            self.written = time.monotonic()
        if late:
            raise OutOfTime

    def start_phase(self) -> None:
        """Go on from the selected weights of the phase before, and let the method restructure."""
        model, progress, method = self.model, self.progress, self.task.method
        if progress.phase and self.task.recipe.next_start == "best":
            model.load_state_dict(progress.phase_best["weights"])
        progress.phase_best = None
        if not hasattr(method, "start_cycle"):
            return
        probe = self.probe()
        before = self.outputs(probe)
        with torch.no_grad():
            method.start_cycle(probe)
        progress.restarts.append({"phase": progress.phase} | self.jumps(before, probe))

    def after_epoch(self) -> None:
        """Let a method that changes the structure within a phase do so; once in an epoch, also if
        the run is stopped and goes on before the epoch is recorded."""
        method, progress = self.task.method, self.progress
        if not hasattr(method, "after_epoch") or progress.trained is not None:
            return
        if self.size is None:
            numbers = sum(parameter.numel() for parameter in self.model.parameters())
            flops, _ = training_flops(self.task, teacher=False)
            self.size = {"training_flops": flops, "training_parameters": numbers}
        progress.trained, probe = self.size, None
        if method.due:
            probe = self.probe()
            before = self.outputs(probe)
        with closing(self.inputs_as_in_training()) as inputs:
            method.after_epoch(inputs)
        if probe is not None:
            row = {"phase": progress.phase, "epoch": progress.epoch}
            progress.restarts.append(row | self.jumps(before, probe))
        if not self.step.fits:
            self.size = None
            known = self.step.optimizer.state
            self.prepare_step()
            state = self.step.optimizer.state
            state.update({p: known[p] for p in parameters_of(self.step.optimizer) if p in known})

    def probe(self) -> Tensor:
        """Training images, not augmented, on which a jump of the function is measured."""
        first = self.task.train[:PROBE_IMAGES]
        return self.normalise(next(loader.batches(self.images, [first], self.task.device)))

    @torch.no_grad()
    def outputs(self, probe: Tensor) -> tuple[Tensor, Tensor]:
        """The logits in eval and in train mode, without a trace in the network."""
        modes = {module: module.training for module in self.model.modules()}
        statistics = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            with parallel.apart():
                return self.model.eval()(probe), self.model.train()(probe)
        finally:
            for buffer, value in statistics:
                buffer.copy_(value)
            for module, training in modes.items():
                module.training = training

    def jumps(self, before: tuple[Tensor, Tensor], probe: Tensor) -> dict[str, float]:
        """How far the function has moved from what its outputs were."""
        after = self.outputs(probe)
        return {
            "jump_eval": relative_jump(before[0], after[0]),
            "jump_train": relative_jump(before[1], after[1]),
            "same_class": (before[0].argmax(1) == after[0].argmax(1)).double().mean().item(),
        }

    def prepare_step(self) -> None:
        """A fresh optimizer, and a fresh average. The compiled step goes on where only values have
        changed, as in RepAn's cycle; where modules or shapes have, it is built anew."""
        if self.task.recipe.ema:
            self.average = Average(self.model, self.task.recipe.ema)
        if self.step is not None and self.step.fits:
            if not self.task.recipe.carry_momentum:
                self.step.restart()
            return
        if self.step is not None and self.step.mode != "none":
            torch.compiler.reset()  # what was compiled for the old structure is of no use
        self.deployed = None
        task, recipe = self.task, self.task.recipe
        if task.optimizer is not None:
            optimizer = task.optimizer(task.groups())
        elif recipe.optimizer == "adamw":
            optimizer = adamw(task.groups(), betas=recipe.betas, epsilon=recipe.epsilon)
        else:
            optimizer = sgd(task.groups(), momentum=recipe.momentum, nesterov=recipe.nesterov)
        clipped = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if recipe.clip == "all" or group["weight_decay"]
        ]
        method = task.method
        self.step = Step(
            self.model,
            optimizer,
            self.objective,
            batch=min(recipe.batch_size, len(task.train)),
            clipped=clipped,
            clip_norm=recipe.clip_norm,
            after_backward=(lambda: None) if method is None else method.after_backward,
            accumulate=recipe.accumulate,
            variant=lambda: getattr(method, "holds", None),
            others=getattr(method, "tensors", ()),
            precision=recipe.precision,
            compile=task.compile,
            say=task.say,
        )

    def objective(self, images: Tensor, labels: Tensor, *drawn: Tensor) -> Tensor:
        """The loss of a batch of augmented uint8 images; drawn: the values of `self.names`."""
        rows = dict(zip(self.names, drawn, strict=True))
        if self.task.kind is not None:
            return self.task.kind.loss(self.model, images, labels, rows)
        x = self.normalise(images)
        classes = len(self.task.data.classes)
        x, targets = self.task.recipe.augmentation.mixed(x, labels, classes, rows)
        logits = self.model(x)
        # A loss is computed in float32 at least.
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        known = [rows[KNOWN]] if KNOWN in rows and len(images) == self.step.part else []
        return self.task.loss(logits, targets, x, *known)

    def train_epoch(self) -> None:
        """The rest of an epoch: one pass over the training images."""
        task, recipe, progress = self.task, self.task.recipe, self.progress
        self.model.train()
        phase = 0 if recipe.reseed_each_phase else progress.phase
        generator = torch.Generator().manual_seed(derive(task.seed, "order", phase, progress.epoch))
        names = ("network", phase, progress.epoch, parallel.place())
        own = derive(task.seed, *names[: 4 if parallel.place() else 3])  # of dropout and the like
        places = torch.randperm(len(task.train), generator=generator)[: self.images_per_epoch]
        order = task.train[places]
        images, drawn, boxes = self.drawn(order, generator)
        if task.known is not None:
            view = drawn["flip"].long() if "flip" in drawn else torch.zeros_like(places)
            drawn[KNOWN] = task.known[view.to(task.device), places.to(task.device)]
        self.names = tuple(drawn)
        sizes = [len(batch) for batch in order.split(recipe.batch_size)]
        shares = [self.step.share(size) for size in sizes][progress.batch :]
        starts = range(progress.batch * recipe.batch_size, len(order), recipe.batch_size)
        mine = [
            torch.arange(start + share.rows.start, start + share.rows.stop)
            for start, share in zip(starts, shares, strict=True)
        ]
        batches = self.augmented(images, order, drawn, boxes, mine)
        with closing(batches):
            for share, (x, y, *row) in zip(shares, batches, strict=True):
                torch.manual_seed(own + progress.batch)
                if recipe.schedule.rate_per == "step":
                    set_rate(self.step.optimizer, self.rate(progress.batch))
                loss = self.step(x, y, *row, share=share)
                if hasattr(task.method, "after_step"):
                    task.method.after_step()
                if self.average is not None:
                    self.average.update()
                progress.loss += loss * share.images
                progress.batch += 1
                self.worked = True
                self.pause()

    def augmented(
        self,
        images: Tensor | Folder,
        order: Tensor,
        drawn: dict[str, Tensor],
        boxes: Tensor | None,
        batches: Sequence[Tensor],
    ) -> Iterator[Sequence[Tensor]]:
        """(images, labels, rows of what was drawn) batch by batch, each given by its places in the
        order of the epoch; see `drawn`."""
        task = self.task
        if not batches:
            return
        augmentation = task.recipe.augmentation
        places, sizes = torch.cat(batches), [len(batch) for batch in batches]
        order = order[places]
        labels = self.labels[order.to(task.device)].split(sizes)
        rows = [v[places.to(v.device)].to(task.device).split(sizes) for v in drawn.values()]
        loaded = loader.batches(
            images,
            order.split(sizes),
            task.device,
            boxes if boxes is None else boxes[places],
            interpolation=augmentation.crop_interpolation,
            workers=task.decoders,
        )
        with closing(loaded):
            for x, y, *row in zip(loaded, labels, *rows, strict=True):
                yield augmentation.apply(x, dict(zip(drawn, row, strict=True))), y, *row

    def inputs_as_in_training(self) -> Iterator[Tensor]:
        """Batches that the network could have been given in this epoch, as many as are taken; of
        an order and an augmentation of their own."""
        task, progress, turn = self.task, self.progress, 0
        augmentation, classes = task.recipe.augmentation, len(task.data.classes)
        while True:
            names = ("inputs", progress.phase, progress.epoch, turn)
            generator = torch.Generator().manual_seed(derive(task.seed, *names))
            places = torch.randperm(len(task.train), generator=generator)[: self.images_per_epoch]
            order, turn = task.train[places], turn + 1
            images, drawn, boxes = self.drawn(order, generator)
            whole = torch.arange(len(order)).split(task.recipe.batch_size)
            with closing(self.augmented(images, order, drawn, boxes, whole)) as batches:
                for x, y, *row in batches:
                    rows = dict(zip(drawn, row, strict=True))
                    yield augmentation.mixed(self.normalise(x), y, classes, rows)[0]

    def drawn(
        self, order: Tensor, generator: torch.Generator
    ) -> tuple[Tensor | Folder, dict[str, Tensor], Tensor | None]:
        """The images of an epoch, what is drawn for each of them in the order of use, and the
        boxes that a folder crops where it reads."""
        images, augmentation = self.images, self.task.recipe.augmentation
        sides = images.shape[-2:]
        in_files = isinstance(images, Folder)
        if in_files and augmentation.resized_crop:
            images = replace(images, size=augmentation.resized_crop)
            sides = sides if images.sides is None else images.sides[order]
        drawn = augmentation.draw(len(order), generator, sides, self.task.data.in_channels)
        return images, drawn, drawn.pop("box", None) if in_files else None

    def record(self, rate: float) -> None:
        """Evaluate, log the epoch, and keep the weights where they are the best so far.

        rate: the learning rate with which the epoch began. With an average, it is what is
        evaluated and kept; a phase that starts from the "last" epoch starts from the network.

        By validation accuracy, the later of equals: with few images ties are common, and the later
        epoch has the smaller learning rate. By test accuracy, strictly better only, as RepAn.
        """
        task, progress = self.task, self.progress
        model = self.model.eval() if self.average is None else self.average.network()
        if self.deployed is None:
            self.deployed = deployed_copy(model)
        else:
            refill(self.deployed, model)  # with the current lambda

        due = task.kind is None or task.kind.due(progress.epoch, task.recipe.epochs)
        measure = accuracy if task.kind is None else task.kind.score

        def scored(split: Split, whole: int) -> float | None:
            if not (due and whole):
                return None
            if parallel.processes() == 1:
                return measure(self.deployed, split, self.pause)
            if task.kind is not None:
                return measure(self.deployed, split)
            count = right(self.deployed, split)  # without a pause: shares are not equally long
            parallel.add_up([count])
            return count.item() / whole

        sizes = len(task.data.test_labels), len(task.validation)
        test, validation = parallel.of_the_first(
            [
                scored(split, size)
                for split, size in zip((self.test, self.held_out), sizes, strict=True)
            ]
        )
        self.pause()
        loss = progress.loss.item() / self.images_per_epoch
        progress.history.append(
            {
                "phase": progress.phase,
                "epoch": progress.epoch,
                "learning_rate": float(f"{rate:.6g}"),
                "rate": getattr(task.method, "rate", None),
                "train_loss": float(f"{loss:.6g}"),
                f"validation_{task.metric}": validation,
                f"test_{task.metric}": test,
                **(progress.trained or {}),
                **task.observe(),
            }
        )
        self.worked = True
        test_selects = task.recipe.select == "test"
        last = float(len(progress.history))
        score = {"test": test, "validation": validation, "last": last}[task.recipe.select]
        entry = None
        for name in ("phase_best", "best"):
            best = getattr(progress, name)
            beats = float.__gt__ if test_selects else float.__ge__
            if best is None or beats(score, best["score"]):
                if entry is None:  # on its device: nothing waits for a copy
                    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
                    index = len(progress.history) - 1
                    entry = {"score": score, "index": index, "weights": weights}
                    entry["structure"] = dict(getattr(task.method, "structure", {}))
                setattr(progress, name, entry)


def check_shares(task: Task) -> None:
    """Raises: UserError where processes cannot share a batch."""
    accumulate, count = task.recipe.accumulate, parallel.processes()
    if not parallel.splits(accumulate):
        if accumulate % count:
            raise UserError(
                f"accumulate (={accumulate}) must be a multiple of {count}, the number of "
                "processes, each of which takes parts of a batch; or 1: then they share it, and "
                "norms see all of it."
            )
        return
    augmentation = task.recipe.augmentation
    for asked, with_what, why in (
        (augmentation.mixup or augmentation.cutmix, "mixup or cutmix", "images are mixed"),
        # And images of many sizes are padded to the largest.
        (task.kind is not None, "transfer", "losses are means over pixels or boxes"),
    ):
        if asked:
            raise UserError(
                f"accumulate (=1) with {with_what} is for one process, here are {count}: {why} "
                f"within a part, so say accumulate={count} or a multiple."
            )
    norms = [m for m in task.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not all(isinstance(norm, parallel.Synchronised) for norm in norms):
        raise ValueError("a batch that processes share needs a model of parallel.synchronised().")


def training_flops(task: Task, teacher: bool = True) -> tuple[int, int]:
    """(student, teacher) floating-point operations of one training image, forward and backward.

    teacher: whether the loss is asked for those, which otherwise are 0.

    Counted by torch's FlopCounterMode on one batch of images of the size that is trained on:
    convolutions and matrix products, two per multiply-add. Norms and activations are not counted.
    """
    parts = task.recipe.accumulate
    parts *= parallel.processes() if parallel.splits(parts) else 1
    n = min(-(-task.recipe.batch_size // parts), len(task.train))
    crop = task.recipe.augmentation.resized_crop
    if task.kind is not None:
        twin = copy.deepcopy(task.model)
        with parallel.apart():
            return task.kind.training_flops(twin, n, task.train, crop, task.device), 0
    model = copy.deepcopy(task.model).to(task.device).train()
    normalise = Normalise(task.data, task.device, next(model.parameters()).dtype)
    x = normalise(next(loader.batches(task.data.train_images, [task.train[:n]], task.device)))
    x = F.interpolate(x, (crop, crop)) if crop else x  # what it shows is not counted
    y = task.data.train_labels[task.train[:n]].to(task.device)
    with parallel.apart(), FlopCounterMode(display=False) as student:
        F.cross_entropy(model(x), y).backward()
    if not teacher:
        return student.get_total_flops() // n, 0
    with parallel.apart():
        logits = model(x).detach().requires_grad_()
    with FlopCounterMode(display=False) as asked:
        task.loss(logits, y, x)
    return student.get_total_flops() // n, asked.get_total_flops() // n
