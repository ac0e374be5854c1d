"""From a table to its cells, and from a cell to its evidence."""

from __future__ import annotations

import functools
import hashlib
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib import machine
from replib.blocks import BLOCKS
from replib.errors import UserError
from replib.experiments.params import Cell, Table
from replib.experiments.store import Store, home, sha256
from replib.fusing import deployed_copy
from replib.methods import cycle, distill
from replib.models import BODY_VERSIONS, build
from replib.training import checkpoint, loop
from replib.training.data import Dataset, Splits, derive, load, split
from replib.training.evaluation import Split, deployed_report
from replib.training.loop import Recipe, Task, fit
from replib.training.optimisation import parameter_groups
from replib.training.step import chosen

KEY = re.compile(r"[0-9a-f]{16}([0-9a-f]{48})?")  # of a cell, whole or as files are named


@dataclass(frozen=True)
class Planned:
    """A cell with its key and its parents' keys."""

    key: str
    cell: Cell  # `start` and `teacher` are keys, or "file:DIGEST"
    start_path: str | None = None  # where `start` is a file
    rows: tuple[str, ...] = ()  # the rows of the table that it serves

    @property
    def parents(self) -> dict[str, str]:
        """role -> key of the cells that must be trained first."""
        roles = {"start": self.cell.start, "teacher": self.cell.teacher}
        return {r: k for r, k in roles.items() if k is not None and not k.startswith("file:")}

    @property
    def epochs(self) -> int:
        return self.cell.epochs * self.cell.phases


@dataclass(frozen=True)
class Plan:
    """All cells of a table: by key, parents before children, and by (row, seed)."""

    cells: dict[str, Planned] = field(default_factory=dict)
    by_row: dict[tuple[str, int], str] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)  # keys of cells whose weights are wanted too

    def missing(self, store: Store) -> list[Planned]:
        """The cells still to train, parents first; a parent without weights is trained again."""
        wanted: set[str] = set()
        for planned in reversed(self.cells.values()):
            needed = planned.key in self.weights or any(
                planned.key in child.parents.values()
                for child in self.cells.values()
                if child.key in wanted
            )
            absent = store.read(planned.key) is None
            if absent or (needed and not store.has_weights(planned.key)):
                wanted.add(planned.key)
        return [planned for planned in self.cells.values() if planned.key in wanted]


def versions_of(cell: Cell) -> dict[str, int]:
    """The hand-raised versions of everything whose numbers this cell depends on."""
    versions = {"engine": loop.VERSION, f"block:{cell.block}": BLOCKS[cell.block].version}
    if cell.body in BODY_VERSIONS:  # a body that never changed adds nothing to the key
        versions[f"body:{cell.body}"] = BODY_VERSIONS[cell.body]
    if cell.cycle is not None:
        versions["cycle"] = cycle.VERSION
    if cell.distill is not None:
        versions["distill"] = distill.VERSION
    return versions


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
            start_path = None
            if spec.start in table.rows:
                values["start"] = out.by_row[spec.start, seed]
            elif spec.start is not None and KEY.fullmatch(spec.start):
                data_dir = values.get("data_dir")
                values["start"] = adopt(out, store, spec.start, data_dir)
            elif spec.start is not None:
                start_path = spec.start
                values["start"] = f"file:{file_digest(start_path)}"
            if spec.teacher is not None:
                values["teacher"] = out.by_row[spec.teacher, seed]
            cell = Cell.model_validate(values)
            split_of(cell)  # finds impossible sizes before anything is trained
            key = key_of(cell, dataset(cell).digest)
            known = out.cells.get(key)
            rows = (*(known.rows if known else ()), row)
            out.cells[key] = Planned(key, cell, start_path, tuple(dict.fromkeys(rows)))
            out.by_row[row, seed] = key
    return out


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
        cell = Cell.model_validate(result["parameters"] | {"data_dir": data_dir})
        if key_of(cell, result["data"]["digest"]) != result["key"]:
            raise UserError(f"{role} (={key!r}) was made by an older version: run its table again.")
        planned = Planned(result["key"], cell)
        for parent in planned.parents.values():
            adopt(out, store, parent, data_dir)
        out.cells[planned.key] = planned
    return result["key"]


def file_digest(path: str) -> str:
    """SHA-256 of a checkpoint file: part of the key of cells that start from it."""
    try:
        return hashlib.sha256(Path(located(path)).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"start (={path!r}) is neither a row of this table, nor the key of a cell, nor a file "
            f"that can be read ({error.strerror})."
        ) from None


def located(path: str | None) -> str | None:
    """A path of a parameter: relative ones are meant from the project's folder."""
    return None if path is None else str(home() / Path(path).expanduser())


def dataset(cell: Cell) -> Dataset:
    """The data of a cell."""
    return opened(cell.data, cell.data_dir, cell.image_size)


def opened(name: str, folder: str | None = None, image_size: int | None = None) -> Dataset:
    """A data set; downloads are kept in the project's folder."""
    if folder is None and name.startswith("cifar"):
        folder = "data"
    return load(name, located(folder), image_size)


def split_of(cell: Cell) -> Splits:
    """The training and held-out images of a cell."""
    data = dataset(cell)
    return split(
        data,
        images=cell.train_images,
        held_out=cell.held_out,
        protocol=cell.protocol,
        seed=cell.seed,
    )


def new_model(cell: Cell) -> nn.Module:
    """The network of a cell as its seed initialises it."""
    data = dataset(cell)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(cell.seed, "initialisation"))
        return build(cell.body, cell.block, classes=len(data.classes), in_channels=data.in_channels)


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
    model = new_model(planned.cell)
    try:
        model.load_state_dict(weights["model"])
    except RuntimeError:
        raise UserError(
            f"the weights of cell {planned.key[:16]} do not fit its network: an older version of "
            f"the code made them; remove {store.folder(planned.key)} and run again."
        ) from None
    return model.eval()


def load_start(model: nn.Module, cell: Cell, path: str) -> None:
    """Begin from a file: a network of ours, a checkpoint, or RepAn's layout of its CIFAR bodies.

    Raises: UserError where it is damaged, or of another network.
    """
    try:
        if (own := checkpoint.load(Path(located(path)))) is not None:
            model.load_state_dict(own["model"])
    except checkpoint.Foreign:
        from replib import official
        from replib.checkpoint import load_model

        arch = "repan_" + cell.body.removeprefix("cifar_")
        try:
            ours = path.endswith(".safetensors")
            theirs = load_model(located(path)) if ours else official.load_model(located(path), arch)
            model.load_state_dict(theirs.state_dict())
        except (ValueError, RuntimeError, KeyError, OSError, EOFError) as error:
            raise unfit(path, cell, error) from None
    except (checkpoint.BadCheckpoint, RuntimeError, KeyError) as error:
        raise unfit(path, cell, error) from None


def unfit(path: str, cell: Cell, error: Exception) -> UserError:
    """A checkpoint that this network cannot start from, in one line."""
    text = " ".join(str(error).split())
    return UserError(f"start (={path!r}) is no checkpoint of {cell.body}: {text[:300]}")


def run_cell(
    planned: Planned,
    plan_cells: dict[str, Planned],
    store: Store,
    *,
    device: str = "cpu",
    compile: str = "none",
    decoders: int | None = None,
    deadline: float | None = None,
    checkpoint_seconds: float = 15,
    tick: Callable[..., None] = lambda resumed=0: None,
    say: Callable[[str], None] = print,
) -> None:
    """Train one cell, or go on with it, and leave its evidence and weights in the store.

    tick: called after every epoch, and before all with the number of those that were done before.
    compile: of replib.training.step.MODES; decoders: processes that read image files.
    Raises: replib.training.loop.OutOfTime at the deadline, after a checkpoint.
    """
    cell, key = planned.cell, planned.key
    started = time.monotonic()
    data, splits = dataset(cell), split_of(cell)
    model = new_model(cell)
    if planned.start_path is not None:
        load_start(model, cell, planned.start_path)
    elif cell.start is not None:
        model.load_state_dict(trained_model(plan_cells[cell.start], store).state_dict())
    teacher = None
    if cell.teacher is not None:
        teacher = deployed_copy(trained_model(plan_cells[cell.teacher], store))
        teacher = teacher.requires_grad_(False).to(device, memory_format=torch.channels_last)
    method, recipe = cycle_of(cell, model), recipe_of(cell)
    task = Task(
        model=model,
        data=data,
        train=splits.train,
        validation=splits.validation,
        recipe=recipe,
        groups=lambda: parameter_groups(model, cell.weight_decay, cell.decay, cell.bias_rate),
        loss=loss_of(cell, teacher),
        seed=cell.seed,
        method=method,
        device=device,
        decoders=decoders,
        compile=chosen(
            compile,
            device,
            flops=cost_of(planned, plan_cells),
            steps=planned.epochs * recipe.steps(len(splits.train)),
        ),
        say=say,
    )
    resume, problem = store.load(key, "checkpoint")
    if problem:
        say(problem)
    spent = resume["seconds"] if resume else 0.0
    if resume:
        tick(len(resume["progress"]["history"]))  # so that the bar begins where the run goes on

    def keep(state: dict) -> None:
        store.save(key, "checkpoint", state | {"seconds": spent + time.monotonic() - started})

    progress = fit(
        task,
        resume=resume,
        checkpoint=keep,
        checkpoint_seconds=checkpoint_seconds,
        deadline=deadline,
        tick=tick,
    )
    model.load_state_dict(progress.best["weights"])
    flops, teacher_flops = loop.training_flops(task)
    images = planned.epochs * recipe.images(len(splits.train))
    selected = progress.history[progress.best["index"]]
    result = {
        "key": key,
        "parameters": cell.model_dump(exclude={"data_dir"}),
        "data": {"name": data.name, "digest": data.digest, "test_images": len(data.test_labels)},
        "versions": versions_of(cell),
        "images": {"train": len(splits.train), "held_out": len(splits.validation)},
        "history": columns(progress.history),
        "restarts": columns(progress.restarts),
        "kept_blocks": method.kept if method is not None else {},
        "final": {
            "last": progress.history[-1]["test_accuracy"],
            "validation_best": best_of(progress.history, "validation_accuracy"),
            "test_best": best_of(progress.history, "test_accuracy"),
            "selected_by": recipe.select,
            "selected_epoch": progress.best["index"],
            "selected": selected["test_accuracy"],
        },
        "deployed": deployed_report(model, Split.test(data, device)),
        "compute": {
            "epochs": planned.epochs,
            "training_flops": flops * images,
            "teacher_flops": teacher_flops * images,
        },
    }
    store.save(key, "weights", {"model": progress.best["weights"]})
    seconds = spent + time.monotonic() - started
    store.write(key, result, context(device, seconds, cell.precision, task.compile))


def cost_of(planned: Planned, plan_cells: dict[str, Planned]) -> float:
    """Training FLOPs of a cell, by shapes alone: the student's forward three times, the teacher's
    once. An estimate, for deciding; `loop.training_flops` measures what evidence says."""
    cell = planned.cell
    flops = 3 * forward_flops(*network_of(cell))
    if cell.teacher in plan_cells:
        flops += forward_flops(*network_of(plan_cells[cell.teacher].cell))
    return flops * planned.epochs * len(split_of(cell).train)


def network_of(cell: Cell) -> tuple:
    """What `forward_flops` needs to know of a cell."""
    data = dataset(cell)
    sides = (cell.resized_crop,) * 2 if cell.resized_crop else tuple(data.train_images.shape[-2:])
    return cell.body, cell.block, len(data.classes), (data.in_channels, *sides)


@functools.lru_cache
def forward_flops(body: str, block: str, classes: int, shape: tuple[int, int, int]) -> int:
    """FLOPs of the training form's forward pass on one image of `shape` (C, H, W)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # computes nothing
        model = build(body, block, classes=classes, in_channels=shape[0])
        model(torch.empty(2, *shape))
    return counter.get_total_flops() // 2


def cycle_of(cell: Cell, model: nn.Module) -> cycle.Cycle | None:
    """The cycle of a cell, or None for plain training."""
    if cell.cycle is None:
        return None
    return cycle.Cycle(model, **cell.cycle.model_dump(), seed=derive(cell.seed, "redraw"))


def recipe_of(cell: Cell) -> Recipe:
    """What the training loop needs to know."""
    names = Recipe.__dataclass_fields__.keys() & Cell.model_fields.keys() - {"schedule"}
    return Recipe(
        **{name: getattr(cell, name) for name in names} | {"betas": tuple(cell.betas)},
        schedule=cell.rate_schedule(),
        augmentation=cell.augmentation(),
        select="test" if cell.protocol == "paper" else "validation",
        reseed_each_phase=cell.cycle is not None and cell.cycle.reseed,
    )


def loss_of(cell: Cell, teacher: nn.Module | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(logits, labels, inputs) -> loss: cross-entropy, or distillation from the teacher."""
    if teacher is None:
        return lambda logits, labels, inputs: F.cross_entropy(logits, labels)

    def distilled(logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teacher(inputs)
        return distill.distillation_loss(
            logits,
            taught,
            labels,
            alpha=cell.distill.alpha,
            temperature=cell.distill.temperature,
        )

    return distilled


def columns(rows: list[dict]) -> dict[str, list]:
    """A list of records as one list per field."""
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


def best_of(history: list[dict], name: str) -> dict | None:
    """Test accuracy at the epoch where `name` is highest (the last of equals for validation)."""
    if history[0][name] is None:
        return None
    order = range(len(history)) if name == "test_accuracy" else reversed(range(len(history)))
    index = max(order, key=lambda i: history[i][name])
    return {"epoch": index, "test_accuracy": history[index]["test_accuracy"]}


def context(device: str, seconds: float, precision: str, compile: str) -> dict:
    """Where and how a cell was run; not part of the hashed result.

    The peak of memory is that of the worker process so far, which may have run other cells.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    on_gpu = device.startswith("cuda")
    return machine.context(device, home(), ("torch", "torchvision", "numpy")) | {
        "precision": precision,
        "evaluation_precision": "float32",
        "compile": compile,
        "tf32": on_gpu and torch.backends.cudnn.allow_tf32,
        "wall_seconds": round(seconds, 2),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak,
        "exit_state": "finished",
    }
