"""One training step: forward, loss, backward, clipping, the method's part, the optimizer.

The same step in several ways, `MODES`: eager; with forward, loss and backward compiled by
torch.compile; and, on a GPU, recorded as a whole into one CUDA graph that is replayed. Batches of
another size than the full one (the last of an epoch) always run eagerly.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from replib import parallel
from replib.errors import UserError
from replib.parallel import Share

MODES = {
    "none": "every operation is launched by itself",
    "default": "forward, loss and backward are compiled (torch.compile)",
    "cudagraphs": "the same, and the whole step is one CUDA graph; on a GPU only",
    "recorded": "the whole step is one CUDA graph, and not compiled; on a GPU only",
    "auto": "chosen by the length of the run: see `chosen`",
}
RECORDED = ("cudagraphs", "recorded")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Compiling RepVGG-A1 takes about a minute. On a processor that saves a third of each step, so it
# is repaid after minutes; `auto` asks for about an hour of one core (3e10 FLOPs a second). A GPU
# spends some 20 ms on launching the eager step, which this number of steps turns into minutes.
WORTH_FLOPS, WORTH_STEPS = 1e14, 5000
NETWORKS = 64  # structures that one process compiles before it stops to
WARM_UP = 3  # steps before a recording, as torch.cuda.graphs asks for


def chosen(mode: str, device: str, *, flops: float, steps: int, changes: bool = False) -> str:
    """What a run of `steps` steps and `flops` training FLOPs in all does under `mode` of MODES.

    `auto`: on a GPU "cudagraphs" from `WORTH_STEPS` steps on; on a processor "default" from
    `WORTH_FLOPS` on, where there is a C++ compiler; else "none". By the cell alone, not by a
    clock, so that a run which is stopped and goes on decides alike.
    changes: whether the structure of the network changes time and again. Compiling it anew takes
    a minute each time, recording it a second or so: `auto` then compiles nothing.
    Raises: UserError for a mode that the device does not have.
    """
    if mode not in MODES:
        raise UserError(f"compile (={mode!r}) must be one of {', '.join(MODES)}.")
    on_gpu = device.startswith("cuda")
    if mode in RECORDED and not on_gpu:
        raise UserError(f"compile (={mode}) needs a GPU: say default, auto or none.")
    if mode != "auto":
        return mode
    if on_gpu:
        long = "recorded" if changes else "cudagraphs"
        return long if steps >= WORTH_STEPS else "none"
    worth = flops >= WORTH_FLOPS and not changes
    return "default" if worth and why_not(device) is None else "none"


def autocast(device: str, precision: str) -> torch.autocast:
    """What a step computes under, in a precision of PRECISIONS."""
    lower = PRECISIONS[precision] is not torch.float32
    dtype = torch.bfloat16 if lower else None
    # Without a cache of cast weights: a recording would read what it no longer holds.
    kind = torch.device(device).type
    return torch.autocast(kind, dtype, enabled=lower, cache_enabled=False)


def why_not(device: str) -> str | None:
    """What torch.compile lacks here: a C++ compiler, or Triton on a GPU. None: nothing."""
    if device.startswith("cuda"):
        return None if importlib.util.find_spec("triton") else "there is no Triton"
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    return None if any(map(shutil.which, compilers)) else "there is no C++ compiler"


class Step:
    """One step of training on a batch; returns its loss as a 0-dim tensor, without waiting for it.

        step = Step(model, optimizer, objective, batch=128, compile="default")
        for images, labels in batches:
            total += step(images, labels)

    objective: tensors of one batch -> scalar loss; all that it reads besides them must be tensors
    that stay where they are, such as parameters and buffers. A teacher belongs in it, too.
    optimizer: with its state allocated (`sgd`, `adamw`), its rates set by `set_rate`.
    clipped: the parameters whose gradients are clipped to a common norm of `clip_norm`.
    after_backward: called between clipping and the optimizer; it may set gradients to None.
    accumulate: a batch goes through the network in so many parts, one after the other, whose
    gradients add up to that of its mean loss: less memory, and norms see a part as one of so many
    GPUs would. `objective` is then given the parts. Of several processes each takes its share of
    them, `parallel.share(images of the batch, step.part)`; gradients, loss and running statistics
    are afterwards those of one process that sees all. A batch that is one part is split among
    them; its norms must be synchronised.
    variant: what it does there depends on this value, besides tensors; each has its recording.
    others: tensors that it changes there, in place; those of model and optimizer apart.
    batch: the length of the first axis of a full batch.
    say: takes a line for the user where compiling fails; the step then goes on without.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Callable[..., Tensor],
        *,
        batch: int,
        clipped: list[nn.Parameter] | None = None,
        clip_norm: float | None = None,
        after_backward: Callable[[], None] = lambda: None,
        accumulate: int = 1,
        variant: Callable[[], Hashable] = lambda: None,
        others: Iterable[Tensor] = (),
        precision: str = "float32",
        compile: str = "none",
        say: Callable[[str], None] = print,
    ):
        self.split = parallel.splits(accumulate)
        if parallel.processes() > 1 and compile in RECORDED:
            compile = "default" if compile == "cudagraphs" else "none"
        if self.split:
            compile = "none"  # what norms exchange is not compiled
        self.model, self.optimizer, self.batch = model, optimizer, batch
        self.clipped = parameters_of(optimizer) if clipped is None else clipped
        self.clip_norm, self.after_backward, self.variant = clip_norm, after_backward, variant
        self.others = list(others)
        self.mode, self.say = compile, say
        self.part = math.ceil(batch / accumulate)  # images that go through the network at once
        self.structure = structure(model)
        self.statistics = parallel.Statistics(model)
        device = next(model.parameters()).device.type

        def forward(*inputs: Tensor) -> Tensor:
            with autocast(device, precision):
                return objective(*inputs)

        self.eager = self.forward = forward
        self.compiled = compile in ("none", "recorded")  # nothing is left to be compiled
        self.recorder: Recorder | None = None
        self.recordings: dict[Hashable, Callable[..., Tensor]] = {}

    @property
    def fits(self) -> bool:
        """Whether the model still has the structure and the very tensors it had: then this step,
        compiled and recorded as it is, goes on to train it."""
        return structure(self.model) == self.structure

    def share(self, images: int) -> Share:
        """What this process takes of a batch of so many images."""
        return parallel.share(images, self.part, self.split)

    def __call__(self, *inputs: Tensor, share: Share | None = None) -> Tensor:
        """inputs: the rows of the batch that are this process's, by default all of it."""
        share = share or self.share(len(inputs[0]))
        if self.mode == "none" or share.images != self.batch:
            return self.update(self.eager, *inputs, share=share)
        if not self.compiled:
            self.compile(*inputs, share=share)
        if self.mode not in RECORDED:
            return self.update(self.forward, *inputs, share=share)
        variant = self.variant()
        if variant not in self.recordings:
            self.recordings[variant] = self.recorded(*inputs)
        return self.recordings[variant](*inputs)

    def update(
        self, forward: Callable[..., Tensor], *inputs: Tensor, share: Share | None = None
    ) -> Tensor:
        """The step itself."""
        share = share or self.share(len(inputs[0]))
        self.optimizer.zero_grad()
        with self.statistics.in_turn(share):
            loss = self.backward(forward, share, *inputs)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        parallel.add_up([loss, *gradients])
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.clipped, self.clip_norm)
        self.after_backward()
        self.optimizer.step()
        return loss

    def backward(self, forward: Callable[..., Tensor], share: Share, *inputs: Tensor) -> Tensor:
        """This process's share of the mean loss of a batch, and of its gradients, part by part."""
        if share.alone:
            loss = forward(*inputs)
            loss.backward()
            return loss.detach()
        total = 0.0
        for part in zip(*(value.split(self.part) for value in inputs), strict=True):
            weight = len(part[0]) / share.images if share.parts else 0.0
            loss = forward(*part) * weight
            loss.backward()
            total = total + loss.detach()
        return total

    def compile(self, *inputs: Tensor, share: Share | None = None) -> None:
        """Compile forward and backward, by a step that leaves no trace; eager where that fails."""
        device, self.compiled = next(self.model.parameters()).device.type, True
        if missing := why_not(device):
            self.say(f"not compiled: {missing} here.")
            self.mode = "none" if self.mode == "default" else self.mode
            return
        try:
            self.forward = torch.compile(self.eager, dynamic=False)
            # A process that trains one network after another keeps what it compiled for each.
            with self.left_alone(), torch._dynamo.config.patch(recompile_limit=NETWORKS):
                self.update(self.forward, *inputs, share=share)
        except Exception as error:  # whatever a compiler stumbles over, the eager step may not
            self.say(f"not compiled: {in_one_line(error)}")
            self.forward = self.eager
            self.mode = "none" if self.mode == "default" else self.mode

    def recorded(self, *inputs: Tensor) -> Callable[..., Tensor]:
        """The step as one CUDA graph; as it is where it cannot be recorded."""
        fixed = [value.clone() for value in inputs]
        try:
            with self.left_alone():
                self.recorder = self.recorder or Recorder()
                replay = self.recorder(lambda: self.update(self.forward, *fixed))
        except Exception as error:
            self.say(f"not recorded as a CUDA graph: {in_one_line(error)}")
            self.mode = "none" if self.forward is self.eager else "default"
            return lambda *given: self.update(self.forward, *given)

        def step(*given: Tensor) -> Tensor:
            for target, value in zip(fixed, given, strict=True):
                target.copy_(value)
            return replay().clone()  # the next replay writes over what this one returned

        return step

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Put back, at the end, every value that a step changes."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.others]
        tensors += [value for value in states if isinstance(value, Tensor)]
        with torch.no_grad(), torch.random.fork_rng(devices_of(tensors)):
            kept = [tensor.clone() for tensor in tensors]
            try:
                with torch.enable_grad():
                    yield
            finally:
                for tensor, value in zip(tensors, kept, strict=True):
                    tensor.copy_(value)
                self.optimizer.zero_grad()

    def restart(self) -> None:
        """A fresh optimizer: all that it has gathered is forgotten, in place."""
        for state in self.optimizer.state.values():
            for value in state.values():  # momentum, moments, the number of steps: they start at 0
                value.zero_()


class Recorder:
    """Records what a function launches on the current GPU; the recordings share their memory,
    since no two run at once and nothing of one is read after another has run."""

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A replay of `function`, which fills and returns the same tensor every time."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):  # what libraries allocate and choose at first use
                function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            out = function()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def structure(model: nn.Module) -> tuple:
    """What a compiled or recorded step depends on: the modules, and the tensors themselves."""
    tensors = (*model.parameters(), *model.buffers())
    return repr(model), tuple(Same(tensor) for tensor in tensors)


class Same:
    """Equal only to what holds the very same tensor; it keeps the tensor, so that no other can
    take its place in memory."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.tensor is other.tensor

    __hash__ = None


def devices_of(tensors: list[Tensor]) -> list[torch.device]:
    """The GPUs that tensors lie on."""
    return list({tensor.device for tensor in tensors if tensor.is_cuda})


def in_one_line(error: Exception) -> str:
    """An error's class and the beginning of what it says."""
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}"


# -- the optimizer ---------------------------------------------------------------------------------
def sgd(
    groups: list[dict],
    *,
    momentum: float,
    nesterov: bool,
    kind: Callable[..., torch.optim.SGD] = torch.optim.SGD,
) -> torch.optim.SGD:
    """SGD, or a kind of it, in one launch for all parameters, its momentum allocated and 0.

    A first step from a momentum of 0 is that of torch without any: buf = 0 momentum + gradient.
    """
    optimizer = kind(groups, lr=0.0, momentum=momentum, nesterov=nesterov, fused=True)
    for parameter in parameters_of(optimizer) if momentum else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(groups: list[dict], *, betas: tuple[float, float], epsilon: float) -> torch.optim.AdamW:
    """AdamW in one launch for all parameters, its moments allocated and 0.

    Its count of steps lies on the device, so that a CUDA graph can hold the step (`capturable`).
    """
    on_gpu = groups[0]["params"][0].is_cuda
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=betas, eps=epsilon, fused=True, capturable=on_gpu
    )
    for parameter in parameters_of(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of all groups, times a group's own "lr_scale" (timm's name for it); on a
    GPU as a tensor, which a recorded step reads anew."""
    for group in optimizer.param_groups:
        parameter, own = group["params"][0], rate * group.get("lr_scale", 1.0)
        if not parameter.is_cuda:
            group["lr"] = own
        elif isinstance(group["lr"], Tensor) and group["lr"].is_cuda:
            group["lr"].fill_(own)
        else:
            group["lr"] = torch.full((), own, device=parameter.device)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
