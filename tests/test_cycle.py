"""The cycle on whole networks: what is kept, what is frozen, what decays, and when."""

import copy
import functools

import pytest
import torch
from torch import nn

from replib.blocks import BLOCKS
from replib.branches import Norm
from replib.fusing import deployed_copy as fuse
from replib.methods.calibration import calibrate
from replib.methods.cycle import RATE_SCHEDULES, Cycle, decay_groups
from replib.models.cifar_repvgg import StageNet
from replib.networks import outermost_blocks

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def fits(family):
    """Whether every 3x3 layer of a network can be of it."""
    try:
        family(3, 4, 3, stride=2)
    except ValueError:
        return False
    return True


KNOWN = [name for name, family in BLOCKS.items() if fits(family)]


def network(block="repvgg"):
    """A trained-looking network in float64: norms scrambled, statistics from data."""
    return copy.deepcopy(made(block))


@functools.cache
def made(block):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = StageNet((1, 2, 1), (6, 8, 8), (1, 2, 1), classes=5, block=block).double()
        for module in model.modules():
            if isinstance(module, Norm):
                nn.init.uniform_(module.norm.weight, 0.5, 1.5)
                nn.init.uniform_(module.norm.bias, -0.3, 0.3)
        model.train()
        for _ in range(10):
            model(IMAGES)
    return model.eval()


def jump(before, after):
    """max |after - before| / max |before|."""
    return ((after - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize(
    "schedule, warmup, epochs, start",
    [
        ("official", 5, 30, [1.0, 0.4, 0.6, 0.8, 1.0, 1.0]),
        ("official", 20, 40, [1.0, 0.1, 0.15, 0.2]),
        ("ramp", 4, 8, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        ("constant", 3, 6, [1.0, 1.0]),
    ],
)
def test_rate_schedules(schedule, warmup, epochs, start):
    rates = [RATE_SCHEDULES[schedule](epoch, warmup) for epoch in range(epochs)]
    assert rates[: len(start)] == pytest.approx(start)
    assert rates[-1] == 1.0
    assert rates[1:] == sorted(rates[1:])


@pytest.mark.parametrize("options", [{}, {"rate_schedule": "ramp"}, {"norm": "unit"}])
@pytest.mark.parametrize("block", KNOWN)
def test_preserving_keeps_the_function_in_eval_mode(block, options):
    model = network(block)
    before = model(IMAGES)
    Cycle(model, warmup=4, fidelity="preserving", **options).start_cycle(IMAGES)
    # float64, four blocks: rounding of order 1e-14, amplified by the norms' slopes
    assert jump(before, model(IMAGES)) < 1e-9
    assert jump(before, fuse(model)(IMAGES)) < 1e-9


@pytest.mark.parametrize("block", KNOWN)
def test_preserving_with_matched_statistics_keeps_train_mode_too(block):
    """On the images that were measured, up to the norms' epsilon inside of branches."""
    model = network(block)
    before = model(IMAGES)
    cycle = Cycle(model, warmup=4, fidelity="preserving")
    cycle.start_cycle(IMAGES)
    assert not cycle.blocks or jump(before, model.train()(IMAGES)) < 1e-4


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("block", KNOWN)
def test_preserving_in_float32_stays_within_rounding(block, rate):
    model = network(block).float()
    for module in outermost_blocks(model).values():
        module.set_rate(rate)
    images = IMAGES.float()
    before = model(images)
    Cycle(model, warmup=4, fidelity="preserving").start_cycle(images)
    assert jump(before, model(images)) < 1e-5


def test_preserving_without_images_keeps_eval_mode():
    model = network()
    before = model(IMAGES)
    Cycle(model, warmup=4, fidelity="preserving").start_cycle()
    assert jump(before, model(IMAGES)) < 1e-9


def test_preserving_merges_with_the_true_rate():
    model = network()
    for block in outermost_blocks(model).values():
        block.set_rate(0.4)
    before = model(IMAGES)
    Cycle(model, warmup=4, fidelity="preserving").start_cycle(IMAGES)
    assert jump(before, model(IMAGES)) < 1e-9


def test_official_jumps_and_is_exact_at_rate_zero():
    model = network()
    before = model(IMAGES)
    Cycle(model, warmup=4).start_cycle()
    assert jump(before, model(IMAGES)) > 0.1
    for block in outermost_blocks(model).values():
        block.set_rate(0.0)
    assert jump(before, model(IMAGES)) < 1e-9


def test_official_ignores_the_rate_when_it_merges():
    model = network()
    twin = copy.deepcopy(model)
    for block in outermost_blocks(twin).values():
        block.set_rate(0.4)
    for net in (model, twin):
        Cycle(net, warmup=4, seed=3).start_cycle()
    assert torch.equal(model(IMAGES), twin(IMAGES))


@pytest.mark.parametrize("restructure", ["none", "redraw"])
def test_control_and_redraw_leave_the_main_branch(restructure):
    model = network()
    old = copy.deepcopy(model.state_dict())
    Cycle(model, warmup=4, restructure=restructure).start_cycle()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, old[k])}
    assert not any(".dense." in key for key in changed)
    assert bool(changed) == (restructure == "redraw")


@pytest.mark.parametrize("reseed", [False, True])
def test_cycles_draw_anew_unless_reseeded(reseed):
    model, drawn = network(), []
    cycle = Cycle(model, warmup=4, reseed=reseed)
    for _ in range(2):
        cycle.start_cycle()
        block = next(iter(outermost_blocks(model).values()))
        drawn.append(block.branches["1x1"][0].weight.clone())
    assert torch.equal(*drawn) == reseed


@pytest.mark.parametrize("freeze, factor", [("skip", 1.0), ("zero", (1 - 0.1 * 0.5) ** 2)])
def test_frozen_main_branch(freeze, factor):
    """skip: bit-identical; zero: weight decay alone shrinks it, by (1 - lr decay) a step."""
    model = network().train()
    cycle = Cycle(model, warmup=2, freeze=freeze)
    cycle.start_cycle()
    block = next(iter(outermost_blocks(model).values()))
    main, side = block.main_branch[0].weight, block.branches["1x1"][0].weight
    before, side_before = main.detach().clone(), side.detach().clone()
    optimizer = torch.optim.SGD(cycle.parameter_groups(0.5), lr=0.1)
    for epoch in range(3):
        cycle.epoch(epoch)
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        cycle.after_backward()
        held = main.detach().clone()
        optimizer.step()
        if epoch < 2:
            torch.testing.assert_close(main, before * factor ** ((epoch + 1) / 2))
            assert freeze == "zero" or torch.equal(main, before)
    assert not torch.equal(main, held)  # after the warm-up it trains
    assert not torch.equal(side, side_before)


def test_decay_groups_hold_every_parameter_once():
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = decay_groups(model, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and free["weight_decay"] == 0
    kernels = {names[id(p)] for p in decayed["params"]}
    assert kernels == {n for n in names.values() if n.endswith(".0.weight")}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert [len(g["params"]) for g in decay_groups(model, 1e-4, "all")] == [len(names)]


def test_blocks_without_side_branches_are_kept_and_listed():
    model = network("convbn")
    old = copy.deepcopy(model.state_dict())
    cycle = Cycle(model, warmup=4)
    cycle.start_cycle()
    assert not cycle.blocks and set(cycle.kept.values()) == {"has no side branches"}
    assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("block", ["repvgg", "dbb", "acb", "rep", "mobileone"])
def test_official_in_train_mode_is_normalised_by_the_batch(block):
    """Exact in eval mode at rate 0; in train mode gamma (y - m) / sqrt(q + eps (gamma / s)^2) and
    a constant, y being the convolution with the merged kernel and m, q its batch's statistics."""
    model = network(block)
    block = outermost_blocks(model)["stages.1.1.block"]
    x = torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    kernel, norm = block.merged(rate=1.0), block.main_branch[1].norm
    y = nn.functional.conv2d(x, kernel.weight, padding=1)
    Cycle(model, warmup=4, rate_schedule="ramp").start_cycle()
    sigma = (norm.running_var + norm.eps).sqrt()
    mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    gain = norm.weight / (variance + norm.eps * (norm.weight / sigma) ** 2).sqrt()
    constant = kernel.bias + norm.running_mean * norm.weight / sigma
    shape = (1, -1, 1, 1)
    in_train = gain.view(shape) * (y - mean.view(shape)) + constant.view(shape)
    torch.testing.assert_close(block.eval()(x), y + kernel.bias.view(shape), rtol=0, atol=1e-11)
    assert jump(y + kernel.bias.view(shape), in_train) > 0.1
    torch.testing.assert_close(block.train()(x), in_train, rtol=0, atol=1e-11)


@pytest.mark.parametrize("fidelity", ["official", "preserving"])
def test_a_partial_cycle_leaves_the_other_blocks_alone(fidelity):
    model = network("dbb")
    old = copy.deepcopy(model.state_dict())
    cycle = Cycle(model, warmup=4, fidelity=fidelity, blocks=["stages.1.*", "stages.2.0.block"])
    cycle.start_cycle(IMAGES)
    assert list(cycle.blocks) == ["stages.1.0.block", "stages.1.1.block", "stages.2.0.block"]
    assert cycle.kept == {"stages.0.0.block": "was not chosen"}
    changed = {
        k.rpartition(".branches")[0]
        for k, v in model.state_dict().items()
        if not torch.equal(v, old[k])
    }
    assert changed == set(cycle.blocks)


@pytest.mark.parametrize("block", KNOWN)
@pytest.mark.parametrize("norm", [None, "match"])
def test_calibration_makes_the_two_modes_agree(block, norm):
    """On the images that were measured, each norm normalises with its own running statistics."""
    model = network(block)
    cycle = Cycle(model, warmup=4, norm=norm, calibrate=True)
    cycle.start_cycle(IMAGES)
    n = IMAGES.numel() / IMAGES.shape[1]  # running variances are unbiased: n / (n - 1), at least
    in_eval, in_train = model.eval()(IMAGES), model.train()(IMAGES)
    assert jump(in_train, in_eval) < (0.2 if cycle.blocks else 20 / n)


def test_official_with_matched_statistics_has_those_of_training():
    """The running statistics of every main norm are those of what enters it in train mode."""
    model = network().double()
    images = IMAGES.double()
    Cycle(model, warmup=4, norm="match").start_cycle(images)
    calibrated = copy.deepcopy(model)
    calibrate(calibrated, [images])
    both = zip(*(outermost_blocks(m).values() for m in (model, calibrated)), strict=True)
    for norms in ([block.main_branch[-1].norm for block in blocks] for blocks in both):
        torch.testing.assert_close(norms[0].running_mean, norms[1].running_mean)
        variance = norms[1].running_var  # an unbiased one
        torch.testing.assert_close(norms[0].running_var, variance, rtol=0.02, atol=0)


def test_images_are_asked_for():
    for options in ({"norm": "match"}, {"calibrate": True}):
        with pytest.raises(ValueError, match=r"start_cycle.images."):
            Cycle(network(), warmup=4, **options).start_cycle()


def test_mode_is_left_as_it_was():
    model = network().train()
    model.stages[0].eval()
    modes = [module.training for module in model.modules()]
    Cycle(model, warmup=4, fidelity="preserving").start_cycle(IMAGES)
    assert [module.training for module in model.modules()] == modes


def test_state_dict_resumes():
    one, two = network(), network()
    first = Cycle(one, warmup=4)
    first.start_cycle()
    first.epoch(1)
    second = Cycle(two, warmup=4)
    second.load_state_dict(first.state_dict())
    assert second.rate == first.rate == 0.5
    first.start_cycle()
    second.start_cycle()
    names = [name for name in one.state_dict() if "1x1.0" in name]
    assert names and all(torch.equal(one.state_dict()[n], two.state_dict()[n]) for n in names)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"warmup": 0}, "warmup"),
        ({"warmup": 2, "fidelity": "exact"}, "'official', 'preserving'|official, preserving"),
        ({"warmup": 2, "freeze": "yes"}, "none, skip, zero"),
        ({"warmup": 2, "restructure": "merge"}, "cycle, redraw, none"),
        ({"warmup": 2, "blocks": ["stages.7.*"]}, "stages.7.*names no block.*stages.0.0.block"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Cycle(network(), **options)


def test_fuse_refuses_train_mode_and_handles_root_and_shared_blocks():
    model = network()
    with pytest.raises(ValueError, match="train mode"):
        fuse(copy.deepcopy(model).train())
    block = BLOCKS["repvgg"](4, 4).eval()
    assert isinstance(fuse(block), nn.Conv2d)
    fused = fuse(nn.Sequential(block, nn.ReLU(), block).eval())
    assert fused[0] is fused[2] and isinstance(fused[0], nn.Conv2d)
    assert not any(type(m).__module__.startswith("replib.bl") for m in fuse(model).modules())
