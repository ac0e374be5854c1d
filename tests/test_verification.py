"""The proof that a fused network is the network, and that it can fail."""

import copy

import pytest
from torch import nn
from whole import X, net

from replib import fuse, verify
from replib.blocks import BLOCKS


def first_conv(model):
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


FAULTS = {
    "a dropped bias": lambda conv: conv.bias.data.zero_(),
    "a transposed kernel": lambda conv: conv.weight.data.copy_(conv.weight.data.mT.clone()),
    "one wrong tap": lambda conv: conv.weight.data[0, 0, 0, 0].add_(1e-3),
    "not a number": lambda conv: conv.weight.data[0].fill_(float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_fused_network_is_seen(fault):
    model = net(BLOCKS["repvgg"](3, 8), nn.ReLU(), BLOCKS["repvgg"](8, 8))
    fused = fuse(model)
    assert verify(model, fused, X).ok
    FAULTS[fault](first_conv(fused))
    assert not verify(model, fused, X).ok


def test_a_fault_in_one_block_is_named_and_placed(monkeypatch):
    """A block whose merge forgets the inner padding value is wrong at the border alone."""
    model = net(BLOCKS["dbb"](3, 8), BLOCKS["repvgg"](8, 8))
    monkeypatch.setattr("replib.branches.Chain.value_at_zero", lambda self, end: None)
    proof = verify(model, fuse(model), X)
    bad = {check.name for check in proof.blocks if not check.ok}
    (check,) = [check for check in proof.blocks if check.name == "0"]
    assert bad == {"0"} and check.border > check.allowed >= check.interior
    assert not proof.ok and str(proof).startswith("NOT EQUAL")


def test_verify_refuses_train_mode_and_sees_another_output():
    model = net(BLOCKS["repvgg"](3, 8))
    fused = fuse(model)
    with pytest.raises(ValueError, match="model is in train mode"):
        verify(copy.deepcopy(model).train(), fused, X)
    assert not verify(model, nn.Sequential(fused, nn.MaxPool2d(2)).eval(), X).ok


def test_the_bound_follows_the_dtype():
    model = net(BLOCKS["repvgg"](3, 8), nn.ReLU(), BLOCKS["repvgg"](8, 8))
    half = copy.deepcopy(model).bfloat16()
    proof = verify(half, fuse(half), X.bfloat16())
    assert proof.ok and 1e-4 < proof.network.interior < proof.network.allowed < 1
    single = verify(model, fuse(model), X)
    assert single.network.allowed < 1e-4 < proof.network.allowed
