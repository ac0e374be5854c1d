"""Several processes that train one network: what they must agree on (torch.distributed).

Every process holds the whole network and sees images of its own; gradients are averaged, by
DistributedDataParallel in one's own loop and by replib.training.step in ours. What changes a
network otherwise, merging, drawing, growing, measuring, is done by all of them, and ends here.
Alone, or without a process group, nothing here does anything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that `torchrun --nproc-per-node N` has started, each on its own GPU."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place() -> int:
    """Which of them this one is, from 0: the first one writes files and says things."""
    return dist.get_rank() if processes() > 1 else 0


def wait() -> None:
    """Until all processes are here."""
    if processes() > 1:
        dist.barrier()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """The values of tensors, of one dtype and device, as one vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def spread(values: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write such a vector back."""
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, values.split(sizes), strict=True):
        tensor.copy_(part.view(tensor.shape))


def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors by dtype and device."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


def together(tensors: Iterable[Tensor], collective: Callable[[Tensor], object]) -> None:
    """A collective on tensors, in place, as on one vector for each dtype and device."""
    for members in alike(tensors):
        values = flat(members)
        collective(values)
        spread(values, members)


def agree(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first one, bit for bit.

    Between two forward passes the running statistics of processes differ, and so does all that is
    computed from them.
    """
    if processes() > 1:
        tensors = (*model.parameters(), *model.buffers())
        together(tensors, lambda flat: dist.broadcast(flat, 0))


def add_up(tensors: Iterable[Tensor]) -> None:
    """Set tensors to their sum over all processes, equal bit for bit."""
    if processes() > 1:
        together(tensors, dist.all_reduce)


def average(tensors: Iterable[Tensor]) -> None:
    """Set tensors, floating-point ones, to their mean over all processes."""
    if processes() > 1:

        def mean(flat: Tensor) -> None:
            dist.all_reduce(flat)
            flat.div_(processes())

        together(tensors, mean)


def of_all(value: object) -> list:
    """What a value, of plain data, is in each process, in order; in all of them."""
    if processes() == 1:
        return [value]
    found: list = [None] * processes()
    dist.all_gather_object(found, value)
    return found


def same(model: nn.Module) -> bool:
    """Whether all processes hold the same parameters, bit for bit; waits for the device."""
    if processes() == 1:
        return True
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        values = parameter.detach().cpu().contiguous().view(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return len(set(of_all(digest.hexdigest()))) == 1


def check(model: nn.Module, remedy: str) -> None:
    """Raises: RuntimeError, with the remedy, where processes do not hold the same parameters."""
    if not same(model):
        raise RuntimeError(
            "the processes hold different parameters: their gradients have not been averaged. "
            + remedy
        )


def of_the_first(values: Sequence[float | None]) -> list[float | None]:
    """What these numbers are in the first process; CPU tensors need a backend, such as gloo."""
    if processes() == 1:
        return list(values)
    given = [float("nan") if value is None else value for value in values]
    sent = torch.tensor(given, dtype=torch.float64)
    dist.broadcast(sent, 0)
    return [
        None if value is None else got for value, got in zip(values, sent.tolist(), strict=True)
    ]


# -- a batch, dealt out ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Share:
    """What one process sees of a batch that goes through the network part by part."""

    images: int  # of the whole batch
    rows: slice  # of it
    parts: int  # how many parts they are; 0: they do not count
    later: int  # parts that come after them, of other processes
    count: int  # parts in all
    split: bool = False  # whether they are of one part, that all processes share

    @property
    def alone(self) -> bool:
        """Whether the whole batch is one part, and this process's."""
        return self.parts == self.count == 1 and not self.split


def splits(accumulate: int) -> bool:
    """Whether several processes share each part of a batch: where it is one part, its norms see
    all of it (`synchronised`), however many processes there are."""
    return accumulate == 1 and processes() > 1


def share(images: int, part: int, split: bool = False) -> Share:
    """This process's parts, of `part` images each, the last perhaps smaller: in a row, and as many
    as another's, give or take one. Where there are none left its rows are of another's part, which
    it goes through for nothing, so that its gradients are 0 where the others' are numbers.

    split: the batch is one part, and the processes have as many images each, give or take one.
    """
    if split:
        first, last = (images * turn // processes() for turn in (place(), place() + 1))
        rows = slice(first, last) if first < last else slice(0, 1)
        return Share(images, rows, int(first < last), 0, 1, split=True)
    count = -(-images // part)
    first, last = (count * turn // processes() for turn in (place(), place() + 1))
    rows = slice(first * part, min(last * part, images))
    rows = rows if first < last else slice(0, min(part, images))
    return Share(images, rows, last - first, count - last, count)


class Statistics:
    """Running statistics of a network whose processes see the parts of a batch side by side.

    They become what they are in one process that sees the parts one after the other: with momentum
    m, part after part, r <- (1 - m) r + m s is linear in r and in every s. What is no running
    statistic, a counter, becomes the sum of what was added.
    """

    def __init__(self, model: nn.Module):
        stays: dict[Tensor, float] = {}
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.momentum is not None:
                stays |= dict.fromkeys((norm.running_mean, norm.running_var), 1 - norm.momentum)
        buffers = [b for b in model.buffers() if b.dtype != torch.bool] if processes() > 1 else []
        self.groups = [
            (members, flat([torch.full_like(b, stays.get(b, 1)) for b in members]))
            for members in alike(buffers)
        ]

    @contextmanager
    def in_turn(self, share: Share) -> Iterator[None]:
        """Around the passes of one step."""
        if share.split:  # they are the same in all processes
            with counting(share.parts > 0):
                yield
            return
        before = [flat(buffers) for buffers, _ in self.groups]
        yield
        for (buffers, stays), old in zip(self.groups, before, strict=True):
            seen = (flat(buffers) - old * stays**share.parts) * stays**share.later
            seen = seen if share.parts else torch.zeros_like(seen)
            dist.all_reduce(seen)
            spread(seen + old * stays**share.count, buffers)


# -- a norm over all processes ---------------------------------------------------------------------
_counts = True  # whether what this process sees now is part of the batch
_exchanged = True  # whether synchronised norms are


@contextmanager
def counting(counts: bool) -> Iterator[None]:
    """Whether what this process's norms see comes into the statistics of all."""
    global _counts
    before, _counts = _counts, counts
    try:
        yield
    finally:
        _counts = before


@contextmanager
def apart() -> Iterator[None]:
    """Norms see what is in their own process, synchronised or not: for what all processes do with
    the same images, or what is averaged over them afterwards."""
    global _exchanged
    before, _exchanged = _exchanged, False
    try:
        yield
    finally:
        _exchanged = before


class SumOverProcesses(torch.autograd.Function):
    """A tensor -> its sum over all processes. Each of them goes on with the sum, so the gradient
    is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOverProcesses.forward(ctx, gradient)


class Synchronised(nn.SyncBatchNorm):
    """A batch norm over the batches of all processes, by operations of any device: PyTorch's own
    knows GPUs only, and counts what a process went through for nothing.

    Mean and variance are those of all images, whatever each process has of them, the variance
    about the common mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and _exchanged and processes() > 1):
            return nn.modules.batchnorm._BatchNorm.forward(self, x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        values, axes = x.to(dtype), (0, *range(2, x.dim()))
        view = (-1,) + (1,) * (x.dim() - 2)
        count = torch.full((1,), float(_counts) * x.numel() / x.shape[1], dtype=dtype).to(x.device)
        variance, mean = torch.var_mean(values, axes, correction=0)
        *total, whole = SumOverProcesses.apply(torch.cat([mean * count, count])).split(
            [x.shape[1], 1]
        )
        common = total[0] / whole
        own = variance + (mean - common).square()
        variance = SumOverProcesses.apply(own * count) / whole
        self.track(common.detach(), variance.detach(), whole.detach())
        y = (values - common.view(view)) * (variance + self.eps).rsqrt().view(view)
        if self.affine:
            y = y * self.weight.to(dtype).view(view) + self.bias.to(dtype).view(view)
        return y.to(x.dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics as PyTorch's batch norm does (the variance unbiased)."""
        if self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / self.num_batches_tracked.item()
        unbiased = variance * (count / (count - 1))
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(value.to(running.dtype), momentum)


def synchronised(model: nn.Module) -> nn.Module:
    """The model with every batch norm as a `Synchronised` one, its tensors the very same; call it
    before an optimizer, a method of replib or DistributedDataParallel is given the model."""
    if type(model) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        made = Synchronised(model.num_features, model.eps, model.momentum)
        made.affine, made.track_running_stats = model.affine, model.track_running_stats
        made._parameters, made._buffers = model._parameters, model._buffers
        return made.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, synchronised(child))
    return model
