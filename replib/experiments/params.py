"""Parameters: what a cell (one training run) is, and what a table of cells is.

A table is a YAML file: recipes are named groups of cell parameters, a row names the recipes it
uses and the rows it starts from, and `seeds` makes every row into one cell per seed. `variants`
repeat all rows on other networks. A profile may `extends: OTHER.yaml` and state only what differs.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    create_model,
    model_validator,
)
from torch import nn

from replib.blocks import BLOCKS
from replib.errors import UserError
from replib.foreign import text_of
from replib.methods import repoptimizers
from replib.methods.cycle import FREEZE, RATE_SCHEDULES, RESTRUCTURE, Cycle
from replib.methods.dyrep import CHOICES, FIDELITIES, SLOPE, DyRep
from replib.methods.resrep import DROPS, FORMS, RULES, THRESHOLD
from replib.models import BODIES, build
from replib.narrowing import spans
from replib.quantization import WEIGHTS
from replib.training.augmentation import Augmentation
from replib.training.data import DATA
from replib.training.evaluation import VIEWS
from replib.training.optimisation import DECAY, RATE_PER, SCHEDULES, Schedule
from replib.training.step import OPTIMIZERS, PRECISIONS
from replib.transfer import HEADS, METRICS, POOLING
from replib.transfer.data import SCENES
from replib.transfer.tasks import Scene

LARGEST = 1024  # option of a block or a body: branches, layers, pixels, channels
Positive = Annotated[int, Field(ge=1, le=10**6)]
Count = Annotated[int, Field(ge=0, le=2**31)]
Pixels = Annotated[int, Field(ge=0, le=100)]
Rate = Annotated[float, Field(ge=0, le=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Above = Annotated[float, Field(gt=0, le=100)]
Channels = Annotated[list[float], Field(min_length=1, max_length=3)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
Data, Body = Literal[(*DATA, *SCENES)], Literal[tuple(BODIES)]
Restructure, Freeze = Literal[tuple(RESTRUCTURE)], Literal[tuple(FREEZE)]
RateSchedule, View = Literal[tuple(RATE_SCHEDULES)], Literal[tuple(VIEWS)]


def known_block(name: str) -> str:
    """Asked when a cell is made: families of one's own come later (replib.blocks.own)."""
    if name not in BLOCKS:
        raise ValueError(
            f"must be one of {', '.join(map(repr, BLOCKS))}, or of your own: --blocks FILE.py"
        )
    return name


Block = Annotated[str, AfterValidator(known_block)]


class Strict(BaseModel):
    """No unknown keys, no silent conversion, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def check_options(key: str, given: dict[str, Any] | None) -> None:
    """Raises: ValueError for options of a block or a body that are no plain values, or so large
    that the network could not be built in a lifetime."""
    for name, value in (given or {}).items():
        several = isinstance(value, list)
        for one in value if several else [value]:
            known = isinstance(one, bool | int | float | str)
            if not known or (isinstance(one, float) and not math.isfinite(one)):
                raise ValueError(
                    f"{key}.{name} (={short(value)}) must be a finite number, a text, true or "
                    "false, or a list of these"
                )
            size = len(one) if isinstance(one, str) else abs(one)
            if size > LARGEST or (several and len(value) > 64):
                raise ValueError(
                    f"{key}.{name} (={short(value)}) must be at most {LARGEST}, or a list of at "
                    "most 64 such values"
                )


class CycleParams(Strict):
    """RepAn's cycle (replib.methods.cycle.Cycle)."""

    warmup: Positive  # epochs of the lambda ramp and of the freezing, W
    fidelity: Literal["official", "preserving"] = "official"
    restructure: Restructure = "cycle"
    rate_schedule: RateSchedule | None = None  # None: the fidelity's own
    freeze: Freeze = "none"
    norm: Literal["keep", "unit", "reset", "match"] | None = None
    reseed: bool = False  # every cycle repeats the same order and the same redraw, as released
    blocks: Annotated[list[str], Field(min_length=1)] | None = None  # names, patterns; None: all
    calibrate: bool = False  # measure running statistics anew after the restore


class DyRepParams(Strict):
    """Branches that grow and are cut in training (replib.methods.dyrep.DyRep)."""

    interval: Positive  # epochs between adjustments
    last_epoch: Positive  # from this epoch on, the structure stays
    score: Literal[CHOICES] = "synflow"
    fidelity: Literal[tuple(FIDELITIES)] = "official"
    cut: bool = True  # whether weak branches are cut
    slope: Annotated[float, Field(gt=0, le=1)] = SLOPE  # of the last norm of a new branch
    calibration_batches: Annotated[int, Field(ge=0, le=10**4)] = 20  # for the norms of a new block
    recalibration_batches: Annotated[int, Field(ge=0, le=10**4)] = 0  # all norms, other epochs


class RepOptParams(Strict):
    """A network without branches, trained as if it had some (replib.methods.repoptimizers)."""

    constants: Literal[tuple(repoptimizers.CONSTANTS)] = "searched"
    initialise: bool = True  # its kernels begin as the branches would merge to
    multiply: bool = True  # its gradients are multiplied by what the scales make of them
    identity: Literal[tuple(repoptimizers.IDENTITY)] = "scale"  # what is on the diagonal at first
    signed: bool = False  # AdamW: by the scales themselves, as released, not by their size


class ResRepParams(Strict):
    """Channels that are pruned in training (replib.methods.resrep.ResRep); the last epoch counts,
    and the deployed network is the pruned one."""

    target: Annotated[float, Field(gt=0, lt=1)]  # share of the deployed network's FLOPs to be left
    targets: Annotated[list[str], Field(min_length=1)] | None = None  # names, patterns
    strength: Annotated[float, Field(gt=0, le=1)] = 1e-4  # of the lasso
    warmup: Annotated[int, Field(ge=0, le=10**6)] = 5  # epochs before the first mask
    interval: Positive = 200  # steps from one mask to the next
    rows: Positive = 4  # how many more channels each may take
    form: Literal[tuple(FORMS)] = "matrix"
    reset: bool = True  # whether masked rows lose the gradient of the task
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99  # of the compactors
    drop: Literal[tuple(DROPS)] = "zero"  # what is pruned in the end
    threshold: Annotated[float, Field(gt=0, le=1)] = THRESHOLD  # below it a row is zero
    measure: Positive = 5  # epochs from one test of the network as it would be pruned to the next


class NarrowParams(Strict):
    """A network that is narrower from its first epoch on (replib.methods.resrep.shrunk)."""

    target: Annotated[float, Field(gt=0, lt=1)]  # share of the deployed network's FLOPs to be left
    rule: Literal[tuple(RULES)]
    targets: Annotated[list[str], Field(min_length=1)] | None = None  # names, patterns


class TransferParams(Strict):
    """Detection or segmentation with the body as a backbone (replib.transfer)."""

    head: Literal[tuple(HEADS)]
    channels: Positive | None = None  # of its maps; None: as its paper has them
    anchor: Annotated[int, Field(ge=2, le=512)] = 32  # the smallest, in pixels of a side
    # Boxes of an image that Faster R-CNN looks into, a quarter of which it is trained on; None:
    # torchvision's numbers (2000, 1000 in evaluation, 512).
    proposals: Annotated[int, Field(ge=4, le=10**4)] | None = None
    output_stride: Literal[8, 16, 32] = 32  # of segmentation: blocks are dilated below 32
    dilated_blocks: Positive | None = None  # only the last ones; None: all that it takes
    auxiliary: Fraction = 0.0  # weight of the loss of a second head, of segmentation
    fused: bool = False  # the backbone is trained as it is deployed, not as blocks
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0  # the stem and those after it stay
    fixed_norms: bool = False  # running statistics of the backbone stay
    stem_rate: Rate = 1.0  # factor on the learning rate of the backbone's stem
    head_rate: Rate = 1.0  # and of all that is not backbone
    # Height and width that are cropped after scaling by a factor of `zoom`; None: whole images.
    crop: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    zoom: Annotated[list[Above], Field(min_length=2, max_length=2)] = [1.0, 1.0]
    interval: Positive = 1  # epochs from one evaluation to the next; the last one always is

    @property
    def task(self) -> str:
        return HEADS[self.head]


class QuantizedParams(Strict):
    """A deployed network that is trained to compute in 8 bits (replib.quantization); from a parent,
    whose blocks are merged first."""

    weights: Literal[WEIGHTS] = "tensor"  # what has one scale
    images: Positive = 1024  # of the training images, on which ranges begin


class DistillParams(Strict):
    """RepAn's distillation loss (replib.methods.distill)."""

    alpha: Fraction  # weight of the teacher
    temperature: Annotated[float, Field(gt=0, le=1000)]


class Cell(Strict):
    """One training run. Everything that its result depends on, besides the data themselves."""

    data: Data
    data_dir: str | None = None  # where the data lie: not part of the key, their digest is
    # Pixels of a side, after the centre crop of testing; of the digits, a multiple of 8. Of images
    # with boxes, which are not cropped, the most that the longer side is.
    image_size: Positive | None = None
    image_resize: Positive | None = None  # the shorter side before that crop (224 of 256, say)
    classes: Positive | None = None  # of an image folder: the first ones by name; None: all
    train_images: Positive | None = None  # drawn anew for every seed; None: all
    split_seed: Count | None = None  # draws the same training and held-out images for every seed
    held_out: Count = 0  # of these, images that select the checkpoint (clean protocol)
    protocol: Literal["clean", "paper"] = "clean"
    views: list[View] = []  # of the test images, on which the deployed network is tested too
    # Pixels of a side to which test images are enlarged, on which the effective receptive field of
    # the deployed network is measured (replib.analysis.receptive_field); None: it is not.
    receptive_field: Annotated[int, Field(ge=8, le=10**4)] | None = None
    seed: Count
    body: Body
    block: Block = "repvgg"
    block_options: dict[str, Any] | None = None  # of the family, for every block of the network
    plain_sizes: Annotated[list[Positive], Field(min_length=1)] | None = (
        None  # of kernels: no block
    )
    width: Annotated[float, Field(gt=0, le=16)] = 1.0  # multiplies all widths of the body
    body_options: dict[str, Any] | None = None  # of the body itself (replib.models.options_of)
    phases: Positive = 1
    epochs: Positive  # of one phase
    batch_size: Positive = 128
    drop_last: bool = False  # an epoch leaves out the images that fill no whole batch
    accumulate: Positive = 1  # parts of a batch, one after the other; norms see one part
    # The learning rate (replib.training.optimisation.Schedule): anew in every phase.
    learning_rate: Rate
    learning_rate_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # phase k: to the power k
    schedule: Literal[tuple(SCHEDULES)] = "cosine"
    rate_per: Literal[RATE_PER] = "epoch"
    minimum_rate: Rate = 0.0
    milestones: list[Positive] = []
    milestone_factor: Fraction = 0.1
    warmup_epochs: Count = 0
    warmup_steps: Count = 0
    warmup_rate: Rate = 0.0
    warmup_per: Literal[RATE_PER] | None = None
    warmup_counts: bool = True
    late_steps: Count = 0
    optimizer: Literal[OPTIMIZERS] = "sgd"
    momentum: Fraction = 0.0
    nesterov: bool = False
    betas: Pair = [0.9, 0.999]  # of AdamW, as epsilon
    epsilon: Rate = 1e-8
    carry_momentum: bool = False  # a phase goes on with what the optimizer has gathered
    weight_decay: Rate = 0.0
    decay: Literal[tuple(DECAY)] = "all"
    bias_rate: Rate = 1.0  # factor on the learning rate of biases
    # Decay of the average of the weights that is evaluated and kept in their place; 0: none.
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    clip: Literal["all", "decayed"] = "all"
    precision: Literal[tuple(PRECISIONS)] = "float32"  # of training; evaluation is in float32
    # Augmentation (replib.training.augmentation says what each of them does).
    crop_padding: Pixels = 0
    flip: bool = False
    resized_crop: Annotated[int, Field(ge=0, le=10**4)] = 0
    crop_area: Pair = [0.08, 1.0]
    crop_ratio: Pair = [3 / 4, 4 / 3]
    crop_interpolation: str = "bilinear"
    policy: str = ""
    policy_interpolation: str = "nearest"
    fill: Annotated[list[int], Field(min_length=1, max_length=3)] = [0]
    brightness: Rate = 0.0
    contrast: Rate = 0.0
    saturation: Rate = 0.0
    hue: Fraction = 0.0
    lighting: Rate = 0.0
    erasing: Fraction = 0.0
    cutout: Annotated[int, Field(ge=0, le=10**4)] = 0
    mixup: Rate = 0.0
    cutmix: Rate = 0.0
    mix_each: bool = False
    label_smoothing: Fraction = 0.0
    next_start: Literal["best", "last"] = "best"
    # "fan_out": kernels of convolutions normal by their fan-out, as in DyRep's released networks.
    initialisation: Literal["family", "fan_out"] = "family"
    cycle: CycleParams | None = None
    dyrep: DyRepParams | None = None
    resrep: ResRepParams | None = None
    narrow: NarrowParams | None = None
    distill: DistillParams | None = None
    transfer: TransferParams | None = None  # None: classes of images
    quantized: QuantizedParams | None = None
    search: bool = False  # a search for RepOptimizers: the mean of every scale is logged
    repopt: RepOptParams | None = None
    scales: str | None = None  # key of the cell that searched for them, or path of a file
    start: str | None = None  # key of a parent cell, or path of a checkpoint
    teacher: str | None = None  # key of a parent cell, or "NAME:DIGEST" of one from outside
    # What the teacher's inputs are standardised by; None: as it says itself, else as the data.
    teacher_mean: Channels | None = None
    teacher_deviation: Annotated[list[Above], Field(min_length=1, max_length=3)] | None = None

    @model_validator(mode="after")
    def consistent(self):
        """Rules between keys."""
        boxed = [name for name, task in SCENES.items() if task == "detection"]
        for name in ("image_size", "image_resize", "classes"):
            allowed = ("imagefolder",) if name == "classes" else ("imagefolder", *boxed)
            allowed += ("digits",) if name == "image_size" else ()
            if getattr(self, name) is not None and self.data not in allowed:
                raise ValueError(
                    f"{name} (={getattr(self, name)}) is for data={' or '.join(allowed)} only"
                )
        try:
            self.augmentation()
            self.rate_schedule()
        except UserError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        self.optimisation_is_consistent()
        if (self.distill is None) != (self.teacher is None):
            raise ValueError("distill and teacher must be given together")
        for key in ("block_options", "body_options"):
            check_options(key, getattr(self, key))
        mean, deviation = self.teacher_mean, self.teacher_deviation
        if (mean is None) != (deviation is None) or len(mean or ()) != len(deviation or ()):
            raise ValueError(
                f"teacher_mean (={mean}) and teacher_deviation (={deviation}) must be given "
                "together, a number for each channel"
            )
        if mean is not None and self.teacher is None:
            raise ValueError(f"teacher_mean (={mean}) needs a teacher")
        if self.cycle is not None and self.cycle.freeze != "none":
            if self.cycle.warmup >= self.epochs:
                raise ValueError(
                    f"cycle.warmup (={self.cycle.warmup}) with freeze={self.cycle.freeze} must be "
                    f"below epochs (={self.epochs}): the main branch would never train"
                )
        if self.dyrep is not None:
            self.growth_is_consistent()
        self.scales_are_consistent()
        self.pruning_is_consistent()
        self.transfer_is_consistent()
        self.rounding_is_consistent()
        return self

    def transfer_is_consistent(self) -> None:
        """Rules between transfer and the other keys. Raises: ValueError."""
        given, task = self.transfer, SCENES.get(self.data)
        if given is None:
            if task is not None:
                raise ValueError(f"data (={self.data}) needs transfer: what is to be found in it")
            return
        if given.task != task:
            fitting = ", ".join(name for name, one in SCENES.items() if one == given.task)
            raise ValueError(
                f"data (={self.data}) with transfer.head={given.head} must be one of {fitting}"
            )
        others = ("cycle", "dyrep", "resrep", "narrow", "quantized", "distill", "repopt")
        others = (*others, "receptive_field")
        for name in (name for name in others if getattr(self, name) is not None):
            raise ValueError(f"{name} and transfer exclude each other: leave one of them out")
        known = {field.name for field in fields(Augmentation)} - {"flip", "crop_interpolation"}
        for name in sorted(known | {"phases", "search", "views"}):
            if (value := getattr(self, name)) != (default := Cell.model_fields[name].default):
                raise ValueError(f"{name} (={value}) with transfer must be (={default})")
        segments = given.task == "segmentation"
        only = {
            "anchor": not segments,
            "proposals": given.head == "faster_rcnn",
            "output_stride": segments,
            "dilated_blocks": segments,
            "auxiliary": segments,
            "crop": segments,
            "zoom": given.crop is not None,
        }
        for name in (name for name, may in only.items() if not may):
            if (value := getattr(given, name)) != TransferParams.model_fields[name].default:
                need = "crop" if name == "zoom" and segments else "another head"
                raise ValueError(f"transfer.{name} (={value}) needs {need} (={given.head} here)")
        if given.dilated_blocks is not None and given.output_stride == 32:
            raise ValueError(
                f"transfer.dilated_blocks (={given.dilated_blocks}) needs transfer.output_stride "
                "below 32: nothing is dilated"
            )
        if given.fused and self.start is None:
            raise ValueError(
                "transfer.fused (=true) needs start: a backbone that has been trained as blocks"
            )
        if given.zoom[0] > given.zoom[1]:
            raise ValueError(f"transfer.zoom (={given.zoom}) must be (least, most)")
        if given.head in POOLING and not (self.drop_last and self.batch_size > self.accumulate):
            raise ValueError(
                f"transfer.head (={given.head}) has a norm over one value an image: it needs "
                "drop_last=true and at least 2 images in every part of a batch"
            )
        if given.interval > 1 and self.protocol == "clean":
            raise ValueError(
                f"transfer.interval (={given.interval}) must be 1 with protocol=clean: every epoch "
                "may be the one that is selected"
            )

    @property
    def metric(self) -> str:
        """What its scores are called."""
        return "accuracy" if self.transfer is None else METRICS[self.transfer.task]

    def rounding_is_consistent(self) -> None:
        """Rules between quantized and the other keys. Raises: ValueError."""
        if self.quantized is None:
            return
        if self.start is None:
            raise ValueError("quantized needs start: the trained network that is merged")
        for other in ("cycle", "dyrep", "resrep", "narrow", "repopt"):
            if getattr(self, other) is not None:
                raise ValueError(f"{other} and quantized exclude each other: leave one of them out")
        # An average has no ranges of its own, parts of a batch would each move them.
        for name in ("ema", "accumulate", "search"):
            value, default = getattr(self, name), Cell.model_fields[name].default
            if value != default:
                raise ValueError(f"{name} (={value}) with quantized must be (={default})")
        if self.decay not in WITHOUT_KINDS:
            raise ValueError(
                f"decay (={self.decay}) with quantized must be one of {', '.join(WITHOUT_KINDS)}: "
                "a graph does not know the kinds of its layers"
            )

    def pruning_is_consistent(self) -> None:
        """Rules between resrep, narrow and the other keys. Raises: ValueError."""
        asked = [name for name in ("resrep", "narrow") if getattr(self, name) is not None]
        if not asked:
            return
        for other in ("resrep", "narrow", "cycle", "dyrep", "repopt"):
            if other != asked[0] and getattr(self, other) is not None:
                raise ValueError(
                    f"{other} and {asked[0]} exclude each other: leave one of them out"
                )
        if self.resrep is None:
            return
        wrong = {
            "phases": self.phases > 1,
            "ema": self.ema > 0,
            "optimizer": self.optimizer != "sgd",
        }
        for name in (name for name, found in wrong.items() if found):
            default = Cell.model_fields[name].default
            raise ValueError(f"{name} (={getattr(self, name)}) with resrep must be (={default})")
        if self.resrep.warmup >= self.epochs:
            raise ValueError(
                f"resrep.warmup (={self.resrep.warmup}) must be below epochs (={self.epochs}): no "
                "mask would ever be chosen"
            )

    def scales_are_consistent(self) -> None:
        """Rules between repopt and the other keys. Raises: ValueError."""
        if self.repopt is None:
            if self.scales is not None:
                raise ValueError(f"scales (={short(self.scales)}) needs repopt: what they are for")
            return
        constants = self.repopt.constants
        if (self.scales is None) == (constants in ("searched", "mean")):
            need = "needs scales: a row that searches" if self.scales is None else "takes no scales"
            raise ValueError(f"repopt.constants (={constants}) {need}")
        if not (self.repopt.initialise or self.repopt.multiply):
            raise ValueError(
                "repopt must have initialise or multiply at true, or be left out: the network "
                "would be trained as any other"
            )
        if self.repopt.signed and (self.optimizer != "adamw" or not self.repopt.multiply):
            raise ValueError("repopt.signed (=true) is for optimizer=adamw with repopt.multiply")
        if self.block != "convbn":
            raise ValueError(f"block (={self.block}) with repopt must be convbn: without branches")
        wrong = {"cycle": self.cycle is not None, "dyrep": self.dyrep is not None}
        wrong |= {"start": self.start is not None and self.repopt.initialise}
        for name in (name for name, found in wrong.items() if found):
            raise ValueError(f"{name} and repopt exclude each other: leave one of them out")
        if self.clip_norm is not None:
            raise ValueError(
                f"clip_norm (={self.clip_norm}) with repopt must be null: the norm of its "
                "gradients is not that of the branches"
            )

    def growth_is_consistent(self) -> None:
        """Rules between dyrep and the other keys. Raises: ValueError."""
        wrong = {
            "phases": self.phases > 1,
            "ema": self.ema > 0,
        }
        for name in (name for name, found in wrong.items() if found):
            default = Cell.model_fields[name].default
            raise ValueError(
                f"{name} (={getattr(self, name)}) with dyrep must be (={default}): its structure "
                "changes within one phase"
            )
        if self.cycle is not None:
            raise ValueError("cycle and dyrep exclude each other: leave one of them out")
        first, last = self.dyrep.interval, self.dyrep.last_epoch
        if not first <= last < self.epochs:
            raise ValueError(
                f"dyrep.last_epoch (={last}) must be at least dyrep.interval (={first}), so that "
                f"something grows, and below epochs (={self.epochs}), so that it trains"
            )

    def optimisation_is_consistent(self) -> None:
        """Rules between the keys of optimisation. Raises: ValueError."""
        adamw = self.optimizer == "adamw"
        for name in ("momentum", "nesterov") if adamw else ("betas", "epsilon"):
            value, default = getattr(self, name), Cell.model_fields[name].default
            if value != default:
                other = "sgd (adamw has betas)" if adamw else "adamw"
                raise ValueError(
                    f"{name} (={value}) is for optimizer={other}: leave it at (={default})"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas (={self.betas}) must both be at least 0 and below 1")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov (=true) needs momentum above 0")
        if self.carry_momentum and self.phases == 1:
            raise ValueError("carry_momentum (=true) needs phases above 1: from one to the next")
        if self.carry_momentum and not (self.momentum or adamw):
            raise ValueError("carry_momentum (=true) needs momentum above 0, or optimizer=adamw")
        if self.learning_rate_decay != 1 and self.phases == 1:
            raise ValueError(
                f"learning_rate_decay (={self.learning_rate_decay}) needs phases above 1: it acts "
                "from one to the next (within a phase, say schedule)"
            )
        least = self.learning_rate * self.learning_rate_decay ** (self.phases - 1)
        for name in ("minimum_rate", "warmup_rate"):
            if (value := getattr(self, name)) > least:
                raise ValueError(
                    f"{name} (={value}) must be at most the learning rate of the last phase "
                    f"(={least:g})"
                )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs (={self.warmup_epochs}) must be below epochs (={self.epochs}), "
                "those of one phase"
            )
        if self.milestones and self.milestones[-1] >= self.epochs:
            raise ValueError(
                f"milestones (={self.milestones}) must be below epochs (={self.epochs}), those of "
                "one phase"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate (={self.accumulate}) must divide batch_size (={self.batch_size})"
            )

    def rate_schedule(self) -> Schedule:
        """Its learning rate over a phase. Raises: UserError where keys do not agree."""
        values = {field.name: getattr(self, field.name) for field in fields(Schedule)}
        return Schedule(**values | {"milestones": tuple(self.milestones)})

    def augmentation(self) -> Augmentation | Scene:
        """What is done to its training images. Raises: UserError where keys do not agree."""
        if (scene := self.transfer) is not None:
            crop = None if scene.crop is None else tuple(scene.crop)
            return Scene(self.flip, crop, tuple(scene.zoom), self.crop_interpolation)
        values = {field.name: getattr(self, field.name) for field in fields(Augmentation)}
        return Augmentation(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )

    @property
    def network(self) -> tuple:
        """(body, block, width, options of the block, sizes without a block, options of the body),
        as `built` takes it; hashable."""
        options = (getattr(self, name) for name in OPTIONS)
        return network_of(self.body, self.block, self.width, *options)

    @property
    def in_key(self) -> dict[str, Any]:
        """The parameters that its key is made of. Keys that were added since the first evidence
        enter it only where they are set, so that the key of no older cell changes."""
        return {name: value for name, value in stated(self).items() if name != "data_dir"}


def network_of(
    body: str,
    block: str,
    width: float,
    block_options: dict | None,
    plain_sizes: list | None,
    body_options: dict | None,
) -> tuple:
    """What `Cell.network` is made of."""
    of_block, of_body = (
        tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in (given or {}).items()))
        for given in (block_options, body_options)
    )
    return body, block, width, of_block, tuple(plain_sizes or ()), of_body


def stated(params: Strict, prefix: str = "") -> dict[str, Any]:
    """Parameters as plain data, without those of `ADDED` that are at their default."""
    fields = type(params).model_fields
    return {
        name: stated(value, f"{prefix}{name}.") if isinstance(value, Strict) else value
        for name, value in params
        if prefix + name not in ADDED or value != fields[name].default
    }


# Keys that cells did not have at first. A new key goes here, with a default that changes nothing.
ADDED = {
    "cycle.blocks", "cycle.calibrate", "width", "image_resize", "classes",
    "precision", "resized_crop", "crop_area", "crop_ratio", "crop_interpolation", "policy",
    "policy_interpolation", "fill", "brightness", "contrast", "saturation", "hue", "lighting",
    "erasing", "cutout", "mixup", "cutmix", "mix_each", "label_smoothing",
    "drop_last", "accumulate", "learning_rate_decay", "schedule", "rate_per", "minimum_rate",
    "milestones", "milestone_factor", "warmup_epochs", "warmup_steps", "warmup_rate", "warmup_per",
    "warmup_counts", "late_steps", "optimizer", "betas", "epsilon", "carry_momentum", "bias_rate",
    "ema", "teacher_mean", "teacher_deviation", "block_options", "plain_sizes",
    "initialisation", "dyrep", "resrep", "narrow", "search", "repopt", "scales",
    "views", "body_options", "receptive_field", "split_seed", "transfer", "quantized",
}  # fmt: skip


# Rules of `decay` that ask for no more than the shape of a parameter.
WITHOUT_KINDS = ("all", "matrices", "matrices_and_identity")


def fragment(model: type[Strict]) -> type[Strict]:
    """The same keys, types and ranges, none of them required: what a recipe may state."""
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        optional, kind = copy.copy(info), info.annotation
        optional.default = None
        for nested in (
            CycleParams,
            DyRepParams,
            ResRepParams,
            NarrowParams,
            DistillParams,
            TransferParams,
            QuantizedParams,
            RepOptParams,
        ):
            if kind == nested | None:
                kind = fragment(nested) | None
        if name not in GIVEN:
            fields[name] = (kind, optional)
    return create_model(model.__name__, __base__=Strict, **fields)


OPTIONS = ("block_options", "plain_sizes", "body_options")  # of the network
GIVEN = ("seed", "start", "teacher", "scales")  # of a cell: from `seeds` and the row, nowhere else
Fragment = fragment(Cell)
KEY = re.compile(r"[0-9a-f]{16}([0-9a-f]{48})?")  # of a cell, whole or as files are named


def could_be_row(text: str) -> bool:
    """Whether a parent that no row has is a slip of the pen, not a key or a path."""
    return text.isidentifier() and not KEY.fullmatch(text)


# What the catalogue can have for a row. Accuracy in percent, gain in points, parameters in
# millions (of the deployed network), multiply-adds in billions.
QUANTITIES = ("accuracy", "gain", "training_parameters", "parameters", "flops")


class Paper(Strict):
    """The row of a paper's table that a row of ours stands for, and which of its columns says what.

    `PAPER/ITEM/ROW/COLUMN` alone names the accuracy. replib.report.catalogue looks numbers up.
    """

    row: str  # PAPER/ITEM/ROW
    accuracy: str | None = None  # columns
    gain: str | None = None
    training_parameters: str | None = None
    parameters: str | None = None
    flops: str | None = None
    views: dict[View, str] = {}  # accuracies on views of the test images

    @model_validator(mode="before")
    @classmethod
    def short_form(cls, given: Any) -> Any:
        """One cell, as text."""
        if not isinstance(given, str):
            return given
        row, _, column = given.rpartition("/")
        return {"row": row, "accuracy": column}


class Row(Strict):
    """One row of a table: the recipes it uses, and its parents, by the names of rows."""

    label: str
    use: list[str] = []
    set: dict[str, Any] = {}  # cell parameters of this row alone
    start: str | None = None  # a row, the key of a finished cell, or the path of a checkpoint
    teacher: str | None = None  # a row, a key, or what replib.experiments.teachers opens
    scales: str | None = None  # of RepOptimizers: a row or a key that searched, or a file
    against: str | None = None  # the row that its gain is taken over
    as_long_as: str | None = None  # one phase with as many epochs as that row, parents included
    paper: Paper | None = None  # where the catalogue has the paper's numbers for it
    # What is measured of it (a name that its measurement knows) -> PAPER/ITEM/ROW of the catalogue.
    measured: dict[str, str] = {}
    hidden: bool = False  # trained for others (a teacher, a parent), not a row on the page
    variant: str | None = None  # the variant that it belongs to


class Variant(Strict):
    """All rows of a table once more, on another network: what is different there."""

    label: str
    cell: dict[str, Any] = {}
    recipes: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, Any] | None] = {}  # null leaves a row out


class Variants(Strict):
    variants: Annotated[dict[str, Variant], Field(min_length=1)]


class Claim(Strict):
    """What was claimed, where, and how sure we are that it was."""

    text: str
    source: str
    confidence: Literal["read", "recalled", "unknown"]


class Network(Strict):
    """A network in its full size, which is counted and not trained."""

    body: Body
    block: Block = "convbn"
    block_options: dict[str, Any] | None = None
    body_options: dict[str, Any] | None = None
    image_size: Positive  # FLOPs are those of an image of so many pixels a side
    classes: Positive = 1000

    @model_validator(mode="after")
    def options_are_plain(self):
        """As of a cell."""
        for key in ("block_options", "body_options"):
            check_options(key, getattr(self, key))
        return self

    @property
    def network(self) -> tuple:
        """As `Cell.network`."""
        return network_of(self.body, self.block, 1.0, self.block_options, (), self.body_options)


class Counted(Network):
    """One of them as a row of a table."""

    label: str
    paper: Paper | None = None  # where the catalogue has the paper's numbers for it


# How trained networks can be measured (replib.experiments.measurements): no part of any cell.
MEASURES = (
    "similarity",
    "norm_slopes",
    "magnitudes",
    "sparsity",
    "conversion",
    "quantization",
)


class Table(Strict):
    """One table of one profile."""

    title: str
    question: str
    method: str = ""  # what is compared and what to look at, in Markdown; for the table's page
    claims: list[Claim] = []
    notes: list[str] = []
    proxy: str | None = None  # why no result of this profile says anything about the paper's
    control: str  # the row that gains are taken over by default
    controls: dict[str, str] = {}  # and those of its variants
    variants: dict[str, Variant] | None = None
    seeds: Annotated[list[Count], Field(min_length=1, max_length=1000)]
    cell: dict[str, Any]
    recipes: dict[str, dict[str, Any]] = {}
    rows: Annotated[dict[str, Row], Field(min_length=1, max_length=200)]
    networks: dict[str, Counted] = {}  # the paper's own, counted beside the rows that are trained
    measure: Literal[MEASURES] | None = None  # what the rows' weights are asked once they are there
    _totals: dict[str, int] = PrivateAttr(default_factory=dict)  # asked again by every row above

    @model_validator(mode="after")
    def names_exist(self):
        """Every row and recipe that is named is there."""
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds (={self.seeds}) must differ from each other")
        for kind, names in (("row", self.rows), ("recipe", self.recipes)):
            for name in names:
                if not name.isidentifier():
                    raise ValueError(f"{kind}s.{name}: the name of a {kind} must be one plain word")
        for name, row in self.rows.items():
            for recipe in row.use:
                if recipe not in self.recipes:
                    raise ValueError(
                        f"rows.{name}.use: no recipe {recipe!r}; there are "
                        f"{', '.join(self.recipes)}"
                    )
            for key in ("teacher", "scales", "against", "as_long_as"):
                other = getattr(row, key)
                parent = key in ("teacher", "scales")
                outside = parent and other is not None and not could_be_row(other)
                if other is not None and other not in self.rows and not outside:
                    raise ValueError(
                        f"rows.{name}.{key}: no row {getattr(row, key)!r}; there are "
                        f"{', '.join(self.rows)}"
                    )
        for control in (self.control, *self.controls.values()):
            if control not in self.rows:
                raise ValueError(f"control: no row {control!r}; there are {', '.join(self.rows)}")
        compared = {row.against for row in self.rows.values() if row.against}
        for name in {self.control, *self.controls.values(), *compared}:
            if self.rows[name].hidden:
                raise ValueError(f"rows.{name} is hidden: gains cannot be taken over it")
        for name in self.rows:
            self.ancestors(name)
        return self

    def ancestors(self, name: str) -> list[str]:
        """The rows that a row needs first, nearest last; refuses a circle."""
        order: list[str] = []
        done: set[str] = set()  # a row that many others need is looked at once

        def visit(row: str, path: tuple[str, ...]) -> None:
            if row in path:
                raise ValueError(f"rows: {' -> '.join((*path, row))} is a circle")
            if row in done:
                return
            spec = self.rows[row]
            for parent in (spec.start, spec.teacher, spec.scales, spec.as_long_as):
                if parent in self.rows:
                    visit(parent, (*path, row))
            done.add(row)
            if row != name:
                order.append(row)

        visit(name, ())
        return order

    def cell_of(self, row: str, seed: int) -> dict[str, Any]:
        """The merged parameters of a row, without parents: cell, then recipes, then `set`."""
        values = dict(self.cell)
        for recipe in self.rows[row].use:
            values = merged(values, self.recipes[recipe])
        values = merged(values, self.rows[row].set) | {"seed": seed}
        if (longer := self.rows[row].as_long_as) is not None:
            values["epochs"], values["phases"] = self.total_epochs(longer), 1
        return values

    def metric(self, row: str) -> str:
        """What the scores of a row are called: `Cell.metric`."""
        head = (self.cell_of(row, self.seeds[0]).get("transfer") or {}).get("head")
        return "accuracy" if head is None else METRICS[HEADS[head]]

    def total_epochs(self, row: str) -> int:
        """Epochs of a row and of the rows it starts from."""
        if row not in self._totals:
            values = self.cell_of(row, self.seeds[0])
            own = values.get("phases", 1) * values.get("epochs", 0)
            start = self.rows[row].start
            self._totals[row] = own + (self.total_epochs(start) if start in self.rows else 0)
        return self._totals[row]


def merged(base: dict, changes: dict) -> dict:
    """`changes` over `base`, mapping by mapping; null removes nothing, it sets null."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


# -- YAML, read as data only ---------------------------------------------------------------------
class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # in C it is ten times as fast
    """Safe YAML without duplicate keys and dates; it reads 1e-4 as a number."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key!r} stands twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(("float", "timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def refuse_indirection(text: str) -> None:
    """Raises: yaml.YAMLError at an anchor, an alias or a tag."""
    for event in yaml.parse(text, Loader):
        line = f"(line {event.start_mark.line + 1})"
        if getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"anchors and aliases (& and *) are not allowed {line}")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"the tag {event.tag} is not allowed {line}")
        if isinstance(event, yaml.ScalarEvent):
            event.value.encode()  # half a surrogate pair is no text


def parse_yaml(text: str, where: str) -> Any:
    """YAML as plain data. Raises: UserError in one line."""
    try:
        refuse_indirection(text)
        return yaml.load(text, Loader)  # a SafeLoader: builds no objects
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        said = [getattr(error, part, None) for part in ("context", "problem")]
        problem = ": ".join(filter(None, said)) or str(error).partition("\n")[0]
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{where}: not readable as YAML: {problem}{line}.") from None


def read_profile(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """A profile as a mapping, with what it extends underneath."""
    if path in seen:
        raise UserError(f"{path}: extends itself.")
    try:
        text = text_of(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}).") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of keys to values.")
    if not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: every key must be text.")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", base):
        raise UserError(f"{path}: extends (={base!r}) must be a file name in the same folder.")
    return merged(read_profile(path.with_name(base), (*seen, path)), values)


def in_parts(text: str) -> list[str]:
    """ "key=value key=value" as a list; values may hold spaces."""
    return re.split(r"\s+(?=[\w.]+=)", text.strip()) if text.strip() else []


def apply_settings(values: dict, settings: list[str]) -> dict:
    """`--set key=value` over a profile; key may be dotted, the value is read as YAML."""
    given: set[str] = set()
    for setting in settings:
        key, sign, text = setting.partition("=")
        where, key = f"--set {setting}", key.strip()
        parts = key.split(".")
        if not sign or len(parts) > 8 or not all(part.isidentifier() for part in parts):
            raise UserError(f"{where}: expected key=value, the key in plain names and dots.")
        if key in given:
            raise UserError(f"{where}: the key {key} is set twice.")
        given.add(key)
        change: Any = parse_yaml(text, where)
        for part in reversed(parts):
            change = {part: change}
        values = merged(values, change)
    return values


def in_one_line(error: ValidationError, where: str, prefix: str = "") -> UserError:
    """A pydantic error as our one line: file, key, value, what is allowed."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"] if part != "[key]"]
    key = prefix + ".".join(loc)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        model: Any = Fragment if error.title == "Cell" else Table
        nested = {
            "rows": Row,
            "claims": Claim,
            "variants": Variant,
            "networks": Counted,
            "paper": Paper,
            "cycle": CycleParams,
            "dyrep": DyRepParams,
            "resrep": ResRepParams,
            "narrow": NarrowParams,
            "distill": DistillParams,
            "transfer": TransferParams,
            "quantized": QuantizedParams,
            "repopt": RepOptParams,
        }
        for part in loc[:-1]:
            model = nested.get(part, model)
        near = get_close_matches(loc[-1], model.model_fields, n=1)
        message = "no such key" + (f", perhaps {near[0]} is meant" if near else "")
        message += f"; the keys here are {', '.join(model.model_fields)}"
        if model is Fragment and loc[-1] in GIVEN:
            message += f" ({loc[-1]} comes from seeds, or from a row's own {', '.join(GIVEN[1:])})"
    value = first.get("input")
    shown = "" if isinstance(value, dict | BaseModel) else f" (={short(value)})"
    shown = f"{key}{shown}: " if key else ""
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return UserError(f"{where}: {shown}{message}{more}.")


def short(value: object) -> str:
    """A value for a message; it may be longer than a line, or a number too long to print."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def with_variants(values: dict) -> dict:
    """The values of a table in which every variant has rows and recipes of its own.

    Row `control` of variant `a1` becomes `a1_control`; it uses recipe `a1`, the variant's cell,
    before its own ones. Raises: ValidationError.
    """
    if (variants := values.get("variants")) is None:
        return values
    if isinstance(variants, dict):  # a variant set to null is left out
        variants = {name: value for name, value in variants.items() if value is not None}
        values = values | {"variants": variants}
    found = Variants.model_validate({"variants": variants}).variants
    shared_rows, shared_recipes = values.get("rows"), values.get("recipes", {})
    if not (isinstance(shared_rows, dict) and isinstance(shared_recipes, dict)):
        return values  # the table says what is wrong
    rows, recipes, controls = {}, {}, {}
    for name, variant in found.items():

        def own(other: object, name: str = name) -> str:
            return f"{name}_{other}"

        recipes[name] = variant.cell
        recipes |= {own(k): v for k, v in merged(shared_recipes, variant.recipes).items()}
        here = merged(shared_rows, variant.rows)
        here = {row: spec for row, spec in here.items() if spec is not None}
        for row, spec in here.items():
            if isinstance(spec, dict):
                used = spec.get("use", [])
                relations = {
                    key: own(spec[key])
                    for key in ("start", "teacher", "scales", "against", "as_long_as")
                    if isinstance(spec.get(key), str) and spec[key] in here
                }
                spec = spec | relations | {"variant": variant.label}
                spec["label"] = f"{variant.label}: {spec.get('label', row)}"
                spec["use"] = [name, *map(own, used)] if isinstance(used, list) else used
            rows[own(row)] = spec
        controls[variant.label] = own(values.get("control"))
    first = next(iter(controls.values()))
    return values | {"rows": rows, "recipes": recipes, "controls": controls, "control": first}


def load_table(
    path: Path, settings: list[str] = (), networks: bool = True, cells: bool = True
) -> Table:
    """Read, change and check one profile; every cell of it is checked too.

    networks: build every network, of shapes alone; False for who only asks what there is, since
    which takes seconds where there are dozens. cells: make every cell; False for who does it.
    Raises: UserError in one line that names the file, the key, its value and what is allowed.
    """
    values = apply_settings(read_profile(path), list(settings))
    where = f"{path}" + (f" with --set {' '.join(settings)}" if settings else "")
    try:
        rows = values.get("rows")
        if isinstance(rows, dict):  # a row set to null is left out
            values["rows"] = {name: row for name, row in rows.items() if row is not None}
        values = with_variants(values)
        table = Table.model_validate(values)
    except ValidationError as error:
        raise in_one_line(error, where) from None
    groups = {"cell.": table.cell}
    groups |= {f"recipes.{name}.": recipe for name, recipe in table.recipes.items()}
    groups |= {f"rows.{name}.set.": row.set for name, row in table.rows.items()}
    for prefix, group in groups.items():
        try:
            Fragment.model_validate(group)
        except ValidationError as error:
            raise in_one_line(error, where, prefix) from None
    for row in table.rows if cells else ():
        cell = check_row(table, row, where)
        if networks:
            check_network(cell, f"{where}, row {row}")
    for name, counted in table.networks.items() if networks else ():
        try:
            buildable(counted.network, None, False)
        except ValueError as error:
            raise UserError(f"{where}: networks.{name}: {error}") from None
    return table


def built(network: tuple, *, classes: int, in_channels: int) -> nn.Module:
    """The network that `Cell.network` says. Raises: ValueError where there is no such network."""
    body, block, width, of_block, plain_sizes, of_body = network
    shape = {"classes": classes, "in_channels": in_channels, "plain_sizes": plain_sizes}
    options = {"block_options": dict(of_block), "body_options": dict(of_body)}
    try:
        return build(body, block, width=width, **options, **shape)
    except TypeError as error:  # an option of another type than its family or body takes
        said = ", ".join(f"{name} (={given})" for name, given in options.items() if given)
        raise ValueError(f"{said}: {error}") from None


def on_body(cell: Cell, *, classes: int, in_channels: int = 3) -> nn.Module:
    """The detector or segmenter of a cell, its backbone made of blocks. Raises: ValueError where
    its body is no backbone."""
    from replib.transfer.networks import network  # torchvision's models are slow to import

    given = cell.transfer
    body = built(cell.network, classes=classes, in_channels=in_channels)
    names = ("anchor", "proposals", "output_stride", "dilated_blocks", "auxiliary", "channels")
    options = {name: getattr(given, name) for name in (*names, "frozen_stages", "fixed_norms")}
    return network(given.head, body, classes, **options)


@lru_cache(maxsize=1024)
def buildable(
    network: tuple,
    blocks: tuple[str, ...] | None,
    grows: bool,
    searches: bool = False,
    pruned: tuple[str, ...] | None = None,
) -> None:
    """Raises: ValueError where there is no such network, or it has no such blocks, or nothing in it
    that grows, or no scales to search for, or no channels that can be pruned.

    pruned: the targets of that, () for the default; None: nothing is pruned.
    """
    with torch.device("meta"):  # shapes only: nothing is drawn or stored
        model = built(network, classes=10, in_channels=3)
        if blocks is not None:
            Cycle(model, warmup=1, blocks=blocks)
        if grows:
            DyRep(model, interval=1, last_epoch=1)
        if searches:
            repoptimizers.scales_of(model)
        if pruned is not None:
            spans(model, pruned or None)


def searched_network(cell: Cell, parent: Cell | None) -> tuple:
    """The network of a cell with the blocks whose scales it is trained with, as `built` takes it:
    those of its search, by default csla."""
    body, _, width, _, *rest = cell.network
    block, options = ("csla", ()) if parent is None else (parent.block, parent.network[3])
    return (body, block, width, options, *rest)


@lru_cache(maxsize=1024)
def check_scales(network: tuple, imagined: tuple, search: tuple | None) -> None:
    """Raises: ValueError where a network cannot be trained as the imagined one would be, or that
    one's scales are not those of the search."""
    with torch.device("meta"):
        shape = {"classes": 10, "in_channels": 3}
        model, whole = built(network, **shape), built(imagined, **shape)
        repoptimizers.multipliers(model, whole, "square")
        if search is None:
            return
        theirs, ours = (
            {name: tuple(scale.shape) for name, scale in repoptimizers.scales_of(one).items()}
            for one in (built(search, **shape), whole)
        )
        for name in ours.keys() | theirs.keys():
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"the scale {name} is of {ours.get(name)} channels here and of "
                    f"{theirs.get(name)} where it is searched"
                )


def check_network(cell: Cell, where: str) -> None:
    """Build the network of a cell once, to find mistakes early."""
    chosen, pruning = cell.cycle and cell.cycle.blocks, cell.resrep or cell.narrow
    targets = None if pruning is None else tuple(pruning.targets or ())
    try:
        grows = cell.dyrep is not None
        buildable(cell.network, chosen and tuple(chosen), grows, cell.search, targets)
        if cell.transfer is not None:
            with torch.device("meta"):
                on_body(cell, classes=2)
    except ValueError as error:
        raise UserError(f"{where}: body={cell.body}, block={cell.block}: {error}") from None


def check_row(table: Table, row: str, where: str) -> Cell:
    """Make the cell of a row once, with placeholder parents, to find mistakes early."""
    spec = table.rows[row]
    parents = {name: getattr(spec, name) for name in GIVEN[1:]}
    try:
        cell = Cell.model_validate(table.cell_of(row, table.seeds[0]) | parents)
    except ValidationError as error:
        raise in_one_line(error, f"{where}, row {row}") from None
    if spec.start in table.rows:
        parent = table.cell_of(spec.start, table.seeds[0])
        if parent.get("transfer") is not None:
            raise UserError(
                f"{where}, row {row}: start (={spec.start!r}) must be a row without transfer: a "
                "backbone is what another network takes."
            )
        same = () if cell.transfer is not None else ("data",)  # a backbone has seen other images
        for key in (*same, "body", "block", "width", *OPTIONS):
            if (theirs := parent.get(key, Cell.model_fields[key].default)) != getattr(cell, key):
                raise UserError(
                    f"{where}, row {row}: {key} (={getattr(cell, key)!r}) must be that of the row "
                    f"it starts from, {spec.start} (={theirs!r})."
                )
        for key in ("dyrep", "resrep", "narrow", "quantized"):
            if parent.get(key) is not None:
                raise UserError(
                    f"{where}, row {row}: start (={spec.start!r}) must be a row without {key}, "
                    "which leaves a network of another structure."
                )
    drawn = cell.train_images
    if cell.protocol == "clean" and not 0 < cell.held_out < (drawn or math.inf):
        raise UserError(
            f"{where}, row {row}: held_out (={cell.held_out}) must be between 1 and train_images "
            f"(={drawn}) - 1: the clean protocol selects on images held out of the training set."
        )
    return cell
