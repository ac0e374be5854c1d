"""The parts of the training recipes: rates, what decays, averages, optimizers, and the loop."""

import copy
import io
import math

import pytest
import test_training
import torch
import torch.nn.functional as F
from conftest import small_task
from pydantic import ValidationError
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from replib import official
from replib.architectures import ARCHITECTURES
from replib.blocks import BLOCKS
from replib.errors import UserError
from replib.experiments.cells import plan, recipe_of, run_cell
from replib.experiments.params import Cell, Table
from replib.experiments.store import Store
from replib.methods.cycle import Cycle
from replib.training import step as steps_module
from replib.training.evaluation import Split, accuracy
from replib.training.loop import OutOfTime, fit, training_flops
from replib.training.optimisation import (
    DECAY,
    Average,
    Schedule,
    cosine,
    parameter_groups,
    places,
)
from replib.training.step import Step, adamw, set_rate, sgd

BASE, EPOCHS, STEPS = 0.1, 6, 4  # of the schedules below
RECIPE = test_training.RECIPE | dict(phases=1, learning_rate=0.05, next_start="last")
ADAMW = dict(optimizer="adamw", momentum=0.0, nesterov=False, learning_rate=0.01)


pytestmark = pytest.mark.usefixtures("one_thread")


def task(cycle=None, decay="weights", bias_rate=1.0, **recipe):
    """80 training images, hence steps of 32, 32 and 16."""
    return small_task(
        RECIPE | recipe,
        lambda model: parameter_groups(model, 1e-3, decay, bias_rate),
        lambda model: cycle and Cycle(model, **cycle),
        images=100,
    )


def watched(monkeypatch, before=lambda step: None, after=lambda step: None):
    """Call these around every training step."""
    update = Step.__call__

    def call(step, *inputs, **share):
        before(step)
        loss = update(step, *inputs, **share)
        after(step)
        return loss

    monkeypatch.setattr(Step, "__call__", call)


# -- the learning rate -----------------------------------------------------------------------------
def every_step(schedule):
    """The rates of all steps of a phase."""
    return [
        schedule.rate(BASE, epoch, EPOCHS, step, STEPS)
        for epoch in range(EPOCHS)
        for step in range(STEPS)
    ]


def by_torch(make, per_step):
    """The rates of all steps under a scheduler of torch, stepped per epoch or per step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], BASE)
    scheduler, rates = make(optimizer), []
    for i in range(EPOCHS * STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if per_step or i % STEPS == STEPS - 1:
            scheduler.step()
    return rates


def by_timm(late=False, per_epoch=False, **options):
    """The rates under timm's scheduler, as its loops call it: before the step with its number, or
    after it (`late`), as Swin's loops do, from which RepVGG's is made."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], BASE)
    scheduler, rates = CosineLRScheduler(optimizer, t_in_epochs=per_epoch, **options), []
    for i in range(EPOCHS * STEPS):
        if per_epoch and i % STEPS == 0:
            scheduler.step(i // STEPS)
        if not late:
            scheduler.step_update(i)
        rates.append(optimizer.param_groups[0]["lr"])
        if late:
            scheduler.step_update(i)
    return rates


def by_orepa(warmup):
    """OREPA's released formula: the number of the step over the length of the warm-up, then a
    cosine over the rest."""
    total = EPOCHS * STEPS
    return [
        i / warmup * BASE
        if i < warmup
        else BASE * (1 + math.cos(math.pi * (i - warmup) / (total - warmup))) / 2
        for i in range(total)
    ]


def by_dyrep(warmup, first, least):
    """An epoch of the warm-up at a rate each, then a cosine over the steps that are left."""
    rates = []
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            if epoch < warmup:
                rates.append(first + (BASE - first) * epoch / warmup)
            else:
                done = ((epoch - warmup) * STEPS + step) / ((EPOCHS - warmup) * STEPS)
                rates.append(least + (BASE - least) * (1 + math.cos(math.pi * done)) / 2)
    return rates


T = EPOCHS * STEPS
SCHEDULES = {
    "per epoch": ({}, lambda: by_torch(lambda o: CosineAnnealingLR(o, EPOCHS), False)),
    "per epoch to a least": (
        {"minimum_rate": 0.01},
        lambda: by_torch(lambda o: CosineAnnealingLR(o, EPOCHS, 0.01), False),
    ),
    "per step": ({"rate_per": "step"}, lambda: by_torch(lambda o: CosineAnnealingLR(o, T), True)),
    "per step to a least": (
        {"rate_per": "step", "minimum_rate": 1e-6},
        lambda: by_torch(lambda o: CosineAnnealingLR(o, T, 1e-6), True),
    ),
    "milestones": (
        {"schedule": "steps", "milestones": (2, 5)},
        lambda: by_torch(lambda o: MultiStepLR(o, [2, 5]), False),
    ),
    "milestones per step": (
        {"schedule": "steps", "milestones": (3,), "milestone_factor": 0.5, "rate_per": "step"},
        lambda: by_torch(lambda o: MultiStepLR(o, [3 * STEPS], 0.5), True),
    ),
    "timm per epoch": (
        {"warmup_epochs": 2, "warmup_rate": 0.02},
        lambda: by_timm(per_epoch=True, t_initial=EPOCHS, warmup_t=2, warmup_lr_init=0.02),
    ),
    "timm per step": (
        {"rate_per": "step", "warmup_epochs": 2, "minimum_rate": 1e-3},
        lambda: by_timm(t_initial=T, warmup_t=2 * STEPS, lr_min=1e-3),
    ),
    "RepVGG": (
        {"rate_per": "step", "warmup_epochs": 2, "late_steps": 1},
        lambda: by_timm(late=True, t_initial=T, warmup_t=2 * STEPS),
    ),
    "RepVGG without a warm-up": (
        {"rate_per": "step", "late_steps": 1},
        lambda: by_timm(late=True, t_initial=T),
    ),
    "RepMLP": (
        {"rate_per": "step", "warmup_epochs": 1, "warmup_rate": 5e-7, "late_steps": 1},
        lambda: by_timm(late=True, t_initial=T, warmup_t=STEPS, warmup_lr_init=5e-7),
    ),
    "timm, the warm-up before": (
        {"rate_per": "step", "warmup_epochs": 1, "warmup_steps": 2, "warmup_counts": False},
        lambda: by_timm(t_initial=T - 6, warmup_t=6, warmup_prefix=True),
    ),
    "OREPA": (
        {"rate_per": "step", "warmup_steps": 5, "warmup_counts": False},
        lambda: by_orepa(5),
    ),
    "DyRep": (
        {
            "rate_per": "step", "warmup_epochs": 2, "warmup_rate": 1e-6, "warmup_per": "epoch",
            "warmup_counts": False, "minimum_rate": 1e-7,
        },
        lambda: by_dyrep(2, 1e-6, 1e-7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULES)
def test_a_schedule_is_the_usual_one(case):
    """Against torch's and timm's schedulers, and plain loops, step by step."""
    arguments, usual = SCHEDULES[case]
    assert every_step(Schedule(**arguments)) == pytest.approx(usual(), rel=1e-12, abs=1e-15)


def test_poly_is_a_power_of_what_is_left():
    """Chen et al., DeepLab, equation of the "poly" policy: base (1 - step / steps) ^ 0.9."""
    schedule = Schedule(schedule="poly", rate_per="step")
    rates = [schedule.rate(0.5, step // 5, 4, step % 5, 5) for step in range(20)]
    assert rates == pytest.approx([0.5 * (1 - step / 20) ** 0.9 for step in range(20)])
    warm = Schedule(schedule="poly", rate_per="step", warmup_steps=4, warmup_counts=False)
    assert warm.rate(0.5, 0, 4, 4, 5) == 0.5 and warm.rate(0.5, 3, 4, 4, 5) == pytest.approx(
        0.5 * (1 / 16) ** 0.9
    )


def test_the_default_schedule_is_what_it_was_to_the_bit():
    for epoch in range(30):
        assert Schedule().rate(0.75, epoch, 30, 7, 11) == cosine(epoch, 30, 0.75)


def test_the_first_rates():
    """Where the codes differ most: 0 at first (OREPA; twice in RepVGG), or the base rate."""
    late = every_step(Schedule(rate_per="step", warmup_epochs=2, late_steps=1))
    assert late[:3] == [0.0, 0.0, BASE / (2 * STEPS)]
    assert every_step(Schedule(rate_per="step", warmup_steps=5))[:2] == [0.0, BASE / 5]
    assert every_step(Schedule(rate_per="step", late_steps=1))[:2] == [BASE, BASE]
    counted = every_step(Schedule(rate_per="step", warmup_epochs=2))[2 * STEPS]
    afresh = every_step(Schedule(rate_per="step", warmup_epochs=2, warmup_counts=False))[2 * STEPS]
    assert counted < afresh == BASE


@pytest.mark.parametrize("rate_per", ["epoch", "step"])
def test_every_step_runs_at_its_rate(rate_per, monkeypatch):
    """Of two groups, one at twice the rate; a later phase begins lower; the history tells the rate
    at which an epoch began."""
    seen, phases, decay = [], 3, 0.5
    options = dict(warmup_epochs=1, warmup_rate=0.001, warmup_counts=False)
    schedule = Schedule(rate_per=rate_per, **options)
    run = task(bias_rate=2.0, phases=phases, schedule=schedule, learning_rate_decay=decay)
    watched(monkeypatch, lambda step: seen.append([g["lr"] for g in step.optimizer.param_groups]))
    history = fit(run).history
    scales = [group.get("lr_scale", 1) for group in run.groups()]
    assert sorted(scales) == [1, 1, 2]
    at = [(k, e, s) for k in range(phases) for e in range(3) for s in range(3)]
    want = [schedule.rate(0.05 * decay**k, e, 3, s, 3) for k, e, s in at]
    assert seen == [[rate * scale for scale in scales] for rate in want]
    assert [row["learning_rate"] for row in history] == [float(f"{r:.6g}") for r in want[::3]]
    assert want[3] == 0.05 and want[12] == 0.025  # after the warm-up, before the cosine falls


# -- what decays -----------------------------------------------------------------------------------
def official_names(arch):
    """(our network, our parameters by their official names and numbers of axes)."""
    layout = ARCHITECTURES[arch]
    options = {"small_images": True} if arch.startswith("repan_resnet18") else {}
    with torch.device("meta"):
        model = layout.build(classes=10, **options)
        own, names = dict(model.named_parameters()), {}
        for theirs, entry in official.model_table(model, layout).items():
            for ours in entry.ours:
                if ours in own:
                    axes = own[ours].dim() + (len(entry.ours) > 1)  # several are stacked
                    names[ours] = (theirs, axes)
    assert names.keys() == own.keys()
    return model, names


def without(*words):
    return lambda name, axes: not any(word in name for word in words)


def matrices(name, axes):
    return axes > 1 and not name.endswith(".bias")


def repvgg_rule(name, axes):
    return "identity.weight" in name or matrices(name, axes)


# architecture -> the rule of ours, and what its code says of names and shapes
RULES = {
    "repan_repvgg_a0": ("weights", without("rep_conv", "fc", "bn")),
    "repan_imagenet_repvgg_a0": ("weights", without("rep_conv", "fc", "bn")),
    "repan_resnet18_dbb": (
        "weights_and_plain_norms",
        without("reparam", "rep_conv", "bn", "linear"),
    ),
    "repan_resnet18_acb": (
        "weights_and_plain_norms",
        without("reparam", "rep_conv", "bn", "linear"),
    ),
    "repan_resnet50_rep": (
        "weights_and_plain_norms",
        without("reparam", "rep_conv", "bn", "linear"),
    ),
    "repvgg_a0": ("matrices_and_identity", repvgg_rule),
    "repvgg_d2se": ("matrices_and_identity", repvgg_rule),
    "repopt_vgg_b1_hs": ("matrices_and_identity", repvgg_rule),
    "repmlpnet_t224": ("matrices_and_identity", repvgg_rule),
    "replknet_31b": ("matrices", matrices),
    "dyrep_vgg16": ("all", lambda name, axes: True),
    "dyrep_repvgg_a0": ("matrices", matrices),
    "dbb_resnet18": ("not_depthwise", without("depth")),
    "dbb_mobilenet": ("not_depthwise", without("depth")),
    "orepa_resnet18": ("not_norms", without("bias", "bn", "prior")),
    "orepa_resnet50": ("not_norms", without("bias", "bn", "prior")),
    "orepa_repvgg_a0": ("not_norms", without("bias", "bn", "prior")),
}


@pytest.mark.parametrize("arch", RULES)
def test_what_decays_is_what_the_released_code_decays(arch):
    """Its rule goes by official names, ours by modules; both on the same network. What its code
    calls a bias has twice the rate."""
    rule, decays = RULES[arch]
    model, names = official_names(arch)
    parameters = dict(model.named_parameters())
    groups = parameter_groups(model, 1e-4, rule, bias_rate=2.0)
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    found = {
        p: (g["weight_decay"] > 0, g.get("lr_scale", 1.0)) for g in groups for p in g["params"]
    }
    for ours, (theirs, axes) in names.items():
        want = decays(theirs, axes), 2.0 if "bias" in theirs else 1.0
        assert found[parameters[ours]] == want, (ours, theirs)


def test_the_stem_of_a_cifar_resnet_decays_and_no_other_norm():
    model, _names = official_names("repan_resnet18_dbb")
    names = {parameter: name for name, parameter in model.named_parameters()}
    (plain,) = [g["params"] for g in parameter_groups(model, 1.0, "weights") if g["weight_decay"]]
    (more,) = [
        g["params"]
        for g in parameter_groups(model, 1.0, "weights_and_plain_norms")
        if g["weight_decay"]
    ]
    assert {names[p] for p in more} - {names[p] for p in plain} == {
        "stage0.norm.weight",
        "stage0.norm.bias",
    }


@pytest.mark.parametrize("rule", DECAY)
@pytest.mark.parametrize("block", ["repvgg", "dbb", "orepa", "csla", "mobileone", "dyrep"])
def test_every_parameter_is_in_one_group(rule, block):
    model = nn.Sequential(BLOCKS[block](4, 4), nn.LayerNorm(3), nn.Flatten(), nn.Linear(4, 2))
    model.append(nn.Linear(4, 2))
    model[4].weight = model[3].weight  # two layers of one weight
    for bias_rate, most in ((1.0, 2), (2.0, 4)):
        groups = parameter_groups(model, 1e-4, rule, bias_rate)
        held = [parameter for group in groups for parameter in group["params"]]
        assert len(held) == len(set(held)) == len(list(model.parameters())) and len(groups) <= most
        assert set(held) == set(model.parameters())
        decaying = {p for g in groups if g["weight_decay"] for p in g["params"]}
        assert decaying == {p.parameter for p in places(model) if DECAY[rule](p)}


def test_one_channel_is_not_depthwise():
    """A first layer on grey images has as many groups as channels: one."""
    model = nn.Sequential(BLOCKS["dbb"](1, 4), nn.Conv2d(4, 4, 3, groups=4))
    decaying = parameter_groups(model, 1.0, "not_depthwise")[0]["params"]
    assert {id(p) for p in decaying} == {
        id(p) for p in (*model[0].parameters(), model[1].bias) if p is not model[1].bias
    }


def test_decay_and_rate_of_a_bias_act():
    """One step from gradients of 0: what decays shrinks by its own rate times its decay."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).double()
    nn.init.ones_(model[0].bias), nn.init.ones_(model[1].bias)
    optimizer = sgd(parameter_groups(model, 0.5, "all", 2.0), momentum=0.0, nesterov=False)
    before = [p.detach().clone() for p in model.parameters()]
    set_rate(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        rate = 0.2 if name.endswith("bias") else 0.1
        torch.testing.assert_close(parameter.detach(), old * (1 - rate * 0.5), rtol=0, atol=1e-15)


# -- the average -----------------------------------------------------------------------------------
def batches(count, generator_seed=1):
    generator = torch.Generator().manual_seed(generator_seed)
    for _ in range(count):
        x = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 3, (8,), generator=generator)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        BLOCKS["repvgg"](2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()


def reference_average(model, decay):
    """torch's own, from the first weights on, as timm's begins."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average.n_averaged.fill_(1)
    return average


def test_the_average_is_that_of_torch():
    model = net()
    ours, theirs = Average(model, 0.9), reference_average(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for i, (x, y) in enumerate(batches(5)):
        model[0].set_rate(1 - i / 10)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        ours.update(), theirs.update_parameters(model)
    got, want, now = ours.network().state_dict(), theirs.module.state_dict(), model.state_dict()
    moved = 0
    for name, value in got.items():
        single = name.endswith(("num_batches_tracked", "rate"))
        torch.testing.assert_close(value, now[name] if single else want[name], rtol=0, atol=1e-15)
        moved += not torch.equal(value, now[name])
    assert moved == len(got) - 3 and not ours.model.training  # lambda and two counters
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())


def test_the_average_is_evaluated_selected_and_kept(monkeypatch):
    """Against torch's average of the same run; at the start of a phase it is the network again."""
    run, kept, theirs = task(phases=2, ema=0.8, cycle={"warmup": 2}), {}, []

    def before(step):
        if len(theirs) == len(kept) / 3:  # the first step of a phase
            theirs.append(reference_average(run.model, 0.8))

    def keep(state):
        progress = state["progress"]
        if progress["batch"] == 0 and progress["epoch"]:
            average = {k: v.clone() for k, v in theirs[-1].module.state_dict().items()}
            kept[progress["phase"], progress["epoch"] - 1] = average

    watched(monkeypatch, before, lambda step: theirs[-1].update_parameters(run.model))
    done = fit(run, checkpoint=keep, checkpoint_seconds=-1)
    assert len(kept) == 6 and len(theirs) == 2
    best = done.history[done.best["index"]]
    want, weights = kept[best["phase"], best["epoch"]], done.best["weights"]
    for name, value in weights.items():
        if not name.endswith(("num_batches_tracked", "rate")):
            torch.testing.assert_close(value, want[name], rtol=0, atol=1e-7)
    assert any(not torch.equal(v, weights[k]) for k, v in run.model.state_dict().items())
    model = copy.deepcopy(run.model).eval()
    model.load_state_dict(weights)
    measured = accuracy(model, Split.test(run.data, "cpu"))
    assert measured == pytest.approx(best["test_accuracy"], abs=2 / 797)


# -- AdamW -----------------------------------------------------------------------------------------
class Replayed:
    """A recorder that records nothing: the function is called again, after the same warm-up."""

    def __call__(self, function):
        for _ in range(steps_module.WARM_UP):
            function()
        return function


@pytest.mark.parametrize("mode", ["none", "cudagraphs"])
@pytest.mark.parametrize("held", [False, True])
def test_adamw_is_that_of_torch(mode, held, monkeypatch):
    """One tensor after the other, with groups, rates, a branch held still, and after a restart;
    without a GPU the recording is a stand-in."""
    monkeypatch.setattr(steps_module, "Recorder", Replayed)
    monkeypatch.setattr(steps_module, "why_not", lambda device: "nothing")
    ours, theirs = net(), net()
    options = dict(weight_decay=0.1, decay="matrices", bias_rate=2.0)
    optimizer = adamw(parameter_groups(ours, **options), betas=(0.8, 0.95), epsilon=1e-6)

    def hold(model):
        for parameter in model[0].main_branch.parameters() if held else ():
            parameter.grad = None

    step = Step(
        ours, optimizer, lambda x, y: F.cross_entropy(ours(x), y), batch=8, compile=mode,
        after_backward=lambda: hold(ours), say=lambda line: None,
    )  # fmt: skip
    for _ in range(2):
        groups = parameter_groups(theirs, **options)
        plain = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, foreach=False)
        for i, (x, y) in enumerate(batches(4)):
            rate = 0.01 / (i + 1)
            set_rate(optimizer, rate)
            for group in plain.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            step(x, y)
            plain.zero_grad()
            F.cross_entropy(theirs(x), y).backward()
            hold(theirs)
            plain.step()
        step.restart()
    assert all(not v.any() for state in optimizer.state.values() for v in state.values())
    for (name, value), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["none", "default", "cudagraphs"])
def test_adamw_and_the_average_on_a_gpu(mode):
    """Rates of every step, moments and average against the processor; nothing waits for the GPU."""
    ours, theirs, said = net().cuda(), net(), []

    def made(model, compile):
        groups = parameter_groups(model, 0.1, "matrices", 2.0)
        optimizer = adamw(groups, betas=(0.9, 0.999), epsilon=1e-8)
        set_rate(optimizer, 0.01)
        objective = lambda x, y: F.cross_entropy(model(x), y)  # noqa: E731
        return Step(
            model, optimizer, objective, batch=8, accumulate=2, compile=compile, say=said.append
        )

    pairs = [(made(model, m), Average(model, 0.9)) for model, m in ((ours, mode), (theirs, "none"))]
    for i, (x, y) in enumerate(batches(6)):
        inputs = x.cuda(), y.cuda()
        torch.cuda.set_sync_debug_mode("error" if i else "default")  # at first it is built
        for (step, average), given in zip(pairs, (inputs, (x, y)), strict=True):
            set_rate(step.optimizer, 0.01 / (i + 1))
            step(*given)
            average.update()
        torch.cuda.set_sync_debug_mode("default")
    assert said == [] and pairs[0][0].mode == mode
    for one, two in ((ours, theirs), (pairs[0][1].network(), pairs[1][1].network())):
        for (name, value), other in zip(
            one.state_dict().items(), two.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(value.cpu(), other, rtol=1e-6, atol=1e-8, msg=name)


# -- batches ---------------------------------------------------------------------------------------
def test_the_last_batch_is_dropped(monkeypatch):
    """The order and the first batches are those of a run that keeps it."""

    def seen(**recipe):
        labels, run = [], task(epochs=2, **recipe)
        run.loss = lambda logits, y, inputs: (labels.append(y), F.cross_entropy(logits, y))[1]
        losses = []
        with monkeypatch.context() as patch:
            update = Step.__call__
            call = lambda *a, **k: (losses.append(update(*a, **k)), losses[-1])[1]  # noqa: E731
            patch.setattr(Step, "__call__", call)
            history = fit(run).history
        return labels, losses, history

    whole, _, _ = seen()
    labels, losses, history = seen(drop_last=True)
    assert [len(y) for y in whole] == [32, 32, 16] * 2 and [len(y) for y in labels] == [32] * 4
    assert all(torch.equal(labels[i], whole[j]) for i, j in ((0, 0), (1, 1), (2, 3), (3, 4)))
    mean = (losses[0] + losses[1]).item() / 2
    assert history[0]["train_loss"] == pytest.approx(mean, rel=1e-5)


def test_an_epoch_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"^batch_size \(=81\) with drop_last .* at most 80, "):
        fit(task(drop_last=True, batch_size=81))


@pytest.mark.parametrize("images", [8, 7, 3])
def test_a_batch_in_parts_has_the_gradient_of_its_mean_loss(images):
    """Against a loop over the parts; norms see a part, and count it."""
    ours, theirs = net(), net()
    optimizer = sgd(parameter_groups(ours, 0.1), momentum=0.9, nesterov=False)
    set_rate(optimizer, 0.1)
    sizes = []

    def objective(x, y):
        sizes.append(len(x))
        return F.cross_entropy(ours(x), y)

    step = Step(ours, optimizer, objective, batch=8, accumulate=2)
    plain = torch.optim.SGD(parameter_groups(theirs, 0.1), lr=0.1, momentum=0.9, foreach=False)
    for x, y in batches(3):
        x, y = x[:images], y[:images]
        loss = step(x, y)
        plain.zero_grad()
        logits = torch.cat([theirs(part) for part in x.split(4)])
        mean = F.cross_entropy(logits, y)
        mean.backward()
        plain.step()
        torch.testing.assert_close(loss, mean.detach(), rtol=0, atol=1e-12)
    assert sizes == {8: [4, 4], 7: [4, 3], 3: [3]}[images] * 3
    for (name, value), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=name)


def test_the_loop_trains_in_parts():
    sizes, run = [], task(accumulate=2, epochs=1)
    run.loss = lambda logits, y, inputs: (sizes.append(len(y)), F.cross_entropy(logits, y))[1]
    fit(run)
    assert sizes == [16] * 5


# -- phases ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("carry", [False, True])
def test_what_is_gathered_is_carried_or_forgotten(carry, optimizer, monkeypatch):
    """Before the first step of the second phase: as the first phase left it, or 0."""
    more = ADAMW if optimizer == "adamw" else {}
    run = task(phases=2, cycle={"warmup": 2}, carry_momentum=carry, **more)
    before, after = [], []

    def state(step):
        states = step.optimizer.state.values()
        return torch.cat([v.flatten().clone() for state in states for v in state.values()])

    watched(monkeypatch, lambda s: before.append(state(s)), lambda s: after.append(state(s)))
    fit(run)
    assert not before[0].any() and after[8].any() and len(after) == 18
    assert torch.equal(before[9], after[8] if carry else torch.zeros_like(after[8]))


EVERYTHING = dict(
    phases=2, epochs=2, ema=0.9, drop_last=True, accumulate=2, learning_rate_decay=0.5,
    schedule=Schedule(rate_per="step", warmup_epochs=1, warmup_steps=1, late_steps=1),
)  # fmt: skip


@pytest.mark.parametrize("more", [{"carry_momentum": True}, ADAMW], ids=["sgd", "adamw"])
def test_resuming_between_any_two_steps_changes_nothing(more):
    """Also in the warm-up, with the average and the moments on the way; through a file."""

    def run():
        return task(cycle={"warmup": 2, "freeze": "skip"}, bias_rate=2.0, **EVERYTHING | more)

    whole, resume, places = fit(run()), None, []
    for _ in range(60):
        kept = []
        try:
            done = fit(run(), resume=resume, checkpoint=kept.append, deadline=0.0)
            break
        except OutOfTime:
            (state,) = kept
            progress = state["progress"]
            places.append((progress["phase"], progress["epoch"], progress["batch"]))
            buffer = io.BytesIO()
            torch.save(state, buffer)
            resume = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    else:
        pytest.fail("it gets no further")
    assert {(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 0, 2), (1, 1, 1)} <= set(places)
    assert done.history == whole.history and done.restarts == whole.restarts
    weights = done.best["weights"]
    assert all(torch.equal(v, weights[k]) for k, v in whole.best["weights"].items())


def test_a_checkpoint_brings_no_settings_of_the_optimizer():
    """What it has gathered, yes; what the groups are, the recipe says: also for one that was
    written before groups had a rate of their own, or on a device where settings differ."""
    kept = []
    with pytest.raises(OutOfTime):
        fit(task(bias_rate=2.0), checkpoint=kept.append, deadline=0.0)
    for group in kept[0]["optimizer"]["param_groups"]:
        group.pop("lr_scale", None)
        group["momentum"] = 0.1
    resumed = fit(task(bias_rate=2.0), resume=kept[0])
    assert resumed.history == fit(task(bias_rate=2.0)).history


def test_adamw_with_an_average_learns():
    schedule = Schedule(rate_per="step", warmup_epochs=1)
    done = fit(task(epochs=12, ema=0.8, schedule=schedule, decay="matrices", **ADAMW))
    assert done.history[-1]["test_accuracy"] > 0.4 > done.history[0]["test_accuracy"]


def test_every_key_reaches_the_loop():
    """From a cell to the recipe, the groups and the schedule; each at a value of its own."""
    keys = dict(
        learning_rate=0.2, weight_decay=0.01, batch_size=20, phases=2, epochs=6, drop_last=True,
        accumulate=4, learning_rate_decay=0.5, optimizer="adamw", betas=[0.8, 0.9], epsilon=1e-6,
        carry_momentum=True, ema=0.7,
    )  # fmt: skip
    schedule = dict(
        rate_per="step", minimum_rate=0.01, warmup_epochs=1, warmup_steps=2, warmup_rate=0.02,
        warmup_counts=False, late_steps=3,
    )  # fmt: skip
    recipe = recipe_of(Cell.model_validate(CELL | keys | schedule))
    assert recipe.schedule == Schedule(**schedule)
    for name, value in keys.items():
        assert getattr(recipe, name) == (tuple(value) if name == "betas" else value)
    steps = dict(schedule="steps", milestones=[2, 3], milestone_factor=0.3)
    made = recipe_of(Cell.model_validate(CELL | steps)).schedule
    assert made == Schedule(**steps | {"milestones": (2, 3)})
    warm = dict(rate_per="step", warmup_epochs=2, warmup_per="epoch")
    assert recipe_of(Cell.model_validate(CELL | warm)).schedule == Schedule(**warm)


def test_a_cell_is_trained_by_its_keys(tmp_path, monkeypatch):
    """One run from its parameters to its evidence: groups, rates, images that count."""
    keys = dict(
        epochs=2, batch_size=16, drop_last=True, rate_per="step", warmup_steps=1, bias_rate=2.0,
        decay="matrices", weight_decay=0.1, optimizer="adamw", ema=0.5,
    )  # fmt: skip
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0], rows={"a": {"label": "a"}},
             cell={k: v for k, v in (CELL | keys).items() if k != "seed"})
    )  # fmt: skip
    made, store, seen = plan(table), Store(tmp_path), []
    watched(monkeypatch, lambda step: seen.append(step.optimizer.param_groups))
    rates = []
    watched(monkeypatch, lambda step: rates.append(step.optimizer.param_groups[0]["lr"]))
    (planned,) = made.cells.values()
    run_cell(planned, made.cells, store)
    assert [(g["weight_decay"], g.get("lr_scale")) for g in seen[0]] == [
        (0.1, None), (0.0, None), (0.0, 2.0),
    ]  # fmt: skip
    assert rates == [0.0] + [cosine(i, 4, 0.1) for i in (1, 2, 3)]  # of 40 images, 32 in an epoch
    result = store.read(planned.key)["result"]
    assert result["history"]["learning_rate"] == [0.0, float(f"{cosine(2, 4, 0.1):.6g}")]
    one_image, _teacher = training_flops(task(batch_size=16))
    assert result["compute"]["training_flops"] == one_image * 2 * 32
    assert result["parameters"]["ema"] == 0.5


# -- what is refused -------------------------------------------------------------------------------
CELL = dict(data="digits", train_images=60, held_out=20, seed=0, body="digits", epochs=6,
            batch_size=20, learning_rate=0.1)  # fmt: skip
WARM = dict(rate_per="step", warmup_epochs=2)
WRONG = {
    "schedule (='linear')": (dict(schedule="linear"), ["'cosine', 'steps' or 'poly'"]),
    "rate_per": (dict(rate_per="batch"), ["'epoch' or 'step'"]),
    "decay": (dict(decay="some"), ["'not_depthwise'"]),
    "optimizer": (dict(optimizer="adam"), ["'sgd' or 'adamw'"]),
    "steps without milestones": (
        dict(schedule="steps"),
        ["milestones (=[]) must name at least one epoch with schedule=steps"],
    ),
    "milestones of a cosine": (dict(milestones=[2]), ["milestones (=[2]) is for schedule=steps"]),
    "falling milestones": (
        dict(schedule="steps", milestones=[3, 2]),
        ["milestones (=[3, 2]) must be epochs above 0 in rising order"],
    ),
    "a milestone too late": (
        dict(schedule="steps", milestones=[2, 6]),
        ["milestones (=[2, 6]) must be below epochs (=6)"],
    ),
    "a least rate of steps": (
        dict(schedule="steps", milestones=[2], minimum_rate=0.01),
        ["minimum_rate (=0.01) is for schedule=cosine"],
    ),
    "a least rate above the base": (
        dict(minimum_rate=0.2),
        ["minimum_rate (=0.2) must be at most the learning rate of the last phase (=0.1)"],
    ),
    "a least rate above the last base": (
        dict(minimum_rate=0.03, phases=3, learning_rate_decay=0.5),
        ["minimum_rate (=0.03)", "last phase (=0.025)"],
    ),
    "a warm-up from above": (WARM | dict(warmup_rate=0.2), ["warmup_rate (=0.2) must be at most"]),
    "a warm-up without end": (
        dict(warmup_epochs=6),
        ["warmup_epochs (=6) must be below epochs (=6)"],
    ),
    "a start of no warm-up": (
        dict(warmup_rate=0.01),
        ["warmup_rate (=0.01) needs warmup_epochs or warmup_steps"],
    ),
    "steps of no warm-up": (
        dict(rate_per="step", warmup_per="epoch"),
        ["warmup_per (='epoch') needs warmup_epochs or warmup_steps"],
    ),
    "what counts of no warm-up": (
        dict(warmup_counts=False),
        ["warmup_counts (=false) needs warmup_epochs or warmup_steps"],
    ),
    "what counts of milestones": (
        WARM | dict(warmup_counts=False, schedule="steps", milestones=[3]),
        ["warmup_counts (=false) is for schedule=cosine"],
    ),
    "steps of warm-up per epoch": (
        dict(warmup_steps=5),
        ["warmup_steps (=5) needs rate_per=step"],
    ),
    "late per epoch": (dict(late_steps=1), ["late_steps (=1) needs rate_per=step"]),
    "a finer warm-up": (
        dict(warmup_epochs=2, warmup_per="step"),
        ["warmup_per (='step') needs rate_per=step"],
    ),
    "steps in a warm-up per epoch": (
        WARM | dict(warmup_steps=5, warmup_per="epoch"),
        ["warmup_steps (=5) and warmup_per (='epoch') exclude each other"],
    ),
    "momentum of AdamW": (
        dict(optimizer="adamw", momentum=0.9),
        ["momentum (=0.9) is for optimizer=sgd", "betas", "=0.0"],
    ),
    "nesterov of AdamW": (dict(optimizer="adamw", nesterov=True), ["nesterov (=True) is for"]),
    "betas of SGD": (dict(betas=[0.9, 0.95]), ["betas (=[0.9, 0.95]) is for optimizer=adamw"]),
    "epsilon of SGD": (dict(epsilon=1e-6), ["epsilon (=1e-06) is for optimizer=adamw"]),
    "a beta of 1": (
        dict(optimizer="adamw", betas=[0.9, 1.0]),
        ["betas (=[0.9, 1.0]) must both be at least 0 and below 1"],
    ),
    "an average of nothing new": (dict(ema=1.0), ["less than 1"]),
    "carrying in one phase": (
        dict(carry_momentum=True, momentum=0.9),
        ["carry_momentum (=true) needs phases above 1"],
    ),
    "carrying nothing": (
        dict(carry_momentum=True, phases=2),
        ["carry_momentum (=true) needs momentum above 0, or optimizer=adamw"],
    ),
    "a decay in one phase": (
        dict(learning_rate_decay=0.5),
        ["learning_rate_decay (=0.5) needs phases above 1"],
    ),
    "a growing rate": (dict(learning_rate_decay=1.5, phases=2), ["less than or equal to 1"]),
    "uneven parts": (dict(accumulate=3), ["accumulate (=3) must divide batch_size (=20)"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case):
    changes, said = WRONG[case]
    Cell.model_validate(CELL)
    with pytest.raises(ValidationError) as caught:
        Cell.model_validate(CELL | changes)
    (error,) = caught.value.errors()
    for text in said:
        assert text in error["msg"], error["msg"]


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(schedule="linear"), r"^schedule \(='linear'\) must be one of cosine, steps, poly\.$"),
        (dict(rate_per="batch"), r"^rate_per \(='batch'\) must be one of epoch, step\.$"),
        (dict(warmup_per="batch"), r"^warmup_per \(='batch'\) must be one of epoch, step\.$"),
        (dict(warmup_epochs=-1), r"^warmup_epochs \(=-1\) must be a whole number, at least 0\.$"),
        (dict(late_steps=1.5), r"^late_steps \(=1.5\) must be a whole number"),
        (dict(minimum_rate=-1.0), r"^minimum_rate \(=-1.0\) must be a finite number"),
        (dict(warmup_rate=math.nan), r"^warmup_rate \(=nan\) must be a finite number"),
    ],
)
def test_a_schedule_checks_itself(changes, said):
    with pytest.raises(UserError, match=said):
        Schedule(**changes)
