"""Growth and cuts: the function, the numbers of the released code, the optimizer, and resuming."""

import copy
import functools
import io
import math

import pytest
import test_vectors
import torch
import torch.nn.functional as F
from conftest import ROOT, small_task, with_checkpoints
from torch import nn
from whole import RANGES, scrambled

from replib import official
from replib.analysis.growth_scores import signed_sums
from replib.blocks import BLOCKS
from replib.branches import Convolution
from replib.errors import UserError
from replib.experiments import cells
from replib.experiments.params import Cell, load_table
from replib.experiments.store import Store
from replib.fusing import deployed_copy
from replib.kernels import Kernel
from replib.methods import dyrep
from replib.methods.dyrep import DyRep
from replib.models import build
from replib.training.augmentation import Augmentation
from replib.training.loop import fit
from replib.training.optimisation import parameter_groups

IMAGES = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.arange(16) % 5
Block = BLOCKS["dyrep"]


class Plain(nn.Module):
    """Layers of torch.nn: strided, grouped, depthwise, of 7 pixels, off centre, with bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False, padding_mode="reflect")
        self.norm3 = nn.BatchNorm2d(8)
        self.valid = nn.Conv2d(8, 6, 3, bias=False)
        self.norm4 = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 6, 3, padding="same", dilation=2, bias=False)
        self.norm5 = nn.BatchNorm2d(6)
        self.pointwise = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm1(self.stem(x)).relu()
        x = self.norm2(self.grouped(x)).relu()
        x = self.norm3(self.depthwise(x)).relu()
        x = self.norm4(self.valid(x)).relu()
        x = self.norm5(self.wide(x)).relu()
        return self.head(self.pointwise(x).mean((2, 3)))


NETWORKS = ("plain", "convbn", "repvgg", "dbb")


def network(kind):
    """In float64, norms scrambled and then given the statistics of the images."""
    return copy.deepcopy(made(kind))


@functools.cache
def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"classes": 5, "in_channels": 3}
        model = Plain() if kind == "plain" else build("digits", kind, **shape)
    model = scrambled(model.double()).train()
    with torch.no_grad():
        for _ in range(10):
            model(IMAGES)
    return model.eval()


def grower(model, optimizer=None, **options):
    options = {"interval": 1, "last_epoch": 10**6, "calibration_batches": 2} | options
    return DyRep(model, optimizer, **options)


def jump(before, after):
    return ((after - before).abs().max() / before.abs().max()).item()


def scramble(block):
    """A block as if it had trained: no norm is an identity any more."""
    generator = torch.Generator().manual_seed(5)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, (low, high) in RANGES.items():
                tensor = getattr(module, name).data
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


def batches():
    return iter([IMAGES[:8], IMAGES[8:]])


# -- the function ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["plain", "repvgg"])
def test_growth_keeps_the_function_everywhere(kind):
    """In every convolution, one after the other, and then in those that have come with them."""
    model = network(kind)
    method, before = grower(model), model(IMAGES)
    for _ in range(2):
        for path in list(method.candidates):
            block = method.grow(path, batches(), torch.Generator().manual_seed(len(path)))
            assert len(block.branches) > 1
            # float64: rounding of order 1e-15, amplified by the norms' slopes
            assert jump(before, model(IMAGES)) < 1e-12, path
        method.watch()
    assert not method.candidates and "inside 2 blocks" in " ".join(method.kept.values())
    assert jump(before, deployed_copy(model)(IMAGES)) < 1e-12


@pytest.mark.parametrize("kind", NETWORKS)
def test_growth_in_float32_stays_within_rounding(kind):
    model = network(kind).float()
    method, before = grower(model), model(IMAGES.float())
    for path in list(method.candidates):
        method.grow(path, (x.float() for x in batches()), torch.Generator().manual_seed(0))
        assert jump(before, model(IMAGES.float())) < 1e-5, path


@pytest.mark.parametrize(
    "fidelity, least, most", [("official", 4.9e-6, 5.1e-6), ("exact", 0, 1e-13)]
)
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_the_released_growth_is_off_by_the_eps_of_one_norm(groups, fidelity, least, most):
    """The output of the convolution itself shrinks by 1 / sqrt(1 + 1e-5)."""
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=groups), nn.BatchNorm2d(8)).double().eval()
    )
    x, conv = torch.randn(4, 8, 9, 9).double(), model[0]
    before = conv(x)
    grower(model, fidelity=fidelity).grow("0", iter([x]), torch.Generator().manual_seed(1))
    assert least <= (1 - model[0](x) / before).abs().median().item() <= most


def test_new_branches_are_drawn_by_fan_out_and_measured():
    model = network("plain")
    block = grower(model).grow("grouped", batches(), torch.Generator().manual_seed(3))
    assert list(block.branches) == ["1x1", "1x1_kxk", "1x1_avg", "kxk", "1xk", "kx1", "id"]
    x = F.relu(model.norm1(model.stem(IMAGES))).detach()
    y = [F.conv2d(half, block.branches["1x1"][0].weight, groups=4) for half in x.split(8)]
    norm = block.branches["1x1"][1].norm  # the average over two batches, each of its own variance
    torch.testing.assert_close(norm.running_mean, sum(h.mean((0, 2, 3)) for h in y) / 2)
    torch.testing.assert_close(norm.running_var, sum(h.var((0, 2, 3)) for h in y) / 2)
    for name, branch in block.branches.items():
        last = dyrep.last_norm(branch)
        if name == "kxk":
            assert (last.running_mean == 0).all() and (last.running_var == 1).all()
        assert (last.weight == (1 if name == "kxk" else 0.01)).all()
    assert (block.branches["1x1_kxk"][1].norm.weight == 1).all()
    drawn = torch.cat([block.branches[n][0].weight.detach().flatten() for n in ("1xk", "kx1")])
    # variance 2 / (3 O) whatever the groups, over 96 numbers: within 40 %
    assert drawn.square().mean().item() == pytest.approx(2 / 24, rel=0.4)


def test_which_branches_grow_where():
    model = network("plain")
    method = grower(model)
    assert list(method.candidates) == ["stem", "grouped", "depthwise", "valid", "wide"]
    assert "square" in method.kept["pointwise"]
    grown = {path: set(method.grow(path, batches()).branches) for path in method.candidates}
    assert grown["valid"] == {"1x1_kxk", "1x1_avg", "kxk"}  # its padding is not half its kernel
    assert set(dyrep.BRANCHES) - grown["stem"] == {"id"}
    assert grown["wide"] == grown["grouped"] == set(dyrep.BRANCHES)
    method.watch()
    assert "grouped.branches.1x1_kxk.2" in method.candidates
    # what is in front of the inner k x k pads, so that itself has none
    inner = method.grow("grouped.branches.1x1_kxk.2", batches())
    assert set(inner.branches) == {"1x1_kxk", "1x1_avg", "kxk"}
    assert set(method.grow("grouped.branches.kxk.0", batches()).branches) == set(dyrep.BRANCHES)
    strided = method.grow("stem.branches.kxk.0", batches())
    assert strided.geometry.stride == (2, 2) and "id" not in strided.branches


@pytest.mark.parametrize(
    "names", [["1x1"], ["1x1_kxk", "id"], [n for n in dyrep.BRANCHES if n != "kxk"]]
)
@pytest.mark.parametrize(
    "kind, path", [("plain", "grouped"), ("repvgg", "stages.1.1.block.branches.dense.0")]
)
def test_cuts_keep_the_function(kind, path, names):
    """Of a block that has trained, with blocks inside of it; one branch alone is a convolution."""
    model = network(kind)
    method = grower(model)
    for place in (path, f"{path}.branches.kxk.0", f"{path}.branches.1x1_kxk.2"):
        method.grow(place, batches(), torch.Generator().manual_seed(0))
    scramble(model.get_submodule(path))
    before = model(IMAGES)
    method.cut(path, names, None)
    assert jump(before, model(IMAGES)) < 1e-12
    left = model.get_submodule(path)
    if len(names) == 6:
        assert isinstance(left, nn.Conv2d if kind == "plain" else Convolution)
        assert left.bias is not None and method.structure == {path: ["kxk"]}
    else:
        assert not set(names) & set(left.branches)
        inside = f"{path}.branches.1x1_kxk.2" in method.structure
        assert inside == ("1x1_kxk" not in names)
    method.watch()
    assert (path in method.candidates) == (len(names) == 6)


# -- the released numbers --------------------------------------------------------------------------
@pytest.mark.skipif(not test_vectors.FIXTURES.is_dir(), reason="the official numbers are not here")
@pytest.mark.parametrize("name", ["dyrep_full", "dyrep_s2_g2", "dyrep_depthwise"])
@torch.no_grad()
def test_the_released_cut(name):
    config = test_vectors.read(f"dyrep.pt/{name}")["config"]
    case = test_vectors.read(f"dyrep.pt/{name}_cut")
    block = official.load_block("dyrep", config, case["state_before"]).eval()
    found = dyrep.branch_weights(block)
    released = dict(zip(dyrep.BRANCHES, case["branch_weights"], strict=True))
    released = {n: r for n, r in released.items() if n != "kxk" and r != -1}  # -1: not there
    assert found == pytest.approx(released, rel=1e-6)
    holder = nn.Sequential(block)
    method = grower(holder, fidelity="official")
    gone = [n for n, k in zip(dyrep.BRANCHES, case["keep"], strict=True) if not k and n in found]
    method.cut("0", gone, None)
    agree = test_vectors.agree
    agree(holder(case["x"]), case["y_after"], test_vectors.OUTPUT, what="output")
    ours = official.export_block(holder[0], "dyrep")
    assert ours.keys() == case["state_after"].keys()
    for key, value in case["state_after"].items():
        agree(ours[key].double(), value.double(), test_vectors.OUTPUT, what=key)


@pytest.mark.skipif(not test_vectors.FIXTURES.is_dir(), reason="the official numbers are not here")
@torch.no_grad()
def test_the_released_growth():
    case = test_vectors.read("dyrep.pt/dyrep_grow_no_recal")
    config = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    block = official.load_block("dyrep", config, case["state_after"]).eval()
    released, weight = copy.deepcopy(block.state_dict()), case["conv_weight"]
    scramble(block.branches["kxk"])
    kernel = Kernel(weight, weight.new_zeros(6)).to(torch.float64)
    dyrep.take(block, kernel, "official")
    for key, value in block.state_dict().items():
        test_vectors.agree(value.double(), released[key].double(), test_vectors.OUTPUT, what=key)


def test_official_cuts_draw_inner_branches_anew_and_exact_ones_do_not():
    for fidelity in dyrep.FIDELITIES:
        model = network("plain")
        method = grower(model, fidelity=fidelity)
        inner = [method.grow(p, batches()) for p in ("grouped", "grouped.branches.kxk.0")][1]
        scramble(model.grouped)
        before, kept = model(IMAGES), inner.branches["1x1"][0].weight.clone()
        method.cut("grouped", ["id"], torch.Generator().manual_seed(0))
        assert torch.equal(kept, inner.branches["1x1"][0].weight) == (fidelity == "exact")
        assert jump(before, model(IMAGES)) < (1e-12 if fidelity == "exact" else 1e-4)


@pytest.mark.parametrize(
    "weights, cut",
    [
        ([0.01] * 6, []),  # as grown: no spread
        ([0.5, 0.05, 0.3, 0.2], ["b"]),
        ([0.5, 0.05, 0.09, 0.2], ["b", "c"]),
        ([0.5, 0.101, 0.3], []),  # the weakest is not below 0.1
        ([0.05, 0.06, 0.055], []),  # a spread of 0.005
        ([0.03, 0.09, 0.06], ["a"]),  # 0.09 is not below the mean of 0.06, nor is 0.06
        ([0.05], []),  # one has no spread
        ([1.0, 0.05], []),  # exactly 1 is not counted, so that one is left
        ([1.0, 0.05, 0.2], ["b"]),
        ([], []),
        ([float("nan"), 0.01, 0.5], []),
    ],
)
def test_what_is_weak(weights, cut):
    assert dyrep.weak(dict(zip("abcdef", weights, strict=False))) == cut


# -- scores ----------------------------------------------------------------------------------------
def steps(model, method, optimizer, number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        some = torch.randperm(16, generator=generator)[:8]
        optimizer.zero_grad()
        F.cross_entropy(model.train()(IMAGES[some]), LABELS[some]).backward()
        method.after_backward()
        optimizer.step()


def test_scores_are_means_since_the_last_adjustment():
    model = network("plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = grower(model, interval=2, score="snip")
    expected = {}
    for epoch in range(4):
        for step in range(3):
            steps(model, method, optimizer, 1, seed=10 * epoch + step)
            if epoch in (2, 3):
                for path, conv in method.candidates.items():
                    w, g = conv.weight.flatten().tolist(), conv.weight.grad.flatten().tolist()
                    row = expected.setdefault(path, [0.0, 0.0, 0.0])
                    row[0] += sum(abs(a * b) for a, b in zip(w, g, strict=True)) / 6
                    row[1] += sum(a * b for a, b in zip(w, g, strict=True)) / 6
                    row[2] += math.sqrt(sum(b * b for b in g)) / 6
        method.after_epoch(batches())
    assert [entry["epoch"] for entry in method.log] == [1, 3]
    entry = method.log[1]
    assert entry["layers"] == list(expected)
    for i, name in enumerate(("snip", "synflow", "grad_norm")):
        values = [row[i] for row in expected.values()]
        assert entry["scores"][name] == pytest.approx(values, rel=1e-5, abs=1e-12)
    best = max(expected, key=lambda path: expected[path][0])
    assert entry["grown"] == best and best in entry["structure"]


def test_random_growth_is_drawn_from_the_seed():
    def grown(seed):
        model = network("convbn")
        method = grower(model, score="random", seed=seed)
        for _ in range(4):
            method.after_epoch(batches())
        return [entry["grown"] for entry in method.log]

    assert grown(1) == grown(1)
    assert len({tuple(grown(seed)) for seed in range(4)}) > 1


def test_a_score_that_is_no_number_grows_nothing():
    model = network("plain")
    method = grower(model)
    for conv in method.candidates.values():
        conv.weight.grad = torch.full_like(conv.weight, math.nan)
    method.after_backward()
    total, count = method.tensors
    assert method.after_epoch(batches())["grown"] is None and not method.structure
    # counted anew, in the same place: a recorded step adds to it
    assert method.total is total and (total == 0).all() and method.count is count and count == 0


@pytest.mark.parametrize("kind", ["plain", "convbn"])
def test_the_default_score_is_a_share_of_eps(kind):
    """sum g w = sum eps / (v + eps) gamma dL/dgamma, to the digits of float64."""
    model = network(kind)
    found = signed_sums(model, IMAGES, LABELS, F.cross_entropy)
    assert len(found) == (5 if kind == "plain" else 4)
    for row in found:
        assert row["double"] == pytest.approx(row["predicted"], rel=1e-6)
        assert abs(row["double"]) < 1e-3 * row["snip"]
    assert any(abs(row["single"] / row["double"] - 1) > 1e-6 for row in found)  # rounding


# -- when ------------------------------------------------------------------------------------------
def test_when_it_adjusts_and_when_it_measures_norms_anew(monkeypatch):
    model, measured = network("plain"), []
    real = dyrep.calibrate

    def calibrate(model, batches, *where):
        measured.append(len(list(batches)))
        return real(model, [IMAGES], *where)

    monkeypatch.setattr(dyrep, "calibrate", calibrate)
    method = grower(model, interval=3, last_epoch=7, score="random", recalibration_batches=2)
    done = []
    for _ in range(9):
        due = method.due
        measured.clear()
        entry = method.after_epoch(IMAGES[:8] for _ in range(5))
        assert due == (entry is not None)
        done.append(("adjusts" if entry else "measures") if measured else "nothing")
    assert done == ["measures", "measures", "adjusts"] * 2 + ["measures", "nothing", "nothing"]


def test_it_stops_scoring_after_the_last_adjustment():
    model = network("plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = grower(model, interval=2, last_epoch=3)
    for epoch in range(4):
        steps(model, method, optimizer, 1)
        assert method.count.item() == (epoch + 1 if epoch < 2 else 0)
        method.after_epoch(batches())


def test_growth_needs_batches_and_changes_nothing_without():
    model = network("plain")
    method, before = grower(model, score="random"), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"batches \(= none\) must hold inputs"):
        method.after_epoch()
    assert before.keys() == model.state_dict().keys()
    method = grower(model, score="random", calibration_batches=0)
    assert method.after_epoch()["grown"] in method.structure


@pytest.mark.parametrize(
    "options, named",
    [
        ({"score": "magnitude"}, r"score \(='magnitude'\) must be one of snip, synflow"),
        ({"fidelity": "preserving"}, r"fidelity \(='preserving'\) must be one of official, exact"),
        ({"interval": 0}, r"interval \(=0\) must be at least 1"),
    ],
)
def test_wrong_arguments_are_told(options, named):
    with pytest.raises(ValueError, match=named):
        grower(network("plain"), **options)


def test_networks_in_which_nothing_grows_are_refused():
    with pytest.raises(ValueError, match="no block can grow in Sequential: its kernel"):
        grower(nn.Sequential(nn.Conv2d(3, 4, 1)))
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    model.append(model[0])
    assert list(grower(model).candidates) == ["1"], "one is used in two places"
    model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="it is frozen; it is used in several places"):
        grower(model)


# -- the optimizer ---------------------------------------------------------------------------------
@pytest.mark.parametrize("fidelity", dyrep.FIDELITIES)
def test_the_optimizer_follows_and_keeps_what_it_knows(fidelity):
    model = network("plain")
    extra = nn.Parameter(torch.zeros(3))  # of a loss, say
    kernels = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": kernels, "weight_decay": 0.1}, {"params": [extra, *rest], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    method = grower(model, optimizer, fidelity=fidelity)
    steps(model, method, optimizer, 3)
    old = model.grouped.weight
    known = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    method.grow("grouped", batches())
    method.follow()
    decayed, free = (group["params"] for group in optimizer.param_groups)
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[1]["lr"]) == (
        0.1,
        0.3,
    )
    assert free[0] is extra and {*decayed, *free} == {extra, *model.parameters()}
    assert set(model.grouped.parameters()) <= set(decayed)  # where the convolution was
    order = {p: i for i, p in enumerate(model.parameters())}
    assert [order[p] for p in decayed] == sorted(order[p] for p in decayed)
    weight = model.grouped.branches["kxk"][0].weight
    assert (weight is old) == (fidelity == "exact") == (weight in optimizer.state)
    for parameter, momentum in known.items():
        if parameter is old and fidelity == "official":
            assert parameter not in optimizer.state
        elif parameter in order:
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)
    steps(model, method, optimizer, 1)
    method.cut("grouped", [n for n in dyrep.BRANCHES if n != "kxk"], None)
    method.follow()
    assert {p for g in optimizer.param_groups for p in g["params"]} == {extra, *model.parameters()}
    assert set(optimizer.state) <= {extra, *model.parameters()}
    assert model.grouped.weight in set(optimizer.param_groups[0]["params"])


def test_groups_can_be_made_by_a_rule():
    model = network("plain")
    rule = functools.partial(parameter_groups, model, 1e-4, "matrices")
    optimizer = torch.optim.SGD(rule(), lr=0.1)
    method = grower(model, optimizer, groups=rule, score="random")
    method.after_epoch(batches())
    for group, expected in zip(optimizer.param_groups, rule(), strict=True):
        assert all(a is b for a, b in zip(group["params"], expected["params"], strict=True))
    method.groups = lambda: rule()[:1]
    with pytest.raises(ValueError, match=r"groups\(\) gave 1 groups, the optimizer has 2"):
        method.after_epoch(batches())


# -- to stop and go on -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["plain", "repvgg"])
def test_a_loop_goes_on_right_after_a_growth_to_the_bit(kind):
    def start():
        model = network(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, grower(model, optimizer, score="snip")

    def epochs(model, optimizer, method, some):
        for epoch in some:
            steps(model, method, optimizer, 2, seed=epoch)
            method.after_epoch(batches())
            if epoch == 2:  # as if the rule had asked for it
                path = next(p for p, names in method.structure.items() if len(names) > 2)
                sides = [n for n in method.structure[path] if n != "kxk"]
                method.cut(path, sides if kind == "plain" else sides[:2], None)
                method.watch()
                method.follow()

    whole = start()
    epochs(*whole, range(6))
    first = start()
    epochs(*first, range(4))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first], buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    model, optimizer, method = again = start()
    method.load_state_dict(saved[2])
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    epochs(*again, range(4, 6))
    assert method.log == whole[2].log and method.structure == whole[2].structure
    state = whole[0].state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


RECIPE = dict(
    phases=1, epochs=4, batch_size=32, learning_rate=0.1, momentum=0.9, nesterov=True,
    weight_decay=1e-3, clip_norm=None, clip="all",
    augmentation=Augmentation(crop_padding=1, cutout=2), next_start="best", select="validation",
    reseed_each_phase=False,
)  # fmt: skip


def task(fidelity="exact", **recipe):
    """One that grows after each of its first three epochs."""
    options = dict(interval=1, last_epoch=3, score="snip", calibration_batches=3)
    return small_task(
        RECIPE | recipe,
        lambda model: parameter_groups(model, 1e-3, "matrices"),
        lambda model: DyRep(model, fidelity=fidelity, **options),
        block="convbn",
    )


def test_a_run_goes_on_to_the_bit(one_thread):
    """From inside an epoch, and between a growth and the evaluation that follows it."""
    undisturbed = task()
    whole, states = with_checkpoints(undisturbed)
    places = {}
    for state in states:
        progress, structure = state["progress"], state["method"]["structure"]
        done = progress["trained"] is not None
        places[progress["epoch"], progress["batch"], done, len(structure)] = state
    for place in ((0, 2, True, 1), (1, 1, False, 1), (2, 2, True, 3)):
        again = task()
        resumed = fit(again, resume=places[place])
        assert (resumed.history, resumed.restarts) == (whole.history, whole.restarts)
        assert again.method.log == undisturbed.method.log and len(again.method.log) == 3
        assert resumed.best["structure"] == whole.best["structure"]
        theirs, weights = undisturbed.model.state_dict(), whole.best["weights"]
        assert all(torch.equal(v, theirs[k]) for k, v in again.model.state_dict().items())
        assert all(torch.equal(v, weights[k]) for k, v in resumed.best["weights"].items())


def test_the_loop_keeps_the_optimizer_and_says_what_it_saw(one_thread, monkeypatch):
    seen = []
    real = DyRep.after_epoch

    def after_epoch(self, inputs):
        seen.append([dict(run.step.optimizer.state), None])
        return real(self, inputs)

    from replib.training import loop

    class Run(loop.Run):
        def after_epoch(self):
            nonlocal run
            run = self
            super().after_epoch()
            known, seen[-1][1] = seen[-1][0], dict(self.step.optimizer.state)
            for p in self.model.parameters():
                buffer = seen[-1][1][p]["momentum_buffer"]
                assert buffer is known[p]["momentum_buffer"] if p in known else (buffer == 0).all()

    run = None
    monkeypatch.setattr(DyRep, "after_epoch", after_epoch)
    monkeypatch.setattr(loop, "Run", Run)
    progress = fit(task())
    assert len(seen) == 4 and len(seen[0][0]) < len(seen[0][1]) < len(seen[2][1]) == len(seen[3][1])
    assert [row["epoch"] for row in progress.restarts] == [0, 1, 2]
    assert all(row["jump_eval"] < 1e-5 < row["jump_train"] for row in progress.restarts)
    assert all(row["same_class"] == 1 for row in progress.restarts)
    flops = [row["training_flops"] for row in progress.history]
    assert flops == sorted(flops) and flops[0] < flops[1] < flops[2] < flops[3]
    numbers = [row["training_parameters"] for row in progress.history]
    assert numbers[-1] == sum(p.numel() for p in run.model.parameters()) > numbers[0]


def test_batches_for_norms_are_augmented_and_of_their_own_order(one_thread):
    from replib.training import loop

    run = loop.Run(task(), None, 15, None, lambda: None)
    first = [x.clone() for x, _ in zip(run.inputs_as_in_training(), range(5), strict=False)]
    again = [x.clone() for x, _ in zip(run.inputs_as_in_training(), range(5), strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [len(x) for x in first] == [32, 28, 32, 28, 32]  # 60 images, and once more
    assert not torch.equal(first[0], first[2])
    run.progress.epoch = 1
    assert not torch.equal(first[0], next(run.inputs_as_in_training()))
    assert (first[0] == 0).flatten(1).any(1).all()  # Cutout


# -- cells -----------------------------------------------------------------------------------------
def cell(**changes):
    values = dict(
        data="digits", train_images=80, held_out=20, seed=0, body="digits", block="convbn",
        epochs=5, batch_size=30, learning_rate=0.1, momentum=0.9, weight_decay=1e-3,
        crop_padding=1, initialisation="fan_out",
        dyrep={"interval": 1, "last_epoch": 3, "score": "snip", "calibration_batches": 2},
    )  # fmt: skip
    return Cell.model_validate(values | changes)


def test_a_cell_keeps_the_structure_of_its_best_epoch(tmp_path, monkeypatch, one_thread):
    """Of which the selected weights are, not of its last; and they can be opened again."""
    store, cell_ = Store(tmp_path), cell()
    real = cells.fit

    def fit_and_choose(task, **options):
        progress = real(task, **options)
        assert len(progress.best["structure"]) <= len(task.method.structure) == 3
        return progress

    monkeypatch.setattr(cells, "fit", fit_and_choose)
    from replib.training import loop

    real_accuracy = loop.accuracy
    monkeypatch.setattr(  # the first epoch is the best
        loop, "accuracy", lambda *a: real_accuracy(*a) - len(seen.append(1) or seen)
    )
    seen = []
    planned = cells.Planned("0" * 64, cell_)
    cells.run_cell(planned, {}, store, say=lambda text: None)
    monkeypatch.setattr(loop, "accuracy", real_accuracy)
    result = store.read("0" * 64)["result"]
    assert result["final"]["selected_epoch"] == 0
    assert [len(s) for s in result["adjustments"]["structure"]] == [1, 2, 3]
    model = cells.trained_model(planned, store)
    blocks = [path for path, m in model.named_modules() if isinstance(m, Block)]
    assert blocks == list(result["adjustments"]["structure"][0])
    assert result["deployed"]["fusing_error"] < 1e-5
    flops = result["history"]["training_flops"]
    assert result["compute"]["training_flops"] == 60 * sum(flops) and len(set(flops)) == 4
    assert result["versions"]["dyrep"] == dyrep.VERSION


def test_initialisation_by_fan_out():
    model, other = (cells.new_model(cell(initialisation=kind)) for kind in ("fan_out", "family"))
    weight = model.stages[2][0].block.branches["conv"][0].weight
    assert weight.detach().std().item() == pytest.approx(math.sqrt(2 / (9 * len(weight))), rel=0.05)
    assert torch.equal(model.fc.weight, other.fc.weight)
    assert not torch.equal(weight, other.stages[2][0].block.branches["conv"][0].weight)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"phases": 2}, r"phases \(=2\) with dyrep"),
        ({"ema": 0.5}, r"ema \(=0.5\) with dyrep"),
        ({"cycle": {"warmup": 1}}, "cycle and dyrep exclude each other"),
        ({"epochs": 3}, r"last_epoch \(=3\) must be .* below epochs \(=3\)"),
        ({"dyrep": {"interval": 4, "last_epoch": 3}}, r"at least dyrep.interval \(=4\)"),
        ({"dyrep": {"interval": 1, "last_epoch": 3, "score": "best"}}, "snip"),
    ],
)
def test_cells_that_make_no_sense_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        cell(**changes)


@pytest.mark.parametrize(
    "setting, named",
    [
        ("rows.exact.start=dyrep", "start (='dyrep') must be a row without dyrep"),
        ("cell.block=orepa", "no block can grow in Sequential"),
        ("recipes.grows.dyrep.intervall=3", "perhaps interval is meant"),
    ],
)
def test_tables_that_make_no_sense_are_refused(setting, named):
    with pytest.raises(UserError) as caught:
        load_table(ROOT / "params" / "dyrep-cifar" / "quick.yaml", [setting])
    assert named in str(caught.value)
