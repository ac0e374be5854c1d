"""The training step: compiled or recorded, it is the eager step, and building it leaves no trace.

Two back ends compile: torch's "aot_eager", which traces forward and backward and then runs torch's
own kernels (seconds), and "inductor", which generates code (the slow tests: a minute each).
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replib.blocks import BLOCKS
from replib.errors import UserError
from replib.fusing import deployed_copy
from replib.methods.cycle import Cycle, decay_groups
from replib.methods.distill import distillation_loss
from replib.networks import outermost_blocks
from replib.training import step as steps
from replib.training.step import Step, chosen, set_rate, sgd

EXACT = dict(rtol=0, atol=1e-12)  # float64, after 5 steps of values of order 1
BATCH = 8
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Net(nn.Module):
    """Two blocks, dropout and a classifier."""

    def __init__(self, block="repvgg"):
        super().__init__()
        torch.manual_seed(0)
        self.one = BLOCKS[block](2, 4, 3, stride=2)
        self.two = BLOCKS[block](4, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.two(self.one(x).relu()).relu()
        return self.fc(F.dropout(x.mean((2, 3)), 0.2, self.training))


def batches(count, last=BATCH, seed=1):
    """Inputs and labels; the last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        n = BATCH if i < count - 1 else last
        x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 3, (n,), generator=generator)


class Trained:
    """A network with its step, as the loop makes it: clipped, frozen by a cycle, distilled."""

    def __init__(self, compile, **options):
        self.model = Net().double()
        scramble(self.model)
        self.teacher = deployed_copy(Net().double().eval())
        self.cycle = Cycle(self.model, warmup=2, freeze="skip", rate_schedule="ramp")
        self.optimizer = sgd(decay_groups(self.model, 1e-2), momentum=0.9, nesterov=True)
        set_rate(self.optimizer, 0.1)
        self.said, self.losses = [], []
        self.step = Step(
            self.model,
            self.optimizer,
            self.objective,
            batch=BATCH,
            clipped=self.optimizer.param_groups[0]["params"],
            clip_norm=0.5,
            after_backward=self.cycle.after_backward,
            variant=lambda: self.cycle.holds,
            compile=compile,
            say=self.said.append,
            **options,
        )

    def objective(self, x, labels):
        with torch.no_grad():
            taught = self.teacher(x)
        return distillation_loss(self.model(x), taught, labels, alpha=0.5, temperature=2.0)

    def epochs(self, count=5, last=BATCH):
        """One batch or two to an epoch: the branch is held for two of them; lambda changes."""
        self.cycle.start_cycle()
        for epoch, (x, labels) in enumerate(batches(count, last)):
            self.cycle.epoch(epoch)
            torch.manual_seed(epoch)
            self.losses.append(self.step(x, labels))
        return self

    def state(self):
        """Everything that a step leaves behind."""
        values = dict(self.model.state_dict())
        for i, parameter in enumerate(self.model.parameters()):
            values[f"gradient {i}"] = parameter.grad
            values[f"momentum {i}"] = self.optimizer.state[parameter]["momentum_buffer"]
        return values | {f"loss {i}": loss for i, loss in enumerate(self.losses)}


def scramble(model):
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5, generator=generator)


def same(one, two):
    """Equal states, up to the rounding of float64; the same gradients are absent."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        if value is None or two[name] is None:
            assert value is two[name], name
        else:
            torch.testing.assert_close(value, two[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def backend(request, monkeypatch):
    """torch.compile with another back end; dropout by the same random numbers."""
    torch.compiler.reset()
    compiled = functools.partial(torch.compile, backend=request.param)
    monkeypatch.setattr(torch, "compile", compiled)
    with torch._inductor.config.patch(fallback_random=True):
        yield request.param


class Replayed:
    """A recorder that records nothing: the function is called again, after the same warm-up."""

    made = 0

    def __call__(self, function):
        type(self).made += 1
        for _ in range(steps.WARM_UP):
            function()
        return function


# -- the same step ---------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_compiled_step_is_the_eager_step(backend):
    """Losses, gradients, running statistics, momentum and parameters; the last batch is smaller."""
    compiled = Trained("default").epochs(last=3)
    assert compiled.said == [] and compiled.step.forward is not compiled.step.eager
    same(compiled.state(), Trained("none").epochs(last=3).state())


@pytest.mark.parametrize("mode", ["cudagraphs", "recorded"])
def test_the_recorded_step_is_the_eager_step(mode, monkeypatch):
    """Without a GPU the recording is a stand-in: fixed inputs, warm-up and variants are ours."""
    monkeypatch.setattr(steps, "Recorder", Replayed)
    monkeypatch.setattr(steps, "why_not", lambda device: "nothing to compile with")
    Replayed.made = 0
    recorded = Trained(mode).epochs(last=3)
    said = ["not compiled: nothing to compile with here."] if mode == "cudagraphs" else []
    assert Replayed.made == 2 and recorded.said == said
    same(recorded.state(), Trained("none").epochs(last=3).state())


def test_what_is_returned_outlives_the_next_step(monkeypatch):
    """A recording fills one tensor again and again; the step hands out copies."""
    fixed = torch.zeros((), dtype=torch.float64)
    monkeypatch.setattr(Replayed, "__call__", lambda self, f: lambda: fixed.copy_(f()))
    monkeypatch.setattr(steps, "Recorder", Replayed)
    monkeypatch.setattr(steps, "why_not", lambda device: "nothing")
    losses = Trained("cudagraphs").epochs(4).losses
    assert len({loss.item() for loss in losses}) == 4


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_a_momentum_of_zero_is_a_fresh_one(momentum, nesterov):
    """Against torch's own SGD, one tensor after the other; also after a restart."""
    ours, theirs = Net().double(), Net().double()
    optimizer = sgd(decay_groups(ours, 1e-2), momentum=momentum, nesterov=nesterov)
    set_rate(optimizer, 0.1)
    step = Step(ours, optimizer, lambda x, y: F.cross_entropy(ours(x), y), batch=BATCH)
    for _ in range(2):
        plain = torch.optim.SGD(
            decay_groups(theirs, 1e-2), lr=0.1, momentum=momentum, nesterov=nesterov, foreach=False
        )
        for i, (x, y) in enumerate(batches(3)):
            torch.manual_seed(i)
            step(x, y)
            torch.manual_seed(i)
            plain.zero_grad()
            F.cross_entropy(theirs(x), y).backward()
            plain.step()
        step.restart()
    same(ours.state_dict(), theirs.state_dict())


# -- no trace --------------------------------------------------------------------------------------
@pytest.mark.parametrize("fails", [False, True])
def test_building_a_step_changes_nothing(fails, monkeypatch):
    """Neither the model nor the optimizer nor the random numbers; also where it fails half-way."""
    monkeypatch.setattr(steps, "Recorder", Replayed)
    trained = Trained("cudagraphs")
    before, random = copy.deepcopy(trained.state()), torch.get_rng_state()
    if fails:
        trained.optimizer.register_step_post_hook(lambda *_: 1 / 0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    x, y = next(batches(1))
    trained.step.compile(x, y)
    trained.step.recorded(x, y)
    assert len(trained.said) == (2 if fails else 0)
    assert torch.equal(torch.get_rng_state(), random)
    after = trained.state()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if v is not None)
    assert all(after[k] is None for k, v in before.items() if v is None)


@pytest.mark.parametrize("where", ["torch.compile", "forward", "no compiler"])
def test_a_failure_is_one_line_and_the_step_is_eager(where, monkeypatch):
    def broken(function, **options):
        if where == "torch.compile":
            raise RuntimeError("nobody\ncompiles this")
        return lambda *inputs: 1 / 0

    monkeypatch.setattr(torch, "compile", broken)
    if where == "no compiler":
        monkeypatch.setattr(steps.shutil, "which", lambda name: None)
    trained = Trained("default").epochs()
    (line,) = trained.said
    assert line.startswith("not compiled: ") and line.isprintable()
    assert trained.step.mode == "none"
    same(trained.state(), Trained("none").epochs().state())


# -- phases ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_a_cycle_recompiles_nothing_and_other_modules_do_not_fit(backend):
    counted = torch._dynamo.utils.counters["stats"]
    trained = Trained("default").epochs(3)
    graphs = counted["unique_graphs"]
    assert trained.step.fits
    trained.epochs(3)  # merge, redraw, restore: values alone
    trained.step.restart()
    assert trained.step.fits and counted["unique_graphs"] == graphs
    again = Trained("default").epochs(3)  # another network of the same structure
    assert counted["unique_graphs"] == graphs and again.said == []
    trained.model.two = trained.model.two.eval().deploy()
    assert not trained.step.fits


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.one, "post_norm", nn.BatchNorm2d(4)),
        lambda m: m.one.branches.pop(next(iter(m.one.side_branches))),
        lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight.detach().clone())),
        lambda m: m.one.register_buffer("rate", m.one.rate.clone()),
        lambda m: setattr(m, "fc", nn.Sequential(m.fc)),
    ],
    ids=["a module", "a branch less", "another parameter", "another buffer", "a wrapper"],
)
def test_a_changed_structure_does_not_fit(change):
    trained = Trained("none")
    assert trained.step.fits
    change(trained.model)
    assert not trained.step.fits


def test_rates_and_restores_keep_the_tensors():
    trained = Trained("none")
    for block in outermost_blocks(trained.model).values():
        block.set_rate(0.3)
    trained.cycle.start_cycle()
    trained.model.load_state_dict(copy.deepcopy(trained.model.state_dict()))
    assert trained.step.fits


# -- what is chosen --------------------------------------------------------------------------------
def test_auto_looks_at_the_length_of_the_run_and_at_the_compiler(monkeypatch):
    monkeypatch.setattr(steps, "why_not", lambda device: None)
    long, short = {"flops": 1e15, "steps": 10**5}, {"flops": 1e13, "steps": 100}
    assert chosen("auto", "cpu", **long) == "default" and chosen("auto", "cpu", **short) == "none"
    assert chosen("auto", "cuda", **long) == "cudagraphs"
    assert chosen("auto", "cuda:1", **short) == "none"
    assert chosen("auto", "cuda", changes=True, **long) == "recorded"
    assert chosen("auto", "cpu", changes=True, **long) == "none"
    for mode in ("none", "default"):
        assert chosen(mode, "cpu", **short) == mode == chosen(mode, "cuda", **long)
    monkeypatch.setattr(steps, "why_not", lambda device: "there is no compiler")
    assert chosen("auto", "cpu", **long) == "none"
    for mode, device in (("cudagraphs", "cpu"), ("recorded", "cpu"), ("fast", "cuda")):
        with pytest.raises(UserError, match=rf"^compile \(='?{mode}'?\) .*none"):
            chosen(mode, device, **long)


def test_bfloat16_is_of_the_forward_pass_only():
    """Activations are bfloat16; parameters, gradients, norms' statistics and the loss are not."""
    model = Net()
    seen = []
    model.fc.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    optimizer = sgd(decay_groups(model, 0.0), momentum=0.9, nesterov=False)
    set_rate(optimizer, 0.1)
    step = Step(
        model,
        optimizer,
        lambda x, y: F.cross_entropy(model(x).float(), y),
        batch=BATCH,
        precision="bfloat16",
    )
    x, y = next(batches(1))
    loss = step(x.float(), y)
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    kinds = {value.dtype for value in model.state_dict().values()}
    assert kinds == {torch.float32, torch.int64}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# -- on a GPU --------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["none", "default", "cudagraphs", "recorded"])
def test_on_a_gpu_nothing_waits_and_numbers_agree(mode):
    """Recorded, compiled and eager against the processor, in float64; no step waits for the GPU."""

    class OnGPU(Trained):
        def __init__(self, compile):
            super().__init__("none")
            self.model.cuda(), self.teacher.cuda()
            self.optimizer = sgd(decay_groups(self.model, 1e-2), momentum=0.9, nesterov=True)
            set_rate(self.optimizer, 0.1)
            self.step = Step(
                self.model, self.optimizer, self.objective, batch=BATCH,
                clipped=self.optimizer.param_groups[0]["params"], clip_norm=0.5,
                after_backward=self.cycle.after_backward, variant=lambda: self.cycle.holds,
                compile=compile, say=self.said.append,
            )  # fmt: skip

    ours, theirs = OnGPU(mode), Trained("none")
    for trained in (ours, theirs):
        trained.model.forward = functools.partial(no_dropout, trained.model)
        trained.cycle.start_cycle()
    for epoch, (x, labels) in enumerate(batches(6, last=3)):
        inputs = x.cuda(), labels.cuda()
        for trained in (ours, theirs):
            trained.cycle.epoch(epoch)
        set_rate(ours.optimizer, 0.1 / (epoch + 1)), set_rate(theirs.optimizer, 0.1 / (epoch + 1))
        built = epoch not in (0, 2)  # there a step is compiled, or recorded for another variant
        torch.cuda.set_sync_debug_mode("error" if built else "default")
        loss = ours.step(*inputs)
        torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(loss.cpu(), theirs.step(x, labels), rtol=1e-5, atol=1e-6)
    assert ours.said == [] and ours.step.mode == mode
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(
            value.cpu(), theirs.model.state_dict()[name], rtol=1e-5, atol=1e-6
        )


def no_dropout(model, x):
    """The forward pass of `Net` without what the two devices draw differently."""
    return model.fc(model.two(model.one(x).relu()).relu().mean((2, 3)))
