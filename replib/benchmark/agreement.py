"""Whether two ways compute the same thing: what must hold before their times are compared.

The reference is the branch-by-branch network in float64. In float64 a way must agree with it up
to `EXACT`. The step that is timed may be at most `SLACK` times as far from it as that network is
itself in the precision and in the memory layout of the step.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib import official
from replib.benchmark.timing import rounded
from replib.networks import branch_by_branch
from replib.training.step import Step

EXACT = 1e-8  # in float64: what is wrong is wrong by more, what is rounded by less
SLACK = 8  # sums in another order: errors of the same size, the largest of some hundred tensors
FLOOR = 256  # in units of eps: what a network that is luckier than that is still allowed
# What no step may exceed, however large the network's own error: gradients of a deep network are
# off by per cents where a ReLU sees a float32 on the other side of 0.
# One ReLU there moves gradients by tenths of a per cent, and the reference may have met none.
LEAST = {"gradients": 0.01}
CAPS = {"outputs": 0.05, "gradients": 0.5, "statistics": 0.05, "weights": 0.05}
PARTS = ("outputs", "gradients", "statistics")


class Unequal(Exception):
    """Two ways that were to be compared do not compute the same thing."""


@dataclass(frozen=True)
class Pass:
    """What one pass in train mode leaves: by names, in float64."""

    outputs: dict[str, Tensor]  # the loss; of a network that can be asked, the logits
    gradients: dict[str, Tensor]  # of parameters by name; likewise, of the input
    statistics: dict[str, Tensor]


# What can be compared with the reference: of a training step as it is timed, and of a network
# of another code, whose parameters have other names.
VIEWS: dict[str, Callable[[str], bool]] = {
    "step": lambda name: name not in ("logits", "the input"),
    "network": lambda name: name in ("loss", "logits", "the input"),
    "everything": lambda name: True,
}


def left_by(model: nn.Module, outputs: Mapping, gradients: Mapping) -> Pass:
    """What a pass that just went through the model has left."""
    buffers = {k: v for k, v in model.named_buffers() if v.is_floating_point()}

    def exact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.detach().double().clone() for k, v in tensors.items()}

    return Pass(exact(outputs), exact(gradients), exact(buffers))


def network_pass(model: nn.Module, x: Tensor, labels: Tensor) -> Pass:
    """Logits, gradients and running statistics of a network; it is as before afterwards."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    with buffers_kept(model):
        logits = model(x)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        gradients["the input"] = x.grad
        found = left_by(model, {"loss": loss, "logits": logits}, gradients)
    model.zero_grad()
    return found


def step_pass(model: nn.Module, step: Step, x: Tensor, labels: Tensor) -> Pass:
    """The same of a training step at learning rate 0, in the very form that is timed.

    From a momentum of 0 a step leaves its gradients in the momentum: also where it is the replay
    of a recording, whose gradients no parameter holds.
    """
    with buffers_kept(model):
        step.restart()
        loss = step(x, labels)
        state = step.optimizer.state
        gradients = {k: state[p]["momentum_buffer"] for k, p in model.named_parameters()}
        return left_by(model, {"loss": loss}, gradients)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put running statistics back: in place, since a recorded step reads these very tensors."""
    before = {k: v.clone() for k, v in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def reference_pass(model: nn.Module, x: Tensor, labels: Tensor) -> Pass:
    """The pass of a branch-by-branch copy in float64."""
    exact = branch_by_branch(copy.deepcopy(model)).double()
    return network_pass(exact, x.double(), labels)


def largest(values: Iterable[float]) -> float:
    """The largest; nan where one is nan, which max() may pass over."""
    values = list(values)
    return next((v for v in values if v != v), None) or max(values)


def distances(found: Pass, reference: Pass, view: str) -> dict[str, float]:
    """{part: error}: the largest over its tensors of |a - b| / (|b| + 1 % of the largest |b|).

    A weight under a norm has gradients that nearly cancel, hence the second term. What the way
    does not have is infinitely far. view: of `VIEWS`.
    """
    errors = {}
    for part in PARTS:
        ours, theirs = getattr(found, part), getattr(reference, part)
        scale = max((tensor.norm().item() for tensor in theirs.values()), default=0.0)

        def error(name: str, ours=ours, theirs=theirs, scale=scale) -> float:
            if name not in ours:
                return math.inf
            apart = (ours[name] - theirs[name]).norm()
            return (apart / (theirs[name].norm() + 0.01 * scale)).item()

        each = [error(name) for name in theirs if VIEWS[view](name)]
        if each:
            errors[part] = largest(each)
    return errors


def agreement(errors: Mapping[str, float], own: Mapping[str, float], eps: float) -> dict:
    """{"equal", "errors", "allowed"} of a way; own: of the reference in the way's precision."""
    caps = {part: max(CAPS[part], 64 * eps) for part in errors}  # half precision rounds by more
    least = {part: max(FLOOR * eps, LEAST.get(part, 0)) for part in errors}
    allowed = {part: min(max(SLACK * own[part], least[part]), caps[part]) for part in errors}
    return {
        "equal": bool(errors) and all(errors[part] <= allowed[part] for part in errors),
        "errors": {part: rounded(error) for part, error in errors.items()},
        "allowed": {part: rounded(bound) for part, bound in allowed.items()},
    }


def difference(result: Mapping) -> str:
    """Why two ways are not equal, in one line."""
    wrong = [
        f"{part} differ by {'what is no number' if error is None else f'{error:.1e}'}, "
        f"{result['allowed'][part]:.1e} is rounding"
        for part, error in result["errors"].items()
        if error is None or not error <= result["allowed"][part]
    ]
    return "; ".join(wrong)


# -- the reference itself -------------------------------------------------------------------------
# What the official implementations computed; a file's name begins with its block's.
SOURCES = {
    "repvgg": "repvgg",
    "acb": "acb",
    "dbb": "dbb",
    "orepa1x1": "orepa_1x1",
    "orepa-largeconvbase": "orepa_stem_base",
    "orepa-largeconv": "orepa_stem",
    "orepavgg": "orepa_repvgg",
    "orepa": "orepa",
    "mobileone": "mobileone",
    "replk": "replk",
    "dyrep": "dyrep",
}
WITH_RELU = {"repvgg", "mobileone", "orepa_repvgg"}  # the released block ends with it
OUTPUT, GRADIENT = 2e-6, 1e-4  # float32 sums in another order; gradients pass two norms


def official_vectors(folder: Path) -> list[dict]:
    """{"file", "errors", "equal"} for every block in a folder of official numbers (*.npz).

    The branch-by-branch block in train mode: outputs, running statistics and gradients.
    """
    rows = []
    for path in sorted(folder.glob("*.npz")):
        source = next((s for prefix, s in SOURCES.items() if path.stem.startswith(prefix)), None)
        if source is not None:
            errors = vector_errors(path, source)
            bounds = {"outputs": OUTPUT, "gradients": GRADIENT, "statistics": OUTPUT}
            equal = all(error <= bounds[part] for part, error in errors.items())
            errors = {part: rounded(error) for part, error in errors.items()}
            rows.append({"file": path.stem, "errors": errors, "equal": equal})
    return rows


def vector_errors(path: Path, source: str) -> dict[str, float]:
    """The largest differences in a file, relative to its largest number (or to 1)."""
    import numpy as np

    with np.load(path) as file:
        arguments = json.loads(str(file["info"]))["args"]
        values = {k: torch.from_numpy(file[k]) for k in file.files if k != "info"}

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

    def error(ours: Tensor, theirs: Tensor, scale: float = 1.0) -> float:
        worst = (ours.double() - theirs.double()).abs().max().item()
        return worst / max(scale, theirs.abs().max().item())

    block = official.load_block(source, arguments, under("state/")).train()
    branch_by_branch(block)
    x = values["x"].clone().requires_grad_()
    y = block(x).relu() if source in WITH_RELU else block(x)
    (y * values["grad_output"]).sum().backward()
    table, own = official.block_table(block, source), dict(block.named_parameters())
    theirs = under("grad/")
    of_input = theirs.pop("input")
    scale = max(gradient.abs().max().item() for gradient in theirs.values())
    gradients = [error(x.grad, of_input)]
    for key, gradient in theirs.items():
        ours = table[key].write(*(own[name].grad for name in table[key].ours))
        gradients.append(error(ours, gradient, scale))
    state = official.export_block(block, source)
    statistics = [error(state[k], v) for k, v in under("state_after/").items()]
    found = {"outputs": error(y.detach(), values["y_train"]), "gradients": largest(gradients)}
    return found | ({"statistics": largest(statistics)} if statistics else {})
