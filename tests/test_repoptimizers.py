"""RepOptimizers: multipliers from any tree, equality with the block, files of scales, resuming."""

import copy
import io

import pytest
import test_vectors
import torch
import torch.nn.functional as F
from conftest import small_task, with_checkpoints
from test_dyrep import RECIPE
from torch import nn

from replib.analysis.multipliers import of_blocks, of_single_kernels, side_by_side
from replib.blocks import BLOCKS
from replib.branches import Convolution, Scale
from replib.convert import convert
from replib.experiments import cells
from replib.experiments.params import Cell
from replib.experiments.store import Store
from replib.methods import repoptimizers
from replib.methods.repoptimizers import (
    RepAdamW,
    RepSGD,
    load_scales,
    multiplier,
    multipliers,
    reinitialise,
    save_scales,
    scales_of,
    set_constants,
)
from replib.models import build
from replib.models.repvgg import SIZES, repopt_vgg
from replib.training.loop import fit
from replib.training.optimisation import parameter_groups
from replib.training.step import sgd

official = pytest.mark.skipif(
    not test_vectors.VECTORS.is_dir(), reason="the official numbers are not here"
)
EXACT = dict(rtol=0, atol=1e-12)  # float64, sums of a few numbers of order 1
LINEAR = {"norms": "sum", "scaling": "channel"}
TREES = [  # family, shape, options
    ("csla", (4, 4), {}),
    ("csla", (4, 6), {"stride": 2}),
    ("csla", (4, 6, 5), {"groups": 2, "dilation": 2}),
    ("csla", (4, 4), {"groups": 4, "pointwise": False}),
    ("csla", (2, 2), {"dims": 1}),
    ("csla", (2, 2), {"dims": 3, "trainable_scales": False}),
    ("acb", (4, 4), LINEAR),
    ("repvgg", (4, 4), LINEAR),
    ("mobileone", (4, 4), LINEAR),
    ("dbb", (4, 4), LINEAR | {"without": ["1x1_kxk", "avg"]}),
    ("convbn", (4, 4), LINEAR),
]
REFUSED = [
    ("convbn", {}, "a norm in a branch"),
    ("dbb", LINEAR, "next to AveragePool, a number reaches several"),
    ("dbb", LINEAR | {"without": ["avg"]}, "several pieces of one chain learn"),
    ("dirac", {}, "not what it stores"),
    ("expandnet", {}, "several pieces"),
    ("csla", {"scaling": "scalar"}, "Scalar reaches several"),
]


def randomised(network, seed=0):
    """Float64, its scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.double().modules():
            if isinstance(module, Scale):
                shape = module.parameter.shape
                drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
                module.parameter.copy_((drawn + 0.3) * (1 - 2 * (drawn * 7).floor().remainder(2)))
    return network


def leaves(block):
    """What learns: the convolution of a branch, or, where there is none, its scale."""
    for branch in block.branches.values():
        found = [m.weight for m in branch.modules() if isinstance(m, Convolution)]
        yield from found or [m.weight for m in branch.modules() if isinstance(m, Scale)]


# -- the multiplier --------------------------------------------------------------------------------
@pytest.mark.parametrize("family, shape, options", TREES, ids=str)
def test_the_multiplier_is_that_of_the_jacobian(family, shape, options):
    """dW/dleaf by autograd, number by number; and no leaf reaches two numbers of the kernel."""
    block = randomised(BLOCKS[family](*shape, **options))
    block.set_rate(-0.7)
    weight = block.in_own_form(block.branches_kernel()).weight
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(w, [*leaves(block)], retain_graph=True)]
        )
        for w in weight.flatten()
    ]
    jacobian = torch.stack(rows)  # (numbers of the kernel, leaves)
    assert ((jacobian != 0).sum(0) <= 1).all()
    for power, expected in (
        ("square", jacobian.square()),
        ("absolute", jacobian.abs()),
        ("signed", jacobian),
    ):
        found = multiplier(block, power).weight
        torch.testing.assert_close(found, expected.sum(1).view_as(weight), **EXACT)
    assert (multiplier(block, "none").weight == 1).all()


def test_the_multiplier_of_the_paper():
    """Equation 3 in plain loops: s^2, t^2 more in the centre, 1 more where the identity is."""
    block = randomised(BLOCKS["csla"](3, 3))
    s, t = (block.branches[name][1].weight.tolist() for name in ("conv", "1x1"))
    for power, of in (("square", lambda c: c * c), ("absolute", abs), ("signed", lambda c: c)):
        found = multiplier(block, power).weight
        for o in range(3):
            for i in range(3):
                for h in range(3):
                    for w in range(3):
                        centre = h == w == 1
                        expected = of(s[o]) + centre * (of(t[o]) + (o == i))
                        assert found[o, i, h, w].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("family, options, named", REFUSED, ids=str)
def test_trees_that_no_multiplier_follows_are_refused(family, options, named):
    with pytest.raises(ValueError, match=named):
        multiplier(BLOCKS[family](4, 4, **options), "square")


def test_a_branch_that_does_not_learn_adds_nothing():
    block = randomised(BLOCKS["csla"](4, 4))
    block.branches["1x1"].requires_grad_(False)
    expected = multiplier(BLOCKS["csla"](4, 4).double(), "square").weight * 0
    expected += block.branches["conv"][1].weight.detach().square().view(-1, 1, 1, 1)
    expected[range(4), range(4), 1, 1] += 1
    torch.testing.assert_close(multiplier(block, "square").weight.detach(), expected, **EXACT)
    with pytest.raises(ValueError, match="nothing in it learns"):
        multiplier(block.requires_grad_(False), "square")


# -- the released numbers --------------------------------------------------------------------------
TINY = ((1, 2, 1, 1), (0.125, 0.125, 0.125, 0.0625))  # of the vector file


@pytest.fixture
def tiny(monkeypatch):
    """(search network, target) of RepOpt-VGG in the size of the vectors."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    torch.manual_seed(0)
    return [repopt_vgg("tiny", classes=10, block=block) for block in ("csla", "convbn")]


def in_our_names(state):
    names = {"conv.": "block.branches.conv.0.", "bn.": "block.branches.conv.1.norm."}
    return {
        key if key.startswith("linear") else key.replace(".bn.", f".{names['bn.']}")
        if ".bn." in key else key.replace(".conv.", f".{names['conv.']}"): value
        for key, value in state.items()
    }  # fmt: skip


@official
def test_the_released_multipliers_and_three_steps(tiny):
    case, (search, model) = test_vectors.read("repopt-vgg-1-2-1-1"), tiny
    load_scales(search, test_vectors.under(case, "hs/"))
    before = in_our_names(test_vectors.under(case, "target_before/"))
    left = model.load_state_dict(before, strict=False)
    assert not left.unexpected_keys and all(key.endswith("rate") for key in left.missing_keys)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for power, prefix in (("square", "grad_mult_sgd/"), ("signed", "grad_mult_adamw/")):
        theirs = in_our_names(test_vectors.under(case, prefix))
        ours = {names[p]: factor for p, factor in multipliers(model, search, power).items()}
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
    options = dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=4e-5)
    optimizer = RepSGD(model, search, **options)
    for step in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(case["x"]), case["t"])
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(case[f"loss_{step}"].item(), rel=1e-5)
    after = in_our_names(test_vectors.under(case, "target_after/"))
    for name, value in model.state_dict().items():
        if name in after:  # rates are ours
            torch.testing.assert_close(value, after[name], rtol=1e-4, atol=2e-5)


@official
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_released_steps_of_one_kernel(optimizer):
    case = test_vectors.read(f"repopt.pt/repopt_{optimizer}")
    identity, pointwise, conv = case["scales_id_1x1_conv"]
    search, model = BLOCKS["csla"](4, 4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
    with torch.no_grad():
        for name, value in (("conv", conv), ("1x1", pointwise)):
            search.branches[name][1].weight.copy_(value)
        search.branches["identity"].weight.copy_(identity)
        model.weight.copy_(case["w0"])
    if optimizer == "sgd":
        moving = RepSGD(model, search, lr=0.1, momentum=0.9, weight_decay=4e-5, nesterov=True)
    else:
        moving = RepAdamW(model, search, lr=1e-2, weight_decay=0.05, signed=True)
    torch.testing.assert_close(moving.factors[model.weight], case["mult"], rtol=1e-6, atol=1e-6)
    for gradient, after in zip(case["grads"], case["w"], strict=True):
        model.weight.grad = gradient.clone()
        moving.step()
        torch.testing.assert_close(model.weight.detach(), after, rtol=1e-5, atol=2e-6)


# -- a block with constant scales is a kernel with multiplied gradients ----------------------------
IMAGES = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.arange(16) % 5


SGD = dict(lr=5e-3, momentum=0.9, nesterov=True, weight_decay=1e-2)
ADAMW = dict(lr=1e-3, weight_decay=5e-2)


def last_apart(*arguments, **options):
    """Relative distance of the kernels after 50 steps; scales are of both signs."""
    return side_by_side(*arguments, **options)[-1]


@pytest.mark.parametrize("family, options", [("csla", {}), ("acb", LINEAR)], ids=str)
def test_sgd_on_the_kernel_is_sgd_on_the_branches(family, options):
    """50 steps, all decayed, the identity's scale too. Rounding, grown by 50 steps of training."""
    assert last_apart("sgd", family, options, **SGD) < 1e-10
    assert last_apart("sgd", family, options, **SGD | {"nesterov": False}) < 1e-10


def test_adamw_on_the_kernel_is_adamw_on_the_branches():
    """Up to eps, which is added to |s| g in a branch: nothing of it is left at 1e-16. With signed
    scales it is another network."""
    assert last_apart("adamw", **ADAMW, eps=1e-16) < 1e-10
    assert last_apart("adamw", **ADAMW) < 1e-6
    fast = ADAMW | {"lr": 5e-2}  # little is left of where the kernels began
    assert last_apart("adamw", **fast, eps=1e-16) < 1e-10
    assert last_apart("adamw", **fast, signed=True) > 0.5


def test_without_decay_a_constant_identity_is_followed_too():
    """Of RepVGG's linear block: it has no scale of its own, so that nothing of it decays."""
    options = {"norms": "sum", "scaling": None}
    search = BLOCKS["repvgg"](4, 4, **options)
    assert not any(isinstance(m, Scale) for m in search.modules())
    found = multiplier(search.double(), "square").weight
    assert found[0, 0, 1, 1] == 2 and found[0, 0, 0, 0] == 1  # 3x3 and 1x1; no third one


# -- how a network begins --------------------------------------------------------------------------
@pytest.mark.parametrize("identity", ["scale", "one"])
def test_a_network_begins_as_its_blocks_would(identity):
    search = randomised(build("digits", "csla", classes=5, in_channels=1))
    torch.manual_seed(1)
    model = build("digits", "convbn", classes=5, in_channels=1).double()
    before = copy.deepcopy(model)
    drawn, again = (torch.Generator().manual_seed(7) for _ in range(2))
    reinitialise(model, search, drawn, identity)
    pairs = repoptimizers.pairs(model, search)
    assert len(pairs) > 3
    for path, (conv, block) in pairs.items():
        old = before.get_submodule(path).branches["conv"][0].weight
        s, t = (block.branches[name][1].weight.view(-1, 1, 1) for name in ("conv", "1x1"))
        bound = block.in_channels**-0.5
        pointwise = torch.empty(block.out_channels, block.in_channels, 1, 1).uniform_(
            -bound, bound, generator=again
        )
        expected = old * s.unsqueeze(-1)
        expected[:, :, 1, 1] += pointwise[..., 0, 0].double() * t[:, 0]
        if "identity" in block.branches:
            one = torch.ones(block.out_channels).double()
            diagonal = block.branches["identity"].weight if identity == "scale" else one
            expected[range(len(one)), range(len(one)), 1, 1] += diagonal
        torch.testing.assert_close(conv.weight, expected, **EXACT)
    same = [n for n, p in model.named_parameters() if torch.equal(p, before.get_parameter(n))]
    assert same == [n for n in dict(model.named_parameters()) if not n.endswith("conv.0.weight")]
    with pytest.raises(ValueError, match=r"identity \(='half'\)"):
        reinitialise(model, search, identity="half")
    model.train()(torch.randn(2, 1, 8, 8).double())
    with pytest.raises(ValueError, match="has been trained"):
        reinitialise(model, search)


@pytest.mark.parametrize("constants", repoptimizers.CONSTANTS)
def test_which_constants(constants):
    search = randomised(build("digits", "csla", classes=5, in_channels=1))
    before = {name: scale.detach().clone() for name, scale in scales_of(search).items()}
    set_constants(search, constants)
    for name, scale in scales_of(search).items():
        expected = {"mean": before[name].mean().expand_as(scale), "ones": torch.ones_like(scale)}
        assert torch.equal(scale, expected.get(constants, before[name]))
    with pytest.raises(ValueError, match=r"constants \(='best'\)"):
        set_constants(search, "best")


def test_a_network_of_plain_layers_and_what_it_is_imagined_as():
    """The user's own: `convert` makes the search network, of the same names."""
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 81, 5)).double()
    search = randomised(convert(model, "csla", init="paper"))
    assert list(repoptimizers.addition_blocks(search)) == ["0"]
    optimizer = RepSGD(model, search, lr=0.1)
    before = copy.deepcopy(model)
    reinitialise(model, search)
    model.load_state_dict(before.state_dict())
    F.cross_entropy(model(IMAGES), LABELS).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    factor = multiplier(search.get_submodule("0"), "square").weight
    for name, gradient in gradients.items():
        step = gradient * factor if name == "0.weight" else gradient
        expected = before.get_parameter(name) - 0.1 * step
        torch.testing.assert_close(model.get_parameter(name), expected, **EXACT)


def test_networks_that_do_not_fit_are_told():
    search, model = (
        build("digits", block, classes=5, in_channels=1) for block in ("csla", "convbn")
    )
    path = next(iter(repoptimizers.addition_blocks(search)))
    wide = build("digits_wide", "convbn", classes=5, in_channels=1)
    for other, named in (
        (wide, f"{path} of model has a kernel"),
        (build("digits", "repvgg", classes=5, in_channels=1), "has branches"),
        (nn.Sequential(), f"no layer '{path}'"),
    ):
        with pytest.raises(ValueError, match=named):
            RepSGD(other, search, [nn.Parameter(torch.ones(()))])
    with pytest.raises(ValueError, match="no block with scales"):
        RepSGD(model, model)
    with pytest.raises(ValueError, match="of search: no single kernel"):
        RepSGD(model, build("digits", "dbb", classes=5, in_channels=1, block_options=LINEAR))
    head = [p for n, p in model.named_parameters() if "conv" not in n]
    with pytest.raises(ValueError, match="params leave out"):
        RepSGD(model, search, head)


# -- files of scales -------------------------------------------------------------------------------
def test_scales_are_written_and_read_in_the_released_names(tiny, tmp_path):
    search, _ = tiny
    randomised(search).float()
    save_scales(search, tmp_path / "scales.pth")
    state = torch.load(tmp_path / "scales.pth", weights_only=True)
    assert list(state)[:5] == [
        "stage0.scale_conv.weight", "stage0.scale_1x1.weight", "stage1.0.scale_conv.weight",
        "stage1.0.scale_1x1.weight", "stage2.0.scale_conv.weight",
    ]  # fmt: skip
    assert "stage2.1.scale_identity.weight" in state and len(state) == 13
    for source in (tmp_path / "scales.pth", search.state_dict(), {"model": search.state_dict()}):
        other = repopt_vgg("tiny", classes=3, block="csla")
        kernels = [m.weight.detach().clone() for m in other.modules() if isinstance(m, Convolution)]
        load_scales(other, source)
        for a, b in zip(scales_of(search).values(), scales_of(other).values(), strict=True):
            assert torch.equal(a, b)
        now = [m.weight for m in other.modules() if isinstance(m, Convolution)]
        assert all(map(torch.equal, kernels, now))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda s: s.pop("stage1.0.scale_1x1.weight"), "missing: stage1.0.scale_1x1.weight"),
        (lambda s: s.update({"stage9.scale_conv.weight": torch.ones(8)}), "unexpected: stage9"),
        (
            lambda s: s.update({"stage0.scale_conv.weight": torch.ones(3)}),
            r"of another shape: stage0.scale_conv.weight \(3,\) instead of \(8,\)",
        ),
        (lambda s: [s.pop(k) for k in list(s)[:5]], "and 2 more. Take the file"),
    ],
)
def test_a_file_of_other_scales_is_refused_and_changes_nothing(tiny, change, named):
    search = tiny[0]
    state = {repoptimizers.file_name(k): s.detach().clone() for k, s in scales_of(search).items()}
    change(state)
    before = {name: scale.detach().clone() for name, scale in scales_of(search).items()}
    with pytest.raises(ValueError, match=named):
        load_scales(search, state)
    assert all(torch.equal(before[name], scale) for name, scale in scales_of(search).items())


def test_the_scales_of_ghosts_are_taken_in_their_order():
    search = randomised(build("repopt_ghostnet_050", "csla", classes=2, in_channels=3)).float()
    blocks, state = repoptimizers.addition_blocks(search), {}
    for i, block in enumerate(blocks.values()):
        state[f"features.{i}.primary_conv.weight"] = torch.ones(1)
        state[f"features.{i}.fusion_scale.weight"] = block.branches["identity"].weight.detach()
        state[f"features.{i}.cheap_operation.1.weight"] = block.branches["conv"][1].weight.detach()
    other = build("repopt_ghostnet_050", "csla", classes=3, in_channels=3)
    load_scales(other, state)
    for a, b in zip(scales_of(search).values(), scales_of(other).values(), strict=True):
        assert torch.equal(a, b)
    del state["features.31.fusion_scale.weight"]
    with pytest.raises(
        ValueError, match=r"has 31 modules with a fusion_scale.weight, .* 32 blocks"
    ):
        load_scales(other, state)


# -- the optimizers in a loop of one's own ---------------------------------------------------------
def start(kind=RepSGD, **options):
    search = of_blocks("csla", {}, seed=3)
    model = of_single_kernels(search)
    if kind is RepSGD:
        options = {"momentum": 0.9, "weight_decay": 1e-3} | options
    return model, search, kind(model, search, lr=0.05 if kind is RepSGD else 1e-2, **options)


def stepped(model, optimizer, steps, factor=1.0, parts=1, scaler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in zip(IMAGES.chunk(parts), LABELS.chunk(parts), strict=True):
            loss = F.cross_entropy(model.eval()(x), y) / parts
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return model.state_dict()


def close(a, b):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [RepSGD, RepAdamW])
def test_accumulated_and_scaled_gradients_change_nothing(kind):
    for fused in (False, True) if kind is RepSGD else (None,):
        options = {} if fused is None else {"fused": fused}
        plain, _, optimizer = start(kind, **options)
        expected = stepped(plain, optimizer, 4)
        parts, _, optimizer = start(kind, **options)
        close(stepped(parts, optimizer, 4, parts=4), expected)
        scaled, _, optimizer = start(kind, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        close(stepped(scaled, optimizer, 4, scaler=scaler), expected)
        assert scaler.get_scale() == 4096


@pytest.mark.parametrize("kind", [RepSGD, RepAdamW])
def test_it_goes_on_to_the_bit_with_multipliers_made_anew(kind, one_thread):
    whole, _, optimizer = start(kind)
    stepped(whole, optimizer, 3)
    buffer = io.BytesIO()
    torch.save([whole.state_dict(), optimizer.state_dict()], buffer)
    # Nothing of the size of a multiplier is in it: the momenta, and a few words.
    expected = stepped(whole, optimizer, 3)
    model, _, again = start(kind)
    states = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    for part, state in zip((model, again), states, strict=True):
        part.load_state_dict(state)
    assert all(torch.equal(v, expected[k]) for k, v in stepped(model, again, 3).items())
    tensors = sum(
        isinstance(v, torch.Tensor) for s in states[1]["state"].values() for v in s.values()
    )
    assert tensors == len([*model.parameters()]) * (1 if kind is RepSGD else 3)


@pytest.mark.parametrize("kind", [RepSGD, RepAdamW])
def test_what_it_refuses(kind):
    model, search, optimizer = start(kind)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    model(IMAGES).sum().backward()
    with pytest.raises(ValueError, match="closure must be None"):
        optimizer.step(lambda: None)
    with torch.no_grad():
        next(iter(scales_of(search).values())).add_(1)
    other = kind(model, search)
    with pytest.raises(ValueError, match="with other scales"):
        other.load_state_dict(optimizer.state_dict())


def test_multipliers_follow_the_parameters_and_their_layout():
    model, search, _ = start()
    model.to(memory_format=torch.channels_last)
    optimizer = RepSGD(model, search, lr=1.0)
    factor = optimizer.factors[model.second.weight]
    assert factor.is_contiguous(memory_format=torch.channels_last)
    elsewhere = nn.Parameter(model.second.weight.to("meta"))  # as after a move to a GPU
    optimizer.factors[elsewhere] = factor
    assert optimizer.factor(elsewhere).is_meta and optimizer.factors[elsewhere].is_meta


# -- in the training loop and in cells -------------------------------------------------------------
def task(kind):
    """A run of the loop by one of the optimizers."""
    search = randomised(build("digits", "csla", classes=10, in_channels=1)).float()
    made = small_task(
        RECIPE | {"epochs": 2, "clip_norm": None, "nesterov": kind == "sgd"},
        lambda model: parameter_groups(model, 1e-3, "matrices"),
        block="convbn",
    )
    reinitialise(made.model, search, torch.Generator().manual_seed(1))
    if kind == "sgd":
        made.optimizer = lambda groups: sgd(
            groups, momentum=0.9, nesterov=True, kind=lambda *a, **o: RepSGD(
                made.model, search, *a, **o)
        )  # fmt: skip
    else:
        made.optimizer = lambda groups: RepAdamW(made.model, search, groups)
    made.observe = lambda: {"scales": repoptimizers.mean_scales(search)}
    return made


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_run_goes_on_to_the_bit(kind, one_thread):
    undisturbed = task(kind)
    whole, states = with_checkpoints(undisturbed)
    assert (
        whole.history[0]["scales"].keys()
        == scales_of(build("digits", "csla", classes=10, in_channels=1)).keys()
    )
    middle = next(s for s in states if s["progress"]["epoch"] == 1 and s["progress"]["batch"] == 1)
    again = task(kind)
    assert fit(again, resume=middle).history == whole.history
    theirs = undisturbed.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in again.model.state_dict().items())


def cell(**changes):
    values = dict(
        data="digits", train_images=80, held_out=20, seed=0, body="digits", block="convbn",
        epochs=2, batch_size=30, learning_rate=0.05, momentum=0.9, nesterov=True,
        weight_decay=1e-3,
    )  # fmt: skip
    return Cell.model_validate(values | changes)


def planned(cell_, key, **paths):
    return cells.Planned(key * 64, cell_, **paths)


def test_a_cell_is_trained_with_the_scales_of_another(tmp_path, monkeypatch, one_thread):
    """Search and target; and the same from the file that the search would write."""
    store = Store(tmp_path)
    search = planned(cell(block="csla", search=True), "a")
    cells.run_cell(search, {}, store, say=lambda text: None)
    found = store.read(search.key)["result"]
    trained = cells.trained_model(search, store)
    scales = found["history"]["scales"]
    assert len(scales) == 2 and scales[0].keys() == scales_of(trained).keys()
    assert scales[0] != scales[1]
    row = planned(cell(repopt={}, scales=search.key), "b")
    made = {}
    real = cells.fit

    def fit_and_keep(task, **options):
        made["task"] = task
        return real(task, **options)

    monkeypatch.setattr(cells, "fit", fit_and_keep)
    cells.run_cell(row, {search.key: search}, store, say=lambda text: None)
    optimizer = made["task"].optimizer(made["task"].groups())
    assert isinstance(optimizer, RepSGD)
    ours = multipliers(made["task"].model, trained, "square")
    assert all(torch.equal(optimizer.factors[p], factor) for p, factor in ours.items())
    result = store.read(row.key)["result"]
    assert result["versions"]["repopt"] == repoptimizers.VERSION
    assert result["deployed"]["fusing_error"] < 1e-5
    save_scales(trained, tmp_path / "scales.pth")
    path = str(tmp_path / "scales.pth")
    other = planned(cell(repopt={}, scales=f"file:{'0' * 64}"), "c", scales_path=path)
    cells.run_cell(other, {}, store, say=lambda text: None)
    again = store.read(other.key)["result"]
    assert again["history"] == result["history"]  # same network, same scales, same draws
    signed = {"optimizer": "adamw", "momentum": 0.0, "nesterov": False}
    rows = {
        "d": cell(repopt={"initialise": False}, scales=search.key),
        "e": cell(repopt={"multiply": False}, scales=search.key),
        "f": cell(repopt={"constants": "ones"}),
        "g": cell(repopt={}, scales=search.key, **signed),
        "h": cell(repopt={"signed": True}, scales=search.key, **signed),
        "i": cell(repopt={"constants": "mean"}, scales=search.key),
        "j": cell(repopt={"identity": "one"}, scales=search.key),
    }
    histories = [result["history"]["train_loss"]]
    for key, one in rows.items():
        cells.run_cell(planned(one, key), {search.key: search}, store, say=lambda text: None)
        histories.append(store.read(key * 64)["result"]["history"]["train_loss"])
        assert (made["task"].optimizer is None) == (key == "e")
        if key in "gh":
            rule = made["task"].optimizer(made["task"].groups()).scales
            power = {"g": "absolute", "h": "signed"}[key]
            assert rule == repoptimizers.digest(trained, power)
    assert histories.pop(5) == histories[4]  # no scale has become negative
    assert len({*map(tuple, histories)}) == len(histories)  # each does something of its own


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"scales": "a" * 16}, "needs repopt"),
        ({"repopt": {}}, r"repopt.constants \(=searched\) needs scales"),
        ({"repopt": {"constants": "ones"}, "scales": "a" * 16}, "takes no scales"),
        ({"repopt": {"initialise": False, "multiply": False}}, "or be left out"),
        ({"repopt": {"signed": True}}, r"repopt.signed \(=true\) is for optimizer=adamw"),
        ({"repopt": {}, "block": "repvgg"}, r"block \(=repvgg\) with repopt must be convbn"),
        ({"repopt": {}, "clip_norm": 1.0}, r"clip_norm \(=1.0\) with repopt must be null"),
        ({"repopt": {}, "start": "a" * 16}, "start and repopt exclude each other"),
        ({"repopt": {}, "cycle": {"warmup": 1}, "phases": 2}, "cycle and repopt exclude"),
    ],
)
def test_cells_that_make_no_sense_are_refused(changes, named):
    needs = "constants" not in changes.get("repopt", {}) and "repopt" in changes
    given = {"scales": "a" * 16} if needs and changes != {"repopt": {}} else {}
    with pytest.raises(ValueError, match=named):
        cell(**given | changes)
