"""Pruning by ResRep: the function, FLOPs, gradients, the mask, what is left, and resuming."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import small_task, with_checkpoints
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model
from whole import scrambled

from replib import fuse
from replib.checkpoint import load_model, save_model
from replib.methods.resrep import ResRep, shrunk
from replib.models import build
from replib.models.cifar_resnet import CifarResNet
from replib.narrowing import Cost, narrowed, spans
from replib.training.augmentation import Augmentation
from replib.training.loop import fit

IMAGES = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.arange(16) % 5
BIG = ("mobilenet_v1", "resnet50", "mobilenet_v2")  # the last two torchvision's


class Mobile(nn.Module):
    """Pointwise, depthwise and grouped layers, and a linear one of 2x2 pixels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.expand = nn.Conv2d(6, 12, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 8, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(8)
        self.valid = nn.Conv2d(8, 8, 3, padding_mode="reflect", padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.last = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(40, 5)

    def forward(self, x):
        x = F.relu6(self.norm1(self.expand(F.relu(self.stem(x)))))
        x = self.norm3(self.project(F.relu6(self.norm2(self.depthwise(x)))))
        x = F.relu(self.valid(F.silu(x)))
        x = F.adaptive_avg_pool2d(F.relu(self.last(self.grouped(x))), 2)
        return self.head(torch.flatten(x, 1))


def network(kind):
    torch.manual_seed(0)
    if kind == "mobile":
        model = Mobile()
    elif kind == "resnet":
        model = CifarResNet(1, classes=5)
    elif kind in ("resnet50", "mobilenet_v2"):
        model = get_model(kind, num_classes=5)
    elif kind == "mobilenet_v1":
        model = build(kind, "convbn", classes=5, in_channels=3, width=0.25)
    else:
        model = build("digits", kind, classes=5, in_channels=3)
    return scrambled(model.double())


def counted(model, images=IMAGES):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(images[:1])
    return counter.get_total_flops()


def error(a, b):
    return ((a - b).abs().max() / a.abs().max()).item()


def trained(resrep, share=0.4):
    """Compactors as after training: no identities, and some rows exactly 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for rows in resrep.rows.values():
            noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
            rows.add_(0.2 * noise.to(rows.dtype))
            rows[torch.rand(len(rows), generator=generator) < share] = 0


# -- the function ----------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["matrix", "vector"])
@pytest.mark.parametrize(
    "kind",
    [
        "mobile",
        "resnet",
        "convbn",
        "repvgg",
        *(pytest.param(k, marks=pytest.mark.slow) for k in BIG),
    ],
)
def test_compactors_keep_the_function_and_so_does_pruning_their_zero_rows(kind, form):
    """Borders, followers and positions included; FLOPs are those that torch counts."""
    model = network(kind)
    before, whole = model(IMAGES), counted(fuse(model))
    resrep = ResRep(model, IMAGES, target=0.5, form=form)
    assert error(before, model(IMAGES)) < 1e-12 and resrep.cost.total == whole
    trained(resrep)
    expected, pruned = model(IMAGES), resrep.pruned()
    assert error(expected, before) > 1e-3
    assert error(expected, pruned(IMAGES)) < 1e-11  # float64; fifty layers amplify rounding
    kept = resrep.kept()
    assert any(len(kept[name]) < span.width for name, span in resrep.spans.items())
    widths = {name: len(channels) for name, channels in kept.items()}
    assert resrep.cost(widths) == counted(pruned) < whole
    assert error(expected, model(IMAGES)) == 0  # which stays what it was


def test_which_channels_are_known_to_which_layers():
    found = spans(network("mobile"))
    assert list(found) == ["stem", "expand", "project", "last"]
    expand = found["expand"]
    assert (expand.norm, expand.followers, expand.consumers) == (
        "norm1",
        ("depthwise", "norm2"),
        ("project",),
    )
    assert found["last"].consumers == ("head",) and found["stem"].norm is None
    inner = spans(network("resnet"))
    assert list(inner) == [f"layer{i}.0.conv1" for i in (1, 2, 3)]


def test_a_removed_depthwise_channel_leaves_its_constant():
    """By hand: what a depthwise layer and its norm make of 0 is ReLU(beta - mean gamma / s),
    0 where that is negative, and goes into the next bias."""
    one = nn.Conv2d(1, 2, 1)
    depthwise = nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False)
    norm, last = nn.BatchNorm2d(2, eps=1e-30), nn.Conv2d(2, 1, 1)
    model = nn.Sequential(one, depthwise, norm, nn.ReLU(), last, nn.ReLU()).double().eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 1.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.5]))
        norm.running_mean.copy_(torch.tensor([-0.5, 0.25]))
        norm.running_var.copy_(torch.tensor([4.0, 1.0]))
        last.weight.copy_(torch.tensor([3.0, 5.0]).view(1, 2, 1, 1))
        last.bias.fill_(0.1)
    images = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for mean, constant in ((-0.5, 1.5), (3.0, 0.0)):  # 1 + 0.5 2/2; 1 - 3 2/2 is negative
        with torch.no_grad():
            norm.running_mean[0] = mean
        resrep = ResRep(copy.deepcopy(model), images, target=0.9, targets=["0"])
        with torch.no_grad():
            resrep.rows["0"][0] = 0
        pruned = resrep.pruned()
        assert pruned[4].bias.item() == pytest.approx(0.1 + 3 * constant, abs=1e-12)
        assert error(resrep.model(images), pruned(images)) < 1e-12


def test_a_pruned_network_and_one_with_compactors_are_files(tmp_path):
    model = network("resnet")
    resrep = ResRep(model, IMAGES, target=0.5)
    trained(resrep)
    for name, net in (("pruned", fuse(resrep.pruned())), ("whole", model)):
        net = resrep.pruned() if name == "pruned" else net
        save_model(net, tmp_path / name)
        assert torch.equal(load_model(tmp_path / name)(IMAGES), net(IMAGES))


def test_one_row_of_a_layer_stays():
    model = network("convbn")
    resrep = ResRep(model, IMAGES, target=0.5)
    trained(resrep, share=2.0)  # all rows are zero
    assert all(len(kept) == 1 for kept in resrep.kept().values())
    assert error(model(IMAGES), resrep.pruned()(IMAGES)) < 1e-12


# -- targets ---------------------------------------------------------------------------------------
def test_pairs_that_the_user_names():
    """By pattern, or in full for a network that cannot be traced."""

    class Untraceable(Mobile):
        def forward(self, x):
            return super().forward(x) if x.sum() > -math.inf else x

    by_pattern = ResRep(network("mobile"), IMAGES, target=0.9, targets=["exp*"])
    assert list(by_pattern.spans) == ["expand"]
    torch.manual_seed(0)
    model = scrambled(Untraceable().double())
    with pytest.raises(ValueError, match="no channels of Untraceable"):
        ResRep(model, IMAGES, target=0.9)
    layers = {"expand": ["norm1", "depthwise", "norm2", "project"]}
    resrep = ResRep(model, IMAGES, target=0.9, targets=layers)
    assert resrep.spans == by_pattern.spans
    trained(resrep)
    assert error(model(IMAGES), resrep.pruned()(IMAGES)) < 1e-12


@pytest.mark.parametrize(
    "kind, options, named",
    [
        ("mobile", {"targets": ["foo"]}, ["'foo'", "no convolution", "stem"]),
        ("mobile", {"targets": ["valid"]}, ["valid", "goes into grouped, which is grouped"]),
        ("mobile", {"targets": ["grouped"]}, ["grouped", "it is grouped"]),
        ("resnet", {"targets": ["layer1.0.conv2"]}, ["layer1.0.conv2", "add"]),
        ("resnet", {"targets": {"conv1": ["bn1", "foo"]}}, ["conv1", "no layer 'foo'"]),
        ("resnet", {"targets": {"conv1": ["bn1"]}}, ["no layer that takes"]),
        ("resnet", {"targets": {"conv1": ["layer2.0.bn1"]}}, ["does not take 16 channels"]),
        # its channels reach the sum as well, so that those of the next layer are no constants
        (
            "resnet",
            {"targets": {"layer1.0.conv2": ["layer1.0.bn2", "layer2.0.conv1"]}},
            ["layer1.0.conv2", "constant"],
        ),
        ("resnet", {"target": 0.001}, ["target (=0.001)", "at least 0.", "one channel"]),
        ("resnet", {"target": 1.0}, ["target (=1)", "below 1"]),
        ("resnet", {"form": "foo"}, ["form (='foo')", "matrix"]),
        ("resnet", {"interval": 0}, ["interval (=0)", "at least 1"]),
        ("repvgg", {"form": "filters"}, ["filters", "branches"]),
    ],
)
def test_what_cannot_be_pruned_is_told(kind, options, named):
    with pytest.raises(ValueError) as caught:
        ResRep(network(kind), IMAGES, **{"target": 0.5} | options)
    assert all(text in str(caught.value) for text in named), caught.value


def test_an_activation_of_zero_that_a_padded_layer_would_see_is_refused():
    """sigmoid(0) is a half inside of the map and 0 on its padding."""
    for activation, fits in ((nn.Sigmoid(), False), (nn.SiLU(), True)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.Conv2d(4, 2, 3, padding=1))
        model = nn.Sequential(*model, nn.ReLU()).double().eval()
        if fits:
            ResRep(model, IMAGES, target=0.9, targets=["0"])
            continue
        with pytest.raises(ValueError, match="0: a zero channel does not reach 2"):
            ResRep(model, IMAGES, target=0.9, targets=["0"])


# -- the gradient ----------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["matrix", "vector", "filters"])
@pytest.mark.parametrize("reset", [True, False])
def test_the_gradient_against_plain_loops(form, reset):
    """masked rows: the lasso alone; others: the task and the lasso; a zero row: no lasso."""
    model = network("convbn")
    resrep = ResRep(model, IMAGES, target=0.5, strength=0.03, form=form, reset=reset)
    trained(resrep)
    with torch.no_grad():
        for mask in resrep.tensors:
            mask[::3] = 0
    F.cross_entropy(model.train()(IMAGES), LABELS).backward()
    tasks = {name: rows.grad.clone() for name, rows in resrep.rows.items()}
    resrep.after_backward()
    zeros = 0
    for name, rows in resrep.rows.items():
        for j in range(len(rows)):
            row, task, found = (t[j].flatten().tolist() for t in (rows, tasks[name], rows.grad))
            length = math.sqrt(sum(q * q for q in row))
            for q, g, got in zip(row, task, found, strict=True):
                want = 0.0 if reset and j % 3 == 0 else g
                want += 0.03 * q / length if length else 0.0
                assert got == pytest.approx(want, rel=1e-12, abs=1e-15)
            zeros += length == 0
    assert zeros and all(rows.grad.isfinite().all() for rows in resrep.rows.values())


def test_rows_of_almost_nothing_stay_finite():
    """In float32 the square of 1e-25 is 0: the lasso must not divide by that."""
    resrep = ResRep(network("convbn").float(), IMAGES.float(), target=0.5)
    for rows in resrep.rows.values():
        with torch.no_grad():
            rows.fill_(1e-25)
        rows.grad = torch.zeros_like(rows)
    resrep.after_backward()
    assert all(rows.grad.abs().max() < 1e-4 for rows in resrep.rows.values())


def test_the_optimizer_has_compactors_apart():
    model = network("resnet")
    resrep = ResRep(model, IMAGES, target=0.5, momentum=0.97)
    groups = resrep.parameter_groups(1e-2, "all", bias_rate=2.0)
    assert groups[-1]["params"] == list(resrep.rows.values())
    assert (groups[-1]["weight_decay"], groups[-1]["momentum"]) == (0.0, 0.97)
    every = [p for group in groups for p in group["params"]]
    assert len(every) == len(set(every)) and set(every) == set(model.parameters())
    assert groups[0]["weight_decay"] == 1e-2 and "momentum" not in groups[0]
    plain = ResRep(network("resnet"), IMAGES, target=0.5, form="filters")
    assert "momentum" not in plain.parameter_groups(1e-2)[-1]


def steps(resrep, optimizer, number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        some = torch.randperm(16, generator=generator)[:8]
        optimizer.zero_grad()
        F.cross_entropy(resrep.model.train()(IMAGES[some]), LABELS[some]).backward()
        resrep.after_backward()
        optimizer.step()
        resrep.after_step()


def test_masked_rows_vanish_and_the_target_is_met():
    """In a loop of one's own; the network that is left computes what was trained."""
    torch.manual_seed(0)
    model = build("digits", "convbn", classes=5, in_channels=3).double()
    options = {"strength": 0.05, "warmup": 12, "interval": 2, "rows": 6, "momentum": 0.8}
    resrep = ResRep(model, IMAGES, target=0.4, **options)
    optimizer = torch.optim.SGD(resrep.parameter_groups(1e-4), lr=0.1, momentum=0.9)
    steps(resrep, optimizer, 12)
    assert all((mask == 1).all() for mask in resrep.tensors)  # not before so many steps
    for turn in range(14):
        steps(resrep, optimizer, 12, seed=turn)
        for group in optimizer.param_groups:
            group["lr"] *= 0.3 if turn > 5 else 1.0
    masked = sum(int((mask == 0).sum()) for mask in resrep.tensors)
    gone = {name: (mask == 0).nonzero().flatten() for name, mask in resrep.masks.items()}
    kept = resrep.kept()
    for name, span in resrep.spans.items():
        assert not {*kept[name].tolist()} & {*gone[name].tolist()}
        assert len(kept[name]) < span.width
    pruned = resrep.pruned()
    assert masked > 10 and counted(pruned) <= 0.4 * resrep.cost.total
    assert error(model.eval()(IMAGES), pruned(IMAGES)) < 1e-4  # rows below 1e-5 were dropped


# -- the mask --------------------------------------------------------------------------------------
def chosen_by_loops(norms, model, limit, masked, most):
    """The rule of the released code, on networks that are really built and counted."""
    found, widths = spans(model), {name: len(values) for name, values in norms.items()}

    def flops():
        kept = {name: torch.arange(width) for name, width in widths.items()}
        return counted(narrowed(model, found, kept))

    unmasked = {name: len(norms[name]) - len(masked[name]) for name in norms}
    kept, widths = widths, unmasked
    over = flops() > limit
    widths = kept
    cap = sum(map(len, masked.values())) + most if over else None
    out, visited = {name: set() for name in norms}, 0
    pairs = sorted((value, name, i) for name in norms for i, value in enumerate(norms[name]))
    for _, name, i in pairs:
        if flops() <= limit or visited == cap:
            break
        visited += 1
        if widths[name] > 1:
            widths[name] -= 1
            out[name].add(i)
    return out


def test_the_mask_against_plain_loops():
    """Over several choices: it grows by `rows`, is built anew each time, and passes by layers that
    have one channel left."""
    model = network("resnet")
    plain = copy.deepcopy(model)
    resrep = ResRep(model, IMAGES, target=0.5, rows=9)
    generator = torch.Generator().manual_seed(4)
    masked = {name: set() for name in resrep.spans}
    sizes, freed = [], 0
    for turn in range(4):
        with torch.no_grad():
            for name, rows in resrep.rows.items():
                rows.copy_(torch.randn(rows.shape, generator=generator, dtype=torch.float64))
                rows.mul_(0.01 if name == "layer1.0.conv1" else 1.0)  # a whole layer is smallest
        norms = {name: values.tolist() for name, values in resrep.norms().items()}
        limit = 0.5 * resrep.cost.total
        expected = chosen_by_loops(norms, plain, limit, masked, 9)
        resrep.choose()
        found = {n: set((m == 0).nonzero().flatten().tolist()) for n, m in resrep.masks.items()}
        assert found == expected, turn
        freed += any(masked[name] - found[name] for name in found)
        masked = found
        sizes.append(sum(map(len, found.values())))
    assert len(masked["layer1.0.conv1"]) == 15 and freed
    assert sizes[0] == 9 < sizes[1] <= 18 and resrep.share(resrep.unmasked()) <= 0.5


def test_the_forward_pass_does_not_see_the_mask():
    model = network("resnet")
    resrep = ResRep(model, IMAGES, target=0.5)
    before = model(IMAGES)
    for mask in resrep.tensors:
        mask.zero_()
    assert torch.equal(before, model(IMAGES))


# -- narrower from the start -----------------------------------------------------------------------
@pytest.mark.parametrize("rule", ["magnitude", "uniform"])
@pytest.mark.parametrize("kind", ["mobile", "resnet", "convbn"])
def test_a_narrower_network_has_the_flops_and_the_channels(kind, rule):
    model = network(kind)
    small, kept = shrunk(model, IMAGES, target=0.5, rule=rule)
    cost = Cost(model, spans(model), IMAGES)
    flops = counted(fuse(small))
    assert 0.4 * cost.total < flops <= 0.5 * cost.total
    norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    name, channels = next((n, k) for n, k in kept.items() if len(k) < spans(model)[n].width)
    old, new = (net.get_submodule(name) for net in (model, small))
    weights = [
        next(v for k, v in m.state_dict().items() if k.endswith("weight")) for m in (old, new)
    ]
    inputs = weights[1].shape[1]
    assert torch.equal(weights[0][channels][:, :inputs], weights[1]) or inputs < weights[0].shape[1]
    assert small.training == model.training


def test_magnitude_is_of_filters_with_their_norms():
    """A filter whose slope is small goes, however large it is."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU()
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        model[0].weight[2].mul_(10)
        model[1].weight.copy_(torch.tensor([1.0, 1.0, 1e-3, 1.0]))
    _, kept = shrunk(model, IMAGES, target=0.8, rule="magnitude", targets=["0"])
    assert kept["0"].tolist() == [0, 1, 3]


# -- to stop and go on -----------------------------------------------------------------------------
def task():
    def method(model):
        images = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        options = {"strength": 0.02, "warmup": 2, "interval": 2, "rows": 5, "momentum": 0.9}
        made.append(ResRep(model, images, target=0.5, **options))
        return made[0]

    made = []
    recipe = dict(
        phases=1, epochs=4, batch_size=20, learning_rate=0.1, momentum=0.9, nesterov=False,
        weight_decay=1e-3, clip_norm=None, clip="all", augmentation=Augmentation(crop_padding=1),
        next_start="last", select="last", reseed_each_phase=False,
    )  # fmt: skip
    return small_task(recipe, lambda model: made[0].parameter_groups(1e-3), method, block="convbn")


def test_a_run_goes_on_to_the_bit(one_thread):
    """Before the first mask, after one, and after one that has changed it."""
    undisturbed = task()
    whole, states = with_checkpoints(undisturbed)
    assert whole.best["index"] == 3  # the last one counts
    masked = []
    for state in states:
        masks = state["method"]["masks"].values()
        masked.append(sum(int((mask == 0).sum()) for mask in masks))
    assert masked[0] == 0 < masked[-1]
    changes = [i for i in range(1, len(masked)) if masked[i] != masked[i - 1]]
    for i in (0, changes[0], changes[1], changes[1] + 1):
        again = task()
        resumed = fit(again, resume=states[i])
        assert resumed.history == whole.history
        theirs = undisturbed.model.state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in again.model.state_dict().items())
        ours, want = again.method.state_dict(), undisturbed.method.state_dict()
        assert ours["steps"] == want["steps"] == 12
        assert all(torch.equal(mask, want["masks"][k]) for k, mask in ours["masks"].items())
