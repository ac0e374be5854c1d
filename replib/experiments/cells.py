"""From a table to its cells, and from a cell to its evidence."""

from __future__ import annotations

import copy
import functools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib import machine, parallel, quantization
from replib.analysis import receptive_field
from replib.blocks import BLOCKS, own
from replib.errors import UserError
from replib.experiments import teachers
from replib.experiments.params import (
    KEY,
    Cell,
    Table,
    built,
    check_scales,
    in_one_line,
    on_body,
    searched_network,
    short,
)
from replib.experiments.store import Store, home, sha256
from replib.experiments.weights import file_digest, fill, located, state_of, weights_digest
from replib.fusing import deployed_copy, fuse
from replib.methods import cycle, distill, dyrep, repoptimizers, resrep
from replib.models import BODY_VERSIONS
from replib.training import loader, loop
from replib.training.data import Dataset, Splits, derive, load, split
from replib.training.evaluation import (
    REPORTED,
    Normalise,
    Split,
    accuracy,
    deployed_report,
    relative_jump,
)
from replib.training.known_logits import known_logits, left_over
from replib.training.loader import worthwhile
from replib.training.loop import Recipe, Task, fit
from replib.training.optimisation import parameter_groups
from replib.training.step import chosen, sgd
from replib.transfer import VERSION as TRANSFER_VERSION
from replib.transfer import data as scenes
from replib.transfer.tasks import Detection, Kind, Segmentation, extra, scaled_groups

LIBRARIES = ("torch", "torchvision", "numpy")  # that evidence names
CALIBRATED = 128  # images of a batch on which ranges are found


@dataclass(frozen=True)
class Planned:
    """A cell with its key and its parents' keys."""

    key: str
    cell: Cell  # `start` and `teacher` are keys, or "NAME:DIGEST" of what is no cell
    start_path: str | None = None  # where `start` is a file
    scales_path: str | None = None  # where `scales` are one
    rows: tuple[str, ...] = ()  # the rows of the table that it serves
    taught_by: str | None = None  # where `teacher` is no cell: how the row names it
    teacher_flops: int = 0  # of its forward pass on one image, then

    @property
    def parents(self) -> dict[str, str]:
        """role -> key of the cells that must be trained first."""
        roles = {role: getattr(self.cell, role) for role in ("start", "teacher", "scales")}
        return {role: key for role, key in roles.items() if key is not None and ":" not in key}

    @property
    def epochs(self) -> int:
        return self.cell.epochs * self.cell.phases


@dataclass(frozen=True)
class Plan:
    """All cells of a table: by key, parents before children, and by (row, seed)."""

    cells: dict[str, Planned] = field(default_factory=dict)
    by_row: dict[tuple[str, int], str] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)  # keys of cells whose weights are wanted too
    turn: dict[str, int] = field(default_factory=dict)  # key -> of which plan taken it is
    published: bool = False  # published evidence counts as trained

    def of(self, keys: Iterable[str]) -> Plan:
        """Only these cells, and what they need to be trained first."""
        wanted = set(keys)
        for planned in reversed(self.cells.values()):
            if planned.key in wanted:
                wanted |= set(planned.parents.values())
        cells = {key: planned for key, planned in self.cells.items() if key in wanted}
        return replace(self, cells=cells, by_row={}, weights=self.weights & wanted)

    def take(self, other: Plan) -> None:
        """Add the cells of another plan, which are trained after those that are here."""
        last = max(self.turn.values(), default=-1) + 1
        for key, planned in other.cells.items():
            self.turn.setdefault(key, last)
            self.cells.setdefault(key, planned)
        self.weights.update(other.weights)

    def finished(self, key: str, store: Store) -> bool:
        """Whether a cell has evidence, and its weights are there where they are wanted."""
        found = store.read(key) or (self.published and store.read(key, published=True))
        return bool(found) and (key not in self.weights or store.has_weights(key))

    def missing(self, store: Store) -> list[Planned]:
        """The cells still to train, parents first; a parent without weights is trained again."""
        wanted: set[str] = set()
        for planned in reversed(self.cells.values()):
            needed = any(
                planned.key in child.parents.values()
                for child in self.cells.values()
                if child.key in wanted
            )
            if not self.finished(planned.key, store) or (
                needed and not store.has_weights(planned.key)
            ):
                wanted.add(planned.key)
        return [planned for planned in self.cells.values() if planned.key in wanted]


def versions_of(cell: Cell) -> dict[str, int | str]:
    """The hand-raised versions of everything whose numbers this cell depends on, and the digest of
    the file that a family of one's own comes from."""
    versions = {"engine": loop.VERSION, f"block:{cell.block}": BLOCKS[cell.block].version}
    if cell.body in BODY_VERSIONS:  # a body that never changed adds nothing to the key
        versions[f"body:{cell.body}"] = BODY_VERSIONS[cell.body]
    if cell.cycle is not None:
        versions["cycle"] = cycle.VERSION
    if cell.dyrep is not None:
        versions |= {"dyrep": dyrep.VERSION, "block:dyrep": BLOCKS["dyrep"].version}
    if cell.distill is not None:
        versions["distill"] = distill.VERSION
    if cell.resrep is not None or cell.narrow is not None:
        versions["resrep"] = resrep.VERSION
    if cell.quantized is not None:
        versions["quantized"] = quantization.VERSION
    if cell.repopt is not None:  # the version of a search is in its key
        versions |= {"repopt": repoptimizers.VERSION, "block:csla": BLOCKS["csla"].version}
    if cell.transfer is not None:
        versions["transfer"] = TRANSFER_VERSION
    named = {cell.block, *map(str, (cell.block_options or {}).values())}
    return versions | {f"file:{name}": digest for name, digest in own.digests(named).items()}


def key_of(cell: Cell, data_digest: str) -> str:
    """SHA-256 over the resolved parameters, the data's digest and the versions."""
    versions = versions_of(cell)
    return sha256({"parameters": cell.in_key, "data": data_digest, "versions": versions})


def plan(table: Table, store: Store | None = None) -> Plan:
    """Resolve a table into cells. Raises: UserError for data or a start that cannot be read."""
    out, store = Plan(), store or Store()
    order: list[str] = []
    for row in table.rows:
        order += [r for r in (*table.ancestors(row), row) if r not in order]
    for seed in table.seeds:
        for row in order:
            spec, values = table.rows[row], table.cell_of(row, seed)
            paths = {}
            for role in ("start", "scales"):
                if (text := getattr(spec, role)) in table.rows:
                    values[role] = out.by_row[text, seed]
                elif text is not None:
                    folder = values.get("data_dir")
                    values[role], paths[f"{role}_path"] = outside(out, store, role, text, folder)
            in_table = spec.teacher in table.rows
            values["teacher"] = out.by_row[spec.teacher, seed] if in_table else spec.teacher
            cell, teacher = with_teacher(Cell.model_validate(values), out, store)
            if cell.repopt is not None:
                check_scales_of(cell, out.cells.get(cell.scales), row)
            split_of(cell)  # finds impossible sizes before anything is trained
            key = key_of(cell, dataset(cell).digest)
            known = out.cells.get(key)
            rows = tuple(dict.fromkeys((*(known.rows if known else ()), row)))
            out.cells[key] = Planned(key, cell, rows=rows, **paths, **teacher)
            out.by_row[row, seed] = key
    return out


def with_teacher(cell: Cell, out: Plan, store: Store) -> tuple[Cell, dict]:
    """A cell whose teacher is named by what it is, with the normalisation that it wants, and what
    `Planned` keeps of one that is no cell. A teacher by key is taken into the plan.

    Raises: UserError where it cannot teach these data.
    """
    text, data = cell.teacher, dataset(cell)
    if text is None:
        return cell, {}
    if KEY.fullmatch(text):
        key = text if text in out.cells else adopt(out, store, text, cell.data_dir, "teacher")
        learned = dataset(out.cells[key].cell)
        for what, theirs, ours in (
            ("classes", len(learned.classes), len(data.classes)),
            ("channels", learned.in_channels, data.in_channels),
        ):
            if theirs != ours:
                raise teachers.refused(text, f"it has {theirs} {what}, the data have {ours}")
        name, mean, deviation, outside = key, learned.mean, learned.deviation, {}
    else:
        shapes = (image_shape(cell), tuple(data.test_images.shape[1:]))
        taught = teachers.opened(text, classes=len(data.classes), shapes=shapes)
        name, mean, deviation = taught.identity, taught.mean, taught.deviation
        outside = {"taught_by": text, "teacher_flops": taught.flops}
    if cell.teacher_mean is not None and len(cell.teacher_mean) not in (1, data.in_channels):
        raise UserError(
            f"teacher_mean (={cell.teacher_mean}) must be 1 number or {data.in_channels}, as many "
            "as the images have channels."
        )
    changes: dict = {"teacher": name}
    wants_another = mean is not None and (mean, deviation) != (data.mean, data.deviation)
    if cell.teacher_mean is None and wants_another:
        changes |= {"teacher_mean": list(mean), "teacher_deviation": list(deviation)}
    return cell.model_copy(update=changes), outside


def teacher_of(planned: Planned, plan_cells: dict[str, Planned], store: Store) -> nn.Module | None:
    """The deployed teacher of a cell, behind the map to the inputs that it wants.

    Raises: UserError where its weights are not here, or are others than the key was made of.
    """
    cell, data = planned.cell, dataset(planned.cell)
    if cell.teacher is None:
        return None
    if cell.teacher in plan_cells:
        network = deployed_copy(trained_model(plan_cells[cell.teacher], store))
    elif planned.taught_by is None:
        raise UserError(
            f"cell {planned.key[:16]} has to be trained again and learns from {cell.teacher}: run "
            "the table that it is of."
        )
    else:
        shapes = (image_shape(cell), tuple(data.test_images.shape[1:]))
        taught = teachers.opened(planned.taught_by, classes=len(data.classes), shapes=shapes)
        if taught.identity != cell.teacher:
            raise teachers.refused(planned.taught_by, "it has changed since the run was planned")
        network = copy.deepcopy(taught.network)  # which is kept for the next cell
    if cell.teacher_mean is not None:
        given, wanted = (data.mean, data.deviation), (cell.teacher_mean, cell.teacher_deviation)
        network = teachers.Restandardised(network, given, wanted)
    return network.eval().requires_grad_(False)


def outside(
    out: Plan, store: Store, role: str, text: str, data_dir: str | None
) -> tuple[str, str | None]:
    """(what a cell says, the path) of a parent that is no row of the table: a finished cell, which
    is taken into the plan, or a file."""
    if KEY.fullmatch(text):
        return adopt(out, store, text, data_dir, role), None
    return f"file:{file_digest(text, role)}", text


def check_scales_of(cell: Cell, parent: Planned | None, row: str) -> None:
    """Raises: UserError where the scales of a search are none for the network of a cell."""
    search = None if parent is None else parent.cell
    try:
        imagined = searched_network(cell, search)
        check_scales(cell.network, imagined, None if search is None else search.network)
    except ValueError as error:
        raise UserError(f"row {row}: scales (={short(cell.scales)}): {error}") from None


def adopt(out: Plan, store: Store, key: str, data_dir: str | None, role: str = "start") -> str:
    """Take a finished cell of any table into the plan, with its parents; returns its whole key."""
    evidence = store.read_any(key)
    if evidence is None:
        raise UserError(
            f"{role} (={key!r}) is no cell whose evidence is here: run its table first, or name a "
            "row or the path of a checkpoint."
        )
    result = evidence["result"]
    if result["key"] not in out.cells:
        try:
            cell = Cell.model_validate(result["parameters"] | {"data_dir": data_dir})
        except ValidationError as error:  # a block of one's own, say, whose file is not named
            raise in_one_line(error, f"{role} (={key!r})") from None
        if key_of(cell, result["data"]["digest"]) != result["key"]:
            raise UserError(f"{role} (={key!r}) was made by an older version: run its table again.")
        planned = Planned(result["key"], cell)
        for parent in planned.parents.values():
            adopt(out, store, parent, data_dir)
        out.cells[planned.key] = planned
    return result["key"]


def dataset(cell: Cell) -> Dataset:
    """The data of a cell."""
    if cell.data in scenes.SCENES:
        sides = {"longer": cell.image_size, "shorter": cell.image_resize}
        return scenes.load(cell.data, located(cell.data_dir), **sides)
    names = "image_size", "image_resize", "classes"
    return opened(cell.data, cell.data_dir, **{name: getattr(cell, name) for name in names})


def opened(name: str, folder: str | None = None, **options: int | None) -> Dataset:
    """A data set; downloads are kept in the project's folder. options: of an image folder."""
    if folder is None and name.startswith("cifar"):
        folder = "data"
    return load(name, located(folder), **options)


def split_of(cell: Cell) -> Splits:
    """The training and held-out images of a cell."""
    data = dataset(cell)
    return split(
        data,
        images=cell.train_images,
        held_out=cell.held_out,
        protocol=cell.protocol,
        seed=cell.seed if cell.split_seed is None else cell.split_seed,
    )


def new_model(cell: Cell) -> nn.Module:
    """The network of a cell as its seed initialises it; of one that trains a fused backbone, before
    that is fused."""
    data = dataset(cell)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(cell.seed, "initialisation"))
        shape = {"classes": len(data.classes), "in_channels": data.in_channels}
        if cell.transfer is not None:
            return on_body(cell, **shape)
        model = built(cell.network, **shape)
        return dyrep.initialised(model) if cell.initialisation == "fan_out" else model


def trained_model(planned: Planned, store: Store) -> nn.Module:
    """The network of a finished cell with its selected weights, in eval mode.

    Raises: UserError where its weights are not on this machine.
    """
    weights, problem = store.load(planned.key, "weights")
    if weights is None:
        raise UserError(
            f"the weights of cell {planned.key[:16]} are not here"
            + (f" ({problem})" if problem else "")
            + ": run the table again, it trains what is missing."
        )
    try:
        model = with_weights(planned.cell, weights)
    except RuntimeError:
        raise UserError(
            f"the weights of cell {planned.key[:16]} do not fit its network: an older version of "
            f"the code made them; remove {store.folder(planned.key)} and run again."
        ) from None
    return model.eval()


def with_weights(cell: Cell, weights: dict) -> nn.Module:
    """The network of a cell with weights of its training, and with the structure they are of.

    Raises: RuntimeError, KeyError or AttributeError where they are of another network.
    """
    model = new_model(cell)
    if cell.transfer is not None and cell.transfer.fused:
        model.fuse_body()
    dyrep.rebuild(model, weights.get("structure", {}))
    if (pruning := cell.resrep or cell.narrow) is not None:
        deployed = cell.resrep is not None
        model = resrep.of_widths(model, weights["widths"], pruning.targets, deployed=deployed)
    if cell.quantized is not None:  # ranges are among the weights
        model = in_eight_bits(cell, model, [example(cell, model)])
    model.load_state_dict(weights["model"])
    return model


def searched(planned: Planned, plan_cells: dict[str, Planned], store: Store) -> nn.Module | None:
    """The network with branches that a cell is trained as, its scales being those that the cell
    says; None for a cell without such a one.

    Raises: UserError where its scales are not here, or not of this network.
    """
    cell, path = planned.cell, planned.scales_path
    if cell.repopt is None:
        return None
    parent = plan_cells.get(cell.scales)
    data = dataset(cell)
    shape = {"classes": len(data.classes), "in_channels": data.in_channels}
    with torch.random.fork_rng(devices=[]):  # its kernels are not used
        network = built(searched_network(cell, parent and parent.cell), **shape)
    if parent is not None:
        state = trained_model(parent, store).state_dict()
    elif path is not None:
        try:
            state = state_of(located(path), cell.body, network)
        except Exception as error:  # whatever a foreign file provokes
            said = " ".join(str(error).split())
            raise UserError(f"scales (={path!r}) cannot be read: {said[:300]}") from None
    elif cell.scales is not None:
        raise UserError(
            f"cell {planned.key[:16]} has to be trained again with the scales {cell.scales}: run "
            "the table that it is of."
        )
    try:
        if cell.scales is not None:
            repoptimizers.load_scales(network, state)
    except ValueError as error:
        raise UserError(f"scales (={path or cell.scales!r}): {error}") from None
    repoptimizers.set_constants(network, cell.repopt.constants)
    return network


def load_start(model: nn.Module, cell: Cell, path: str) -> None:
    """Begin from a file: a network of ours, a checkpoint, or RepAn's layout of its CIFAR bodies; a
    backbone from that of a classifier, of any classes.

    Raises: UserError where it is damaged, or of another network.
    """
    try:
        if cell.transfer is not None:
            with torch.device("meta"):  # for its names
                classifier = built(cell.network, classes=2, in_channels=dataset(cell).in_channels)
            model.load_body(state_of(located(path), cell.body, classifier))
            return
        state = state_of(located(path), cell.body, model)
        fill(model, state, classes=len(dataset(cell).classes))
    except Exception as error:  # whatever a foreign file provokes
        text = " ".join(str(error).split())
        raise UserError(
            f"start (={path!r}) is no checkpoint of {cell.body}: {text[:300]}"
        ) from None


def run_cell(
    planned: Planned,
    plan_cells: dict[str, Planned],
    store: Store,
    *,
    device: str = "cpu",
    compile: str = "none",
    flops: float | None = None,
    decoders: int | None = None,
    deadline: float | None = None,
    checkpoint_seconds: float = 15,
    tick: Callable[..., None] = lambda resumed=0: None,
    say: Callable[[str], None] = print,
) -> None:
    """Train one cell, or go on with it, and leave its evidence and weights in the store.

    tick: called after every epoch, and before all with the number of those that were done before.
    compile: of replib.training.step.MODES; flops: what `cost_of` says, where it has been asked.
    decoders: processes that read image files.
    Raises: replib.training.loop.OutOfTime at the deadline, after a checkpoint; UserError for a cell
    that several processes cannot train together.
    """
    cell, key = planned.cell, planned.key
    if cell.quantized is not None and (count := parallel.processes()) > 1:
        raise UserError(
            f"quantized is for one process, here are {count}: each would round by ranges of its "
            "own images; run this table without torchrun."
        )
    started = time.monotonic()
    if flops is None:
        flops = cost_of(planned, plan_cells) if compile == "auto" else 0
    data, splits = dataset(cell), split_of(cell)
    model = new_model(cell)
    if parallel.splits(cell.accumulate):
        model = parallel.synchronised(model)
    if planned.start_path is not None:
        load_start(model, cell, planned.start_path)
    elif cell.start is not None:
        begun = trained_model(plan_cells[cell.start], store).state_dict()
        load = model.load_state_dict if cell.transfer is None else model.load_body
        load(begun)
    if cell.transfer is not None and cell.transfer.fused:
        model.fuse_body()
    search = searched(planned, plan_cells, store)
    if search is not None and cell.repopt.initialise:
        drawn = torch.Generator().manual_seed(derive(cell.seed, "branches"))
        repoptimizers.reinitialise(model, search, drawn, cell.repopt.identity)
    widths = None
    if cell.narrow is not None:
        model, widths = narrowed(cell, model)
    if cell.quantized is not None:
        model = in_eight_bits(cell, model.to(device), calibration(cell, device))
        compile = "none"  # its observers ask for values at every step
    teacher = teacher_of(planned, plan_cells, store)
    if teacher is not None:
        teacher = teacher.to(device, memory_format=torch.channels_last)
    method, recipe = method_of(cell, model), recipe_of(cell)
    if cell.transfer is not None:
        decoders = worthwhile(data.train_images, len(splits.train), decoders)
    task = Task(
        model=model,
        data=data,
        train=splits.train,
        validation=splits.validation,
        recipe=recipe,
        groups=lambda: groups_of(cell, model, method),
        loss=loss_of(cell, teacher),
        seed=cell.seed,
        method=method,
        device=device,
        decoders=decoders,
        compile=chosen(
            compile if cell.transfer is None else "none",  # its shapes change from batch to batch
            device,
            flops=flops,
            steps=planned.epochs * recipe.steps(len(splits.train)),
            changes=cell.dyrep is not None,
        ),
        say=say,
        optimizer=optimizer_of(cell, model, search),
        observe=observed(cell, model, method, device),
        kind=kind_of(cell, device),
    )
    resume, problem = store.load(key, "checkpoint")
    if problem:
        say(problem)
    spent, asked = (resume["seconds"], resume.get("asked", 0)) if resume else (0.0, 0)
    images = recipe.images(len(splits.train))  # of an epoch
    batch = min(cell.batch_size, len(splits.train))
    part = math.ceil(batch / recipe.accumulate)
    if teacher is not None and not parallel.splits(cell.accumulate):
        task.known, passes = known_logits(
            teacher,
            data,
            splits.train,
            recipe.augmentation,
            batch=part,
            epochs=planned.epochs,
            precision=cell.precision,
            seed=cell.seed,
            device=device,
            decoders=decoders,
            say=say,
        )
        asked += passes
    if resume and (done := len(resume["progress"]["history"])):
        tick(done)  # so that the bar begins where the run goes on

    def keep(state: dict) -> None:
        seconds = spent + time.monotonic() - started
        store.save(key, "checkpoint", state | {"seconds": seconds, "asked": asked})

    # Before training: what fails here loses nothing. A copy is counted, and draws apart.
    with torch.random.fork_rng([device] if device.startswith("cuda") else []):
        flops, teacher_flops = loop.training_flops(task)
    progress = fit(
        task,
        resume=resume,
        checkpoint=keep,
        checkpoint_seconds=checkpoint_seconds,
        deadline=deadline,
        tick=tick,
    )
    per_epoch = [row.get("training_flops", flops) for row in progress.history]
    best = {"model": progress.best["weights"]}
    if cell.resrep or cell.narrow or cell.transfer:
        size = sum(parameter.numel() for parameter in model.parameters())
        for row in progress.history:
            row["training_parameters"] = size
    if cell.dyrep is None:
        model.load_state_dict(best["model"])
    else:  # it may have had another structure then
        best["structure"] = progress.best["structure"]
        model = with_weights(cell, best).to(memory_format=torch.channels_last)
    test = (Split if task.kind is None else task.kind.split).test(data, device)
    if cell.resrep is not None:
        model, pruning = pruned(method, model, test)
        widths = {name: after for name, (_, after) in pruning["widths"].items()}
        best["model"] = model.state_dict()
    if widths is not None:
        best["widths"] = widths
    seen = planned.epochs * images
    asked += planned.epochs * (left_over(images, batch, part) if task.known is not None else images)
    selected, metric = progress.history[progress.best["index"]], cell.metric
    result = {
        "key": key,
        "parameters": cell.in_key,
        "data": {"name": data.name, "digest": data.digest, "test_images": len(data.test_labels)},
        "versions": versions_of(cell),
        "images": {"train": len(splits.train), "held_out": len(splits.validation)},
        "history": columns(progress.history),
        "restarts": columns(progress.restarts),
        "kept_blocks": method.kept if cell.cycle is not None else {},
        "final": {
            "last": progress.history[-1][f"test_{metric}"],
            "validation_best": best_of(progress.history, "validation", metric),
            "test_best": best_of(progress.history, "test", metric),
            "selected_by": recipe.select,
            "selected_epoch": progress.best["index"],
            "selected": selected[f"test_{metric}"],
        },
        "deployed": deployed_report(model, test, cell.views)
        if task.kind is None
        else task.kind.deployed_report(model, test),
        "compute": {
            "epochs": planned.epochs,
            "training_flops": sum(per_epoch) * images,
            "teacher_flops": teacher_flops * seen,  # of one that is asked at every step
        },
    }
    if cell.dyrep is not None:
        result["adjustments"] = columns(method.log)
    if cell.resrep is not None:
        result["pruning"] = pruning
    if cell.receptive_field is not None:
        result["receptive_field"] = field_report(cell, model, data, device)
    # In the context, not in the result: results of before are to stay equal to the bit.
    how = {"weights_sha256": weights_digest(best["model"])}
    if teacher is not None:
        result["teacher"] = teacher_report(planned, plan_cells, teacher, test)
        known = "asked at every step" if task.known is None else "computed once"
        how["teacher"] = {"logits": known, "flops": teacher_flops * asked}
    store.save(key, "weights", best)
    seconds = spent + time.monotonic() - started
    store.write(key, result, context(device, seconds, cell.precision, task.compile) | how)


def field_report(cell: Cell, model: nn.Module, data: Dataset, device: str) -> dict:
    """The effective receptive field of the deployed network, on test images of all classes."""
    total = len(data.test_labels)
    chosen = torch.linspace(0, total - 1, min(receptive_field.IMAGES, total)).long()
    images = Split(data.test_images, data.test_labels, chosen, data, device).inputs()
    return receptive_field.report(deployed_copy(model.eval()), images, cell.receptive_field)


def teacher_report(
    planned: Planned, plan_cells: dict[str, Planned], teacher: nn.Module, test: Split
) -> dict:
    """Which teacher it was, and how good it is by itself, deployed and in float32."""
    name, _, digest = planned.cell.teacher.rpartition(":")
    return {
        "name": name or plan_cells[planned.cell.teacher].cell.body,
        "digest": digest,  # of its weights; the key of a cell of ours
        "parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "test_accuracy": accuracy(teacher, test),
    }


def cost_of(planned: Planned, plan_cells: dict[str, Planned]) -> float:
    """Training FLOPs of a cell, by shapes alone: the student's forward three times, the teacher's
    once. An estimate, for deciding; `loop.training_flops` measures what evidence says."""
    cell = planned.cell
    flops = 3 * forward_flops(*network_of(cell))
    if cell.teacher in plan_cells:
        flops += forward_flops(*network_of(plan_cells[cell.teacher].cell))
    flops += planned.teacher_flops
    return flops * planned.epochs * len(split_of(cell).train)


def network_of(cell: Cell) -> tuple:
    """What `forward_flops` needs to know of a cell."""
    data = dataset(cell)
    return cell.network, len(data.classes), image_shape(cell)


def image_shape(cell: Cell) -> tuple[int, int, int]:
    """(C, H, W) of what a network is trained on."""
    data, scene = dataset(cell), cell.transfer
    sides = (cell.resized_crop,) * 2 if cell.resized_crop else tuple(data.train_images.shape[-2:])
    if scene is not None and scene.crop is not None:
        sides = tuple(scene.crop)
    return data.in_channels, *sides


@functools.lru_cache
def forward_flops(network: tuple, classes: int, shape: tuple[int, int, int]) -> int:
    """FLOPs of the training form's forward pass of `Cell.network` on one image of (C, H, W)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # computes nothing
        model = built(network, classes=classes, in_channels=shape[0])
        model(torch.empty(2, *shape))
    return counter.get_total_flops() // 2


def method_of(cell: Cell, model: nn.Module) -> cycle.Cycle | dyrep.DyRep | resrep.ResRep | None:
    """What restructures the network of a cell, or None for plain training.

    Raises: UserError where its channels cannot be pruned so far.
    """
    if cell.resrep is not None:
        options = cell.resrep.model_dump()
        options["warmup"] *= recipe_of(cell).steps(len(split_of(cell).train))
        try:
            return resrep.ResRep(model, example(cell, model), **options)
        except ValueError as error:
            raise UserError(f"resrep: {error}") from None
    for kind, params in ((cycle.Cycle, cell.cycle), (dyrep.DyRep, cell.dyrep)):
        if params is not None:
            return kind(model, **params.model_dump(), seed=derive(cell.seed, "redraw"))
    return None


def optimizer_of(
    cell: Cell, model: nn.Module, search: nn.Module | None
) -> Callable[[list[dict]], torch.optim.Optimizer] | None:
    """What makes the RepOptimizer of a cell; None where its recipe's own will do."""
    if search is None or not cell.repopt.multiply:
        return None
    if cell.optimizer == "sgd":
        kind = functools.partial(repoptimizers.RepSGD, model, search)
        return functools.partial(sgd, momentum=cell.momentum, nesterov=cell.nesterov, kind=kind)
    options = {"lr": 0.0, "betas": tuple(cell.betas), "eps": cell.epsilon}
    signed = cell.repopt.signed
    return functools.partial(repoptimizers.RepAdamW, model, search, signed=signed, **options)


def recipe_of(cell: Cell) -> Recipe:
    """What the training loop needs to know."""
    names = Recipe.__dataclass_fields__.keys() & Cell.model_fields.keys() - {"schedule"}
    return Recipe(
        **{name: getattr(cell, name) for name in names} | {"betas": tuple(cell.betas)},
        schedule=cell.rate_schedule(),
        augmentation=cell.augmentation(),
        select=selected_by(cell),
        reseed_each_phase=cell.cycle is not None and cell.cycle.reseed,
    )


def selected_by(cell: Cell) -> str:
    """What selects the epoch that counts; of a network that is pruned in the end, none does, nor of
    a detector or segmenter as published."""
    if cell.resrep is not None or (cell.transfer is not None and cell.protocol == "paper"):
        return "last"
    return "test" if cell.protocol == "paper" else "validation"


# -- pruning ---------------------------------------------------------------------------------------
def example(cell: Cell, model: nn.Module) -> Tensor:
    """An input of the shape of test images, (1, C, H, W), of any values but constant ones."""
    shape = (1, *dataset(cell).test_images.shape[1:])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(next(model.parameters()))


def narrowed(cell: Cell, model: nn.Module) -> tuple[nn.Module, dict[str, int]]:
    """The narrower network that a cell trains, and how many channels are left where.

    Raises: UserError where it cannot be as narrow as is asked.
    """
    try:
        model, kept = resrep.shrunk(model, example(cell, model), **cell.narrow.model_dump())
    except ValueError as error:
        raise UserError(f"narrow: {error}") from None
    return model, {name: len(channels) for name, channels in kept.items()}


# -- 8 bits ----------------------------------------------------------------------------------------
def in_eight_bits(
    cell: Cell, model: nn.Module, batches: Iterable[Tensor]
) -> quantization.Trainable:
    """The network of a cell merged, rounding as it computes; its ranges those of the batches."""
    return quantization.trainable(fuse(model.eval()), batches, cell.quantized.weights)


def calibration(cell: Cell, device: str, images: int | None = None) -> Iterator[Tensor]:
    """Normalised training images of a cell that its seed draws, not augmented, in batches.

    images: how many, by default as the cell says.
    """
    data, train = dataset(cell), split_of(cell).train
    drawn = torch.Generator().manual_seed(derive(cell.seed, "calibration"))
    chosen = train[torch.randperm(len(train), generator=drawn)[: images or cell.quantized.images]]
    normalise = Normalise(data, device)
    for batch in loader.batches(data.train_images, chosen.split(CALIBRATED), device):
        yield normalise(batch)


def groups_of(cell: Cell, model: nn.Module, method: object) -> list[dict]:
    """The parameter groups of a new optimizer."""
    rules = cell.weight_decay, cell.decay, cell.bias_rate
    if cell.resrep is not None:
        return method.parameter_groups(*rules)
    groups = parameter_groups(model, *rules)
    if cell.transfer is not None:
        return scaled_groups(groups, model, cell.transfer.stem_rate, cell.transfer.head_rate)
    return groups


def kind_of(cell: Cell, device: str) -> Kind | None:
    """What a cell is trained for, where it is not the classes of images. Raises: UserError where
    the packages that score it are not installed."""
    if cell.transfer is None:
        return None
    for name in ("pycocotools", "torchmetrics"):
        extra(name)
    data, interval = dataset(cell), cell.transfer.interval
    if cell.transfer.task == "detection":
        return Detection(data, device, interval)
    return Segmentation(data, device, interval, cell.transfer.auxiliary)


def observed(cell: Cell, model: nn.Module, method: object, device: str) -> Callable[[], dict]:
    """What the log of every epoch is given besides."""
    if cell.search:
        return lambda: {"scales": repoptimizers.mean_scales(model)}
    if cell.resrep is not None:
        test = Split.test(dataset(cell), device)
        return lambda: method.measured(lambda network: accuracy(network, test))
    return dict


def pruned(method: resrep.ResRep, model: nn.Module, test: Split) -> tuple[nn.Module, dict]:
    """The network without its compactors and what they removed, and a report of that."""
    network, kept, x = method.pruned(), method.kept(), next(test.inputs())[:REPORTED]
    widths = {name: len(channels) for name, channels in kept.items()}
    with torch.no_grad():
        jump = relative_jump(model.eval()(x), network(x))
    return network, {
        "accuracy_before": accuracy(deployed_copy(model), test),
        "accuracy_after": accuracy(network, test),
        "logits_moved": jump,
        "flops_before": method.cost.total,
        "flops_after": method.cost(widths),
        "target": method.target,
        "masked": sum(span.width for span in method.spans.values())
        - sum(method.unmasked().values()),
        "widths": {name: [span.width, widths[name]] for name, span in method.spans.items()},
    }


def loss_of(cell: Cell, teacher: nn.Module | None) -> Callable[..., Tensor]:
    """(logits, labels, inputs) -> loss: cross-entropy, or distillation from the teacher, which is
    asked where its logits are not given as a fourth argument."""
    if teacher is None:
        return lambda logits, labels, inputs: F.cross_entropy(logits, labels)

    def distilled(
        logits: Tensor, labels: Tensor, inputs: Tensor, known: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            taught = teacher(inputs) if known is None else known
        return distill.distillation_loss(
            logits,
            taught,
            labels,
            alpha=cell.distill.alpha,
            temperature=cell.distill.temperature,
        )

    return distilled


@functools.lru_cache
def training_parameters(network: tuple, classes: int, in_channels: int) -> int:
    """How many numbers of `Cell.network` are trained."""
    with torch.device("meta"):
        model = built(network, classes=classes, in_channels=in_channels)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@functools.lru_cache
def counts(network: tuple, classes: int, shape: tuple[int, int, int]) -> dict[str, int]:
    """{"training_parameters", "parameters", "flops"} of `Cell.network`, by shapes alone; the last
    two of the deployed form, on one image of (C, H, W), two per multiply-add."""
    with torch.device("meta"):
        model = built(network, classes=classes, in_channels=shape[0])
        fused = deployed_copy(model.eval())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            fused(torch.empty(1, *shape))
    return {
        "training_parameters": training_parameters(network, classes, shape[0]),
        "parameters": sum(p.numel() for p in fused.parameters()),
        "flops": counter.get_total_flops(),
    }


def columns(rows: list[dict]) -> dict[str, list]:
    """A list of records as one list per field."""
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


def best_of(history: list[dict], split: str, metric: str) -> dict | None:
    """The test score at the epoch where that of `split` is highest (the last of equals for
    validation), of those that were scored."""
    name, test = f"{split}_{metric}", f"test_{metric}"
    order = [i for i, row in enumerate(history) if row[name] is not None]
    if not order:
        return None
    index = max(order if split == "test" else reversed(order), key=lambda i: history[i][name])
    return {"epoch": index, test: history[index][test]}


def context(device: str, seconds: float, precision: str, compile: str) -> dict:
    """Where and how a cell was run; not part of the hashed result.

    The peak of memory is that of the worker process so far, which may have run other cells.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    on_gpu = device.startswith("cuda")
    return machine.context(device, home(), LIBRARIES) | {
        "precision": precision,
        "evaluation_precision": "float32",
        "compile": compile,
        "tf32": on_gpu and torch.backends.cudnn.allow_tf32,
        "wall_seconds": round(seconds, 2),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak,
        "exit_state": "finished",
    }
