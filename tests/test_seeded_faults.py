"""The tests of the blocks notice the mistakes that are easy to make: each is made on purpose."""

import pytest
import test_blocks
import torch

from replib import branches, kernels
from replib.kernels import Kernel

RESIZED, COMPOSED, SCALED = kernels.resized, kernels.composed, kernels.scaled
REGROUPED = kernels.regrouped
AFFINE = branches.Norm.affine


def wrong_axis(kernel, size, dilation):
    """Height padding for the width and the reverse, as a released helper does."""
    turned = Kernel(kernel.weight.transpose(-1, -2), kernel.bias, kernel.groups)
    return RESIZED(turned if kernel.size != tuple(size) else kernel, size, dilation)


def dropped_bias(first, second):
    silent = Kernel(first.weight, torch.zeros_like(first.bias), first.groups, first.dilation)
    return COMPOSED(silent, second)


def dropped_shift(kernel, factor, shift=None):
    return SCALED(kernel, factor)


def stale_statistics(self, dtype=torch.float64):
    """Those of a new norm."""
    fresh = branches.Norm(self.in_channels, self.dims).to(self.norm.weight)
    fresh.norm.weight, fresh.norm.bias = self.norm.weight, self.norm.bias
    return AFFINE(fresh, dtype)


def no_inner_padding(self, end):
    return None


def misgrouped(kernel, groups):
    """The slots of an identity counted through instead of within the group."""
    out = REGROUPED(kernel, groups)
    shifted = out.weight.roll(1, 1) if groups > 1 and kernel.groups != groups else out.weight
    return Kernel(shifted, out.bias, groups, out.dilation)


FAULTS = {  # what is replaced, by what, and a block that shows it
    "wrong axis": (kernels, "resized", wrong_axis, "acb", "plain"),
    "missing inner padding": (branches.Chain, "value_at_zero", no_inner_padding, "dbb", "plain"),
    "dropped bias": (kernels, "composed", dropped_bias, "dbb", "plain"),
    "dropped shift of a norm": (kernels, "scaled", dropped_shift, "repvgg", "plain"),
    "stale statistics": (branches.Norm, "affine", stale_statistics, "repvgg", "plain"),
    "identity in the wrong group": (kernels, "regrouped", misgrouped, "repvgg", "circular"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, monkeypatch):
    where, name, replacement, family, case = FAULTS[fault]
    test_blocks.test_the_merged_kernel_computes_the_block(family, case)
    monkeypatch.setattr(where, name, replacement)
    with pytest.raises(AssertionError):
        test_blocks.test_the_merged_kernel_computes_the_block(family, case)


def border_and_inside():
    """A padded inner norm in train mode: its border follows the statistics after the update."""
    torch.manual_seed(0)
    pool = branches.AveragePool(3, (3, 3))
    chain = branches.Chain(branches.Norm(3, 2), pool).double().train()
    test_blocks.scrambled(chain)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    y = chain.run(x, (1, 1), (1, 1))
    norm = chain[0].norm  # updated by now
    shift = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    inside = torch.nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    padded = shift.detach().view(1, -1, 1, 1).expand(4, 3, 8, 8).clone()
    padded[:, :, 1:-1, 1:-1] = inside
    test_blocks.close(y, torch.nn.functional.avg_pool2d(padded, 3, 1))


def test_a_border_of_stale_statistics_is_caught(monkeypatch):
    border_and_inside()
    run, kept = branches.Norm.run, {}

    def run_with_old_statistics(self, x, padding, stride):
        kept[self] = self.norm.running_mean.clone()
        return run(self, x, padding, stride)

    def at_constant(self, value):
        factor, _ = self.affine()
        return self.norm.bias - kept[self] * factor

    monkeypatch.setattr(branches.Norm, "run", run_with_old_statistics)
    monkeypatch.setattr(branches.Norm, "at_constant", at_constant)
    with pytest.raises(AssertionError):
        border_and_inside()
