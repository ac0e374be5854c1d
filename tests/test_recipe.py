"""RepAn's own training, written again as a plain loop over plain layers, beside ours.

The loop below knows nothing of this library: the network is written from the released keys
(spec: keys, forward, merge, expansion, inversion), torch.optim.SGD and CosineAnnealingLR run it.
It is given the batches that our loop was given and the side branches that ours drew; all else,
the rates, groups, clipping, lambda, frozen branches, the restore, what is selected, is its own.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_blocks import scrambled
from torch import nn

from replib import official
from replib.experiments.cells import method_of, recipe_of, split_of
from replib.experiments.params import Cell
from replib.methods.cycle import decay_groups
from replib.methods.distill import distillation_loss
from replib.models import build
from replib.training.data import load
from replib.training.loop import Task, fit

EPOCHS, WARMUP, PHASES, ALPHA, HOT = 4, 2, 2, 0.9, 10.0
RATE = 0.1  # at the published 0.75 rounding grows to 1e-4 in 16 steps of so small batches
CELL = dict(
    data="digits", train_images=40, seed=0, body="cifar_repvgg_a0", block="repvgg",
    protocol="paper", phases=PHASES, epochs=EPOCHS, batch_size=20, learning_rate=RATE,
    weight_decay=2e-4, decay="weights", clip_norm=10.0, clip="decayed",
    cycle={"warmup": WARMUP, "freeze": "skip", "reseed": True},
    distill={"alpha": ALPHA, "temperature": HOT}, teacher="none",
)  # fmt: skip


class Layer(nn.Module):
    """A block of RepAn's CIFAR RepVGG, by its keys; BN eps 1e-5, the rate a plain number."""

    def __init__(self, inputs, outputs, stride, identity):
        super().__init__()
        self.conv_3 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn_3 = nn.BatchNorm2d(outputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.bn_1 = nn.BatchNorm2d(outputs)
        if identity:
            self.bn_0 = nn.BatchNorm2d(outputs)
        self.rep_conv = nn.Conv2d(inputs, outputs, 3, stride, 1).requires_grad_(False)
        self.rate = 1.0

    def forward(self, x):
        side = self.bn_1(self.conv_1(x))
        if hasattr(self, "bn_0"):
            side = side + self.bn_0(x)
        return torch.relu(self.bn_3(self.conv_3(x)) + self.rate * side)

    def cycle(self, side):
        """Merge at rate 1, take the drawn side branches, write the kernel into the main one."""
        with torch.no_grad():
            out = len(self.conv_3.weight)
            kernel, bias = torch.zeros_like(self.conv_3.weight), torch.zeros(out).double()
            for name in ("bn_3", "bn_1", "bn_0"):
                if not hasattr(self, name):
                    continue
                norm = getattr(self, name)
                factor = norm.weight / (norm.running_var + norm.eps).sqrt()
                for o in range(out):
                    if name == "bn_3":
                        kernel[o] += factor[o] * self.conv_3.weight[o]
                    elif name == "bn_1":
                        kernel[o, :, 1, 1] += factor[o] * self.conv_1.weight[o, :, 0, 0]
                    else:
                        kernel[o, o, 1, 1] += factor[o]
                bias += norm.bias - factor * norm.running_mean
            for name in ("bn_1", "bn_0"):
                if hasattr(self, name):
                    getattr(self, name).weight.fill_(1)
                    getattr(self, name).bias.fill_(0)
            self.conv_1.weight.copy_(side)
            assert side.abs().max() <= 0.1 / out**0.5
            deviation = (self.bn_3.running_var + self.bn_3.eps).sqrt()
            self.conv_3.weight.copy_(kernel * (deviation / self.bn_3.weight).view(-1, 1, 1, 1))
            self.bn_3.bias.copy_(bias + self.bn_3.running_mean * self.bn_3.weight / deviation)


class Sequence(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.sequential = nn.Sequential(*layers)

    def forward(self, x):
        return self.sequential(x)


class Network(nn.Module):
    """RepVGG-A0 for CIFAR; the first block of every stage has no identity."""

    def __init__(self):
        super().__init__()
        inputs, stages = 3, []
        plan = zip((1, 2, 4, 14, 1), (12, 12, 24, 48, 160), (1, 1, 2, 2, 1), strict=True)
        for depth, width, stride in plan:
            layers = []
            for i in range(depth):
                layers.append(Layer(inputs, width, stride if i == 0 else 1, i > 0))
                inputs = width
            stages.append(Sequence(layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x):
        return self.fc(self.stages(x).mean((2, 3)))

    def layers(self):
        return [m for m in self.modules() if isinstance(m, Layer)]


def teacher(inputs):
    """Any fixed function of the images."""
    return 3 * inputs.flatten(1)[:, :10]


def ours(cell, data):
    """(what our loop did: batches, losses, drawn side branches, history, the start's state)."""
    splits = split_of(cell)
    torch.manual_seed(1)
    model = scrambled(build(cell.body, "repvgg", classes=10, in_channels=3)).double()
    start = copy.deepcopy(official.export(model, "repan_repvgg_a0")["model_state"])
    steps, drawn = [], []

    def loss(logits, labels, inputs):
        value = distillation_loss(
            logits, teacher(inputs), labels, alpha=cell.distill.alpha,
            temperature=cell.distill.temperature,
        )  # fmt: skip
        steps.append((inputs.detach().clone(), labels.clone(), value.item()))
        return value

    method = method_of(cell, model)
    begin = method.start_cycle

    def watched(*args):
        begin(*args)
        state = official.export(model, "repan_repvgg_a0")["model_state"]
        drawn.append([v.clone() for k, v in state.items() if k.endswith("conv_1.weight")])

    method.start_cycle = watched
    groups = lambda: decay_groups(model, cell.weight_decay, cell.decay)  # noqa: E731
    task = Task(
        model, data, splits.train, splits.validation, recipe_of(cell), groups, loss, 0, method
    )
    progress = fit(task)
    return steps, drawn, progress, start


def repan(start, steps, drawn, data):
    """The released recipe's semantics on the same batches: losses, and test accuracies."""
    model = Network().double()
    model.load_state_dict(start)
    x, y = data.normalised(data.test_images).double(), data.test_labels
    steps, losses, accuracies = iter(steps), [], []
    best = None
    for cycle in range(PHASES):
        if cycle:
            model.load_state_dict(best[1])
        for layer, side in zip(model.layers(), drawn[cycle], strict=True):
            layer.cycle(side)
            layer.rate = 1.0
        free = [
            any(word in name for word in ("rep_conv", "fc", "bn"))
            for name, _ in model.named_parameters()
        ]
        pairs = list(zip(model.parameters(), free, strict=True))
        kernels = [p for p, f in pairs if not f]
        optimizer = torch.optim.SGD(
            [
                {"params": [p for p, f in pairs if f], "weight_decay": 0.0},
                {"params": kernels, "weight_decay": 2e-4},
            ],
            lr=RATE,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, eta_min=0)
        best = None
        for epoch in range(EPOCHS):
            if epoch:
                for layer in model.layers():
                    layer.rate = min((epoch + 1) / WARMUP, 1.0)
            model.train()
            for _ in range(2):
                inputs, labels, _ = next(steps)
                optimizer.zero_grad()
                logits = model(inputs)
                soft = F.kl_div(
                    F.log_softmax(logits / HOT, 1),
                    F.softmax(teacher(inputs) / HOT, 1),
                    reduction="batchmean",
                )
                loss = ALPHA * HOT**2 * soft + (1 - ALPHA) * F.cross_entropy(logits, labels)
                losses.append(loss.item())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(kernels, 10.0)
                if epoch < WARMUP:
                    for layer in model.layers():
                        layer.conv_3.zero_grad()
                        layer.bn_3.zero_grad()
                optimizer.step()
            schedule.step()
            model.eval()
            with torch.no_grad():
                right = (model(x).argmax(1) == y).double().mean().item()
            accuracies.append(right)
            if best is None or right > best[0]:
                best = right, copy.deepcopy(model.state_dict())
    return losses, accuracies


def test_our_loop_is_repans_recipe(one_thread):
    cell = Cell.model_validate(CELL)
    digits = load("digits")
    data = dataclasses.replace(
        digits,
        train_images=digits.train_images.repeat(1, 3, 1, 1),
        test_images=digits.test_images[:60].repeat(1, 3, 1, 1),
        test_labels=digits.test_labels[:60],
        mean=digits.mean * 3,
        deviation=digits.deviation * 3,
    )
    steps, drawn, progress, start = ours(cell, data)
    assert len(steps) == PHASES * EPOCHS * 2 and len(drawn) == PHASES
    losses, accuracies = repan(start, steps, drawn, data)
    assert [s[2] for s in steps] == pytest.approx(losses, rel=1e-7)
    assert [e["test_accuracy"] for e in progress.history] == pytest.approx(accuracies)
    best = max(range(EPOCHS), key=lambda e: (accuracies[e], -e))
    assert best != EPOCHS - 1, "the case shall tell the best epoch from the last one"
    assert len(set(losses)) == len(losses)
