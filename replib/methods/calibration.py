"""Running statistics of norms, measured anew on batches of images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from replib import parallel

NORMS = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    where: Callable[[str, nn.Module], bool] = lambda name, norm: True,
) -> list[str]:
    """Set the running statistics of batch norms to the average over batches; their names.

    batches: inputs of the model, (N, C, H, W) each, all of equal weight. Every norm sees what the
    norms before it give in train mode, that is normalised by the batch. Weights, momentum and the
    train or eval mode of every module are left as they were; norms without running statistics, and
    those where where(name, norm) is False, are not touched and act as in eval mode. Of several
    processes each gives batches of its own, as many, and all get the average over all of them.
    Sources: Izmailov et al., "Averaging Weights Leads to Wider Optima", UAI 2018, section 3.2;
    Huang et al., DyRep, CVPR 2022, after a change of structure.
    Raises: ValueError without a batch; nothing is changed then.
    """
    named = {name: m for name, m in model.named_modules() if isinstance(m, NORMS)}
    chosen = {n: m for n, m in named.items() if m.track_running_stats and where(n, m)}
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("batches (= none) must hold at least one batch of images.")
    for norm in chosen.values():
        norm.reset_running_stats()
    # None: the cumulative average
    with in_full_precision(model), normalised_by_batch(model, chosen.values(), None):
        for batch in (first, *batches):
            model(batch)
    measured = [norm.running_mean for norm in chosen.values()]
    parallel.average(measured + [norm.running_var for norm in chosen.values()])
    return list(chosen)


@contextmanager
def in_full_precision(model: nn.Module) -> Iterator[None]:
    """Without autocast, which keeps the values that it has cast while the model's own change."""
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        yield
    torch.clear_autocast_cache()


@contextmanager
def normalised_by_batch(
    model: nn.Module, norms: Collection[nn.Module], momentum: float | None
) -> Iterator[None]:
    """The model in eval mode, but for these norms, which use the statistics of the batch.

    momentum: theirs meanwhile; 0 leaves the running statistics as they are.
    """
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    try:
        model.eval()
        for norm in norms:
            norm.momentum = momentum
            norm.train()
        with parallel.apart():
            yield
    finally:
        for norm, own in momenta.items():
            norm.momentum = own
        for module, training in modes.items():
            module.training = training
