"""The shared forward computes what the branches compute one by one, for every block."""

import copy

import pytest
import torch
from test_blocks import CASES, DEFAULTS, GEOMETRIES, TRIED, scrambled
from torch import nn

from replib import sharing
from replib.blocks.block import RepBlock
from replib.networks import branch_by_branch, fold_norms_in_training

torch.set_num_threads(1)
EXACT = 1e-11  # of the largest number, in float64: variances are sums of squares


def observed(block, x, rate):
    """Everything that a training step sees: output, gradients, and what the norms remember."""
    block.set_rate(rate)
    x = x.clone().requires_grad_()
    y = block(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    gradients = torch.autograd.grad(
        (y * weights).sum() + (y * y * weights).sum(),
        [x, *(p for p in block.parameters() if p.requires_grad)],
        allow_unused=True,
    )
    names = ["input", *(name for name, p in block.named_parameters() if p.requires_grad)]
    return {"output": y, **dict(zip(names, gradients, strict=True)), **dict(block.named_buffers())}


def compare(ours, reference, tolerance):
    """Relative to the largest number of its kind: the gradient of a weight whose norm cancels its
    scale may be zero but for rounding."""
    assert ours.keys() == reference.keys()
    scale = max(
        v.abs().max().item() for k, v in reference.items() if v is not None and k != "output"
    )
    for name, value in reference.items():
        if value is None:
            assert ours[name] is None or not ours[name].any(), name
            continue
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype, name
        error = (ours[name] - value).abs().max().item()
        assert error <= tolerance * max(scale, value.abs().max().item()), (name, error)


FORMS = {  # whether norms are folded, and a covariance is taken wherever one is possible
    "shared": (False, False),
    "folded": (True, False),
    "folded, covariance": (True, True),
}
FAST = ("plain", "strided", "grouped", "valid", "1-D")  # the other geometries in the slow tier


def as_form(monkeypatch, form):
    folded, covariance = FORMS[form]
    monkeypatch.setattr(RepBlock, "folded", folded)
    pays = lambda term: covariance and term.kernel.groups == 1  # noqa: E731
    monkeypatch.setattr(sharing, "covariance_pays", pays)


def pair(family, case="plain", seed=0):
    """A scrambled block in train mode, its branch-by-branch twin, and an input whose mean is not
    zero; float64."""
    block = scrambled(copy.deepcopy(TRIED[family, case]), seed).double().train()
    g = DEFAULTS | GEOMETRIES[case]
    space = (9, 11, 7)[: g.get("dims", 2)]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, g["in_channels"], *space, generator=generator, dtype=torch.float64) + 0.7
    return block, branch_by_branch(copy.deepcopy(block)), x


def tiered(param):
    slow = () if param.values[1] in FAST else (pytest.mark.slow,)
    return pytest.param(*param.values, id=param.id, marks=slow)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "case"), list(map(tiered, CASES)))
def test_it_agrees_with_the_branches_one_by_one(family, case, form, monkeypatch):
    as_form(monkeypatch, form)
    block, twin, x = pair(family, case)
    compare(observed(block, x, 0.7), observed(twin, x, 0.7), EXACT)


NORMED = ("repvgg", "dbb", "mobileone", "dyrep")
SETTINGS = {
    "cumulative statistics": lambda norm, i: setattr(norm, "momentum", None),
    "statistics of this batch alone": lambda norm, i: setattr(norm, "momentum", 1.0),
    "no running statistics": lambda norm, i: forget(norm),
    "frozen": lambda norm, i: norm.eval(),
    "every other one frozen": lambda norm, i: norm.train(i % 2 == 0),
}


def forget(norm):
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", NORMED)
def test_norms_in_every_setting(family, setting, form, monkeypatch):
    if setting == "no running statistics" and family in ("dbb", "dyrep"):
        pytest.skip("a chain is padded with what running statistics make of zero")
    as_form(monkeypatch, form)
    block, twin, x = pair(family)
    for module in (block, twin):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for i, norm in enumerate(norms):
            SETTINGS[setting](norm, i)
    for _ in range(3):
        compare(observed(block, x, 0.7), observed(twin, x, 0.7), EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [*NORMED, "orepa"])
def test_single_precision_and_a_large_mean(family, form, monkeypatch):
    """A mean of 30 deviations: squares that are not centred would lose three digits more."""
    as_form(monkeypatch, form)
    _, twin, x = pair(family)
    x = x + 30
    exact = observed(twin, x, 0.7)
    ours, theirs = (observed(m.float(), x.float(), 0.7) for m in pair(family)[:2])
    for name in ("output", "input"):
        scale = exact[name].abs().max().item()
        errors = [
            (o[name].double() - exact[name]).abs().max().item() / scale for o in (ours, theirs)
        ]
        assert errors[0] <= 4 * errors[1] + 1e-5, (name, errors)


@pytest.mark.parametrize("watch", ["hook", "backward hook", "forward", "another norm"])
def test_what_is_watched_or_replaced_is_left_alone(watch):
    block, twin, x = pair("dbb")
    calls = []
    for module in (block, twin):
        norm, conv = module.branches["1x1_kxk"][1], module.branches["1x1_kxk"][2]
        if watch == "hook":
            conv.register_forward_hook(lambda *_: calls.append(1))
            norm.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
        elif watch == "backward hook":
            norm.norm.register_full_backward_hook(lambda m, given, out: calls.append(1))
        elif watch == "forward":
            norm.norm.forward = lambda y, own=norm.norm.forward: own(y) * 3
        else:
            norm.norm = nn.BatchNorm2d(norm.in_channels, affine=False).double()
    compare(observed(block, x, 0.7), observed(twin, x, 0.7), 0)


def test_norms_are_folded_where_that_is_asked():
    block, _, x = pair("repvgg")
    net = fold_norms_in_training(nn.Sequential(block))
    assert block.folded and saved(block, x) < saved(fold_norms_in_training(net, False)[0], x)


def test_evaluation_does_not_depend_on_it():
    block, twin, x = pair("dbb")
    assert torch.equal(block.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("form", FORMS)
def test_one_value_per_channel_is_refused(form, monkeypatch):
    as_form(monkeypatch, form)
    block, twin, x = pair("repvgg")
    for module in (block, twin):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            module(x[:1, :, :1, :1])


def saved(block, x):
    """Bytes kept for the backward pass, besides parameters and the input."""
    own = {t.untyped_storage().data_ptr() for t in [x, *block.parameters(), *block.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(x)
    own.add(y.untyped_storage().data_ptr())
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


@pytest.mark.parametrize(("family", "maps"), [("repvgg", 1), ("dbb", 4), ("mobileone", 4)])
def test_what_is_saved_for_the_backward_pass(family, maps, monkeypatch):
    """RepVGG keeps the output of its k x k convolution; DBB that, the two maps that its k x k
    pieces read, less one that its pooling does not need, and the two that follow them."""
    as_form(monkeypatch, "folded, covariance")
    block, twin, _ = pair(family)
    x = torch.randn(8, 6, 32, 32, dtype=torch.float64)
    one = x.numel() * x.element_size()
    assert maps * one <= saved(block, x) < 1.1 * maps * one
    assert saved(twin, x) > saved(block, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, form",
    [*((family, "shared") for family in ("repvgg", "dbb", "orepa")), ("dbb", "folded, covariance")],
)
def test_compiled_in_one_graph(family, form, monkeypatch):
    as_form(monkeypatch, form)
    block, twin, x = pair(family)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert compiled(x).shape == twin(x).shape
    for _ in range(2):
        block.load_state_dict(twin.state_dict())
    ours, theirs = observed_through(compiled, block, x), observed_through(twin, twin, x)
    compare(ours, theirs, 10 * EXACT)


def observed_through(forward, block, x):
    x = x.clone().requires_grad_()
    block.set_rate(0.7)
    y = forward(x)
    parameters = dict(block.named_parameters())
    gradients = torch.autograd.grad((y * y).sum() + y.sum(), [x, *parameters.values()])
    return {
        "output": y,
        "input": gradients[0],
        **dict(zip(parameters, gradients[1:], strict=True)),
    } | dict(block.named_buffers())
