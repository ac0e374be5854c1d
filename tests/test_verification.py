"""The proof that a fused network is the network, and that it can fail."""

import copy

import pytest
import torch
from torch import nn
from whole import X, net, scrambled

from replib import convert, fuse, verify
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


def test_a_folded_norm_belongs_to_its_convolution():
    """Plain pairs are compared too, with the norm that was folded, and a wrong one is named."""
    model = net(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), BLOCKS["repvgg"](8, 8))
    fused = fuse(model)
    assert [check.name for check in verify(model, fused, X).blocks] == ["0", "2"]
    fused[0].bias.data[3] += 0.01
    proof = verify(model, fused, X)
    assert [check.name for check in proof.blocks if not check.ok] == ["0"]


def test_a_block_that_ends_in_a_slope_of_0_is_compared_by_its_input():
    """As residual branches of timm begin: exactly 0, and by rounding nearly so as a block."""
    plain = net(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    nn.init.zeros_(plain[1].weight)
    nn.init.zeros_(plain[1].bias)
    blocks = convert(plain, "dbb").eval()
    assert verify(plain, blocks, X).ok
    fused = fuse(blocks)
    assert verify(plain, fused, X).ok
    fused[0].bias.data[3] += 1e-3
    proof = verify(plain, fused, X)
    assert [check.name for check in proof.blocks if not check.ok] == ["0"]


def test_a_block_behind_a_kept_norm_is_compared_with_it():
    model = net(BLOCKS["dbb"](3, 8), nn.BatchNorm2d(8), nn.ReLU())
    fused = fuse(model)
    assert isinstance(fused[1], nn.Identity) and verify(model, fused, X).ok
    unfolded = nn.Sequential(model[0].deploy(), nn.Identity(), nn.ReLU()).eval()
    assert not verify(model, unfolded, X).ok, "the norm is gone and folded nowhere"


class Idle(nn.Module):
    """It has a block that its forward never calls."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = BLOCKS["repvgg"](3, 8), BLOCKS["repvgg"](3, 8)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_block_that_is_never_reached_is_compared_alone(keep_norm):
    """Such as a head that is used in training only."""
    model = Idle()
    if keep_norm:
        model.idle = nn.Sequential(model.idle, nn.BatchNorm2d(8), nn.ReLU())
    model = scrambled(model)
    fused = fuse(model)
    proof = verify(model, fused, X)
    assert proof.ok and "compared alone: idle" in str(proof) and len(proof.blocks) == 2
    next(m for m in fused.idle.modules() if isinstance(m, nn.Conv2d)).bias.data[0] += 0.01
    proof = verify(model, fused, X)
    assert proof.network.ok and not proof.ok


def test_a_block_that_cannot_be_compared_is_no_proof():
    model = Idle().eval()
    fused = fuse(model)
    fused.idle = nn.Sequential(fused.idle).eval()
    proof = verify(model, fused, X)
    assert not proof.ok and proof.network.ok and "never reached: idle" in str(proof)


def test_of_several_calls_the_worst_counts():
    """A shared block whose error shows in its second call only."""
    block = BLOCKS["repvgg"](3, 3)
    model = net(block, nn.ReLU(), block)
    fused = fuse(model)
    first = fused[0].weight.data.clone()
    calls = []

    def swap(module, inputs):
        calls.append(1)
        module.weight.data.copy_(first if len(calls) % 2 else first * 1.01)

    fused[0].register_forward_pre_hook(swap)
    (check,) = verify(model, fused, X).blocks
    assert not check.ok


class Outputs(nn.Module):
    def __init__(self, change=lambda outputs: outputs):
        super().__init__()
        self.block, self.change = BLOCKS["repvgg"](3, 4), change

    def forward(self, x):
        y = self.block(x)
        return self.change({"a": y, "b": [y.mean(), y.argmax()]})


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda out: out, True),
        (lambda out: out | {"b": [out["b"][0] * 1.01, out["b"][1]]}, False),
        (lambda out: {"a": out["a"]}, False),
        (lambda out: out | {"a": out["a"][..., :-1]}, False),
        (lambda out: {}, False),
    ],
)
def test_structured_outputs(change, same):
    model = Outputs().eval()
    fused = fuse(model)
    fused.change = change
    assert verify(model, fused, X).ok is same


def found(boxes, scores, labels):
    return {"boxes": boxes, "scores": scores, "labels": labels}


class Detections(nn.Module):
    """Boxes at the corners of a grid, scored by a block: ranking them is not continuous."""

    def __init__(self, change=lambda image: image):
        super().__init__()
        self.block, self.change = BLOCKS["repvgg"](3, 1), change

    def forward(self, images):
        out = []
        for image in images:
            scores, order = self.block(image[None]).flatten().sigmoid().sort(descending=True)
            corner = torch.stack([order % 7, order // 7], 1).to(scores)
            boxes = torch.cat([corner * 8, corner * 8 + 12], 1)
            out.append(self.change(found(boxes[:40], scores[:40], order[:40] % 3)))
        return out


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda image: image, True),
        (lambda image: {k: v.flip(0) for k, v in image.items()}, True),  # in another order
        (lambda image: image | {"boxes": image["boxes"] + 1}, False),
        (lambda image: image | {"scores": image["scores"] * 1.1}, False),
        (lambda image: image | {"labels": image["labels"] + 1}, False),
        (lambda image: {k: v[:20] for k, v in image.items()}, False),
        (lambda image: {k: torch.cat([v, v]) for k, v in image.items()}, False),
    ],
)
def test_detections_are_matched_by_what_they_say(change, same):
    model = Detections().eval()
    fused = fuse(model)
    fused.change = change
    images = [torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    proof = verify(model, fused, (images,))
    assert proof.network.ok is same and "80 detections" in str(proof)
    assert not verify(model, lambda_net(lambda images: fused(images)[:1]), (images,)).network.ok


def lambda_net(function):
    """A module that is a function."""

    class Net(nn.Module):
        def forward(self, *arguments):
            return function(*arguments)

    return Net().eval()


def test_nothing_detected_is_no_proof():
    model = Detections(lambda image: {k: v[:0] for k, v in image.items()}).eval()
    proof = verify(model, fuse(model), ([X[0, :, :7, :9]],))
    assert not proof.ok and "verify in float64" in str(proof)


def test_a_network_that_loses_much_itself_is_allowed_as_much():
    """Differences of nearly equal maps: float32 is poor in both forms, and that is said."""

    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = BLOCKS["repvgg"](3, 3)

        def forward(self, x):
            y = self.block(x)
            return (y + 1e4) - 1e4

    model = Cancelling().eval()
    fused = fuse(model)
    proof = verify(model, fused, X)
    assert proof.ok and "the network itself is" in str(proof) and proof.network.allowed < 0.01
    first = next(module for module in fused.modules() if isinstance(module, nn.Conv2d))
    first.bias.data += 0.1
    assert not verify(model, fused, X).network.ok


def test_border_and_interior_follow_the_geometry():
    """With a stride the last output may see no padding."""
    block = BLOCKS["repvgg"](3, 4, kernel_size=3, stride=2, padding=1).eval()
    x = torch.randn(1, 3, 8, 9)  # rows: 4 outputs, the last sees none; columns: 5, it sees some
    fused = fuse(block)
    wrong = copy.deepcopy(fused)

    def shift(at):
        def hook(module, inputs, output):
            output[at] += 1
            return output

        handle = wrong.register_forward_hook(hook)
        (check,) = verify(block, wrong, x).blocks
        handle.remove()
        return check.border > check.allowed, check.interior > check.allowed

    assert shift((0, 0, 0, 2)) == (True, False) and shift((0, 0, 2, 4)) == (True, False)
    assert shift((0, 0, 3, 2)) == (False, True) and shift((0, 0, 1, 1)) == (False, True)


# -- what networks do ------------------------------------------------------------------------------
class Body(nn.Module):
    """A block and a linear head, with something done to the input and to the output."""

    def __init__(self, before=lambda x: x, after=lambda y: y, call=lambda block, x: block(x)):
        super().__init__()
        self.block, self.head = BLOCKS["repvgg"](3, 8), nn.Linear(8, 5)
        self.before, self.after, self.call = before, after, call

    def forward(self, x):
        y = self.call(self.block, self.before(x))
        return self.after(self.head(y.mean((2, 3))))


def overwrite(x):
    x -= 0.5
    return x


HABITS = {
    "a cast of its own": {"before": lambda x: x.float() / 2},
    "an input that is overwritten": {"before": overwrite},
    "a keyword": {"call": lambda block, x: block(input=x)},
    "masked logits": {"after": lambda y: y.masked_fill(torch.arange(5) == 2, -torch.inf)},
    "labels": {"after": lambda y: {"y": y, "label": y.argmax(1)}},
    "complex numbers": {"after": torch.fft.fft},
}


@pytest.mark.parametrize("habit", HABITS)
def test_what_networks_do_is_understood_and_a_wrong_head_is_still_seen(habit):
    torch.manual_seed(0)
    model = scrambled(Body(**HABITS[habit]))
    fused, x = fuse(model), X.clone()
    proof = verify(model, fused, x)
    assert proof.ok and torch.equal(x, X), str(proof)
    fused.head.weight.data *= 1.3
    assert not verify(model, fused, x).ok


def test_labels_and_structure_are_compared():
    torch.manual_seed(0)
    model = scrambled(Body(after=lambda y: {"a": y, "label": y.argmax(1)}))
    fused = fuse(model)
    for after in (
        lambda y: {"a": y, "label": y.argmin(1)},
        lambda y: {"label": y.argmax(1), "a": y, "more": y},
        lambda y: [y, y.argmax(1)],
    ):
        fused.after = after
        assert not verify(model, fused, X).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_excuse(dtype):
    torch.manual_seed(0)
    model = scrambled(Body()).to(dtype)
    x = X.to(dtype)
    assert verify(model, fuse(model), x).ok
    for name, factor in (("head", 0.0), ("head", 0.7), ("block", 0.85)):
        wrong = fuse(model)
        for parameter in getattr(wrong, name).parameters():
            parameter.data *= factor
        assert not verify(model, wrong, x).ok


def test_a_network_that_is_random_proves_nothing():
    model = Body(after=lambda y: nn.functional.dropout(y, 0.5, training=True)).eval()
    proof = verify(model, fuse(model), X)
    assert not proof.ok and "the network itself is" in str(proof)


def test_a_transposed_convolution_with_an_output_size():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.bn = nn.ConvTranspose2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(self.up(x, output_size=[66, 80]))

    model = scrambled(Up())
    proof = verify(model, fuse(model), X)
    assert proof.ok and len(proof.blocks) == 1, str(proof)


def test_keyword_arguments():
    class Two(Body):
        def forward(self, x, *, y):
            return super().forward(x) + y

    model = scrambled(Two())
    assert verify(model, fuse(model), {"x": X, "y": torch.ones(5)}).ok
