"""Networks in 8 bits: against plain loops, against integers of ONNX Runtime, in training."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_blocks import scrambled
from torch import nn

from replib import fuse
from replib.blocks import BLOCKS
from replib.errors import UserError
from replib.models import build
from replib.networks import outermost_blocks
from replib.quantization import converted, layer_ranges, quantize, trainable

torch.set_num_threads(1)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_layer() -> nn.Module:
    """A convolution, its channels of very different size."""
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, groups=1)
    conv.weight.data = drawn(3, 2, 3, 3) * torch.tensor([0.01, 1.0, 30.0]).view(3, 1, 1, 1)
    conv.bias.data = drawn(3, seed=1)
    return nn.Sequential(conv, nn.ReLU()).eval()


def rounded_weights(weight: np.ndarray, by_channel: bool) -> np.ndarray:
    """Weights in 8 bits, number by number."""
    out = np.zeros_like(weight)
    for o in range(len(weight)):
        largest = max(abs(v) for v in (weight[o] if by_channel else weight).flatten())
        scale = largest / 127
        for at in np.ndindex(weight[o].shape):
            out[(o, *at)] = min(127, max(-127, round(float(weight[(o, *at)] / scale)))) * scale
    return out


def rounded_map(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """A map in 8 bits, number by number: 0 is one of the numbers."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = min(255, max(0, round(-low / scale)))
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        out[at] = (min(255, max(0, round(float(x[at] / scale)) + zero)) - zero) * scale
    return out


@pytest.mark.parametrize("weights", ["tensor", "channel"])
def test_numbers_are_those_of_a_plain_loop(weights):
    net, x = one_layer(), drawn(4, 2, 6, 6, seed=2)
    kernel = rounded_weights(net[0].weight.detach().double().numpy(), weights == "channel")
    kernel, bias = torch.tensor(kernel).float(), net[0].bias.detach()
    seen = x[:2]  # what the range of the map is found on: the other images are cut off
    given = torch.tensor(rounded_map(x.numpy(), seen.min().item(), seen.max().item()))
    for activations, entering in (("minmax", given), (None, x)):
        found = quantize(net, [seen[:1], seen[1:]], weights, activations)(x)
        expected = F.relu(F.conv2d(entering, kernel, bias, 2, 1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 * expected.max().item())
    assert (quantize(net, [seen], weights)(x) - net(x)).abs().max() > 1e-3, "it does round"
    torch.testing.assert_close(net[0].weight, one_layer()[0].weight)  # the network stays


def test_a_histogram_cuts_off_what_is_rare():
    net, x = one_layer(), drawn(8, 2, 6, 6, seed=3)
    x[0, 0, 0, 0] = 200.0
    errors = {
        activations: (quantize(net, [x], "channel", activations)(x) - net(x))[1:].abs().mean()
        for activations in ("minmax", "histogram")
    }
    assert errors["histogram"] < errors["minmax"] / 4


def test_training_moves_ranges_and_what_it_leaves_is_what_is_converted():
    net, x = one_layer(), drawn(16, 2, 6, 6, seed=4)
    model = trainable(net, [x])
    assert not any(module.training for module in model.modules())
    before = model(x).detach()
    assert torch.equal(model(3 * x[:1]), model(3 * x[:1])) and torch.equal(model(x), before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    target = drawn(16, 3, 3, 3, seed=5)
    losses = []
    model.train()
    with pytest.raises(ValueError, match=r"train mode: call model.eval"):
        converted(model)
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(model(3 * x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, "gradients pass through the rounding"
    model.eval()
    after = model(x)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(converted(model)(x), after, rtol=0, atol=1e-5)
    again = trainable(net, [torch.ones(1, 2, 6, 6)])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), after), "ranges are among its weights"


def test_mistakes_are_told(monkeypatch):
    net, x = one_layer(), drawn(2, 2, 6, 6)
    with pytest.raises(ValueError, match=r"weights \(='row'\) must be one of tensor, channel\."):
        quantize(net, [x], "row")
    with pytest.raises(
        ValueError, match=r"activations \(='max'\) must be one of minmax, histogram"
    ):
        quantize(net, [x], activations="max")
    with pytest.raises(ValueError, match="batches must hold images"):
        quantize(net, [])
    with pytest.raises(ValueError, match=r"the model is in train mode: call model\.eval"):
        quantize(one_layer().train(), [x])
    with pytest.raises(ValueError, match=r"0 is not fused: call fuse"):
        quantize(nn.Sequential(BLOCKS["repvgg"](2, 2, 3)).eval(), [x])

    class Asks(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"Asks cannot be quantized, torch\.export cannot trace it"):
        quantize(Asks().eval(), [x])
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"torchao, which is not installed: pip install \"replib"):
        quantize(net, [x])


@pytest.mark.parametrize("block", ["repvgg", "qarepvgg"])
def test_ranges_before_and_after_fusing(block):
    net = scrambled(build("digits", block, width=0.5, classes=4, in_channels=1)).eval()
    for one in outermost_blocks(net).values():
        one.set_rate(0.5)
    batches = [drawn(5, 1, 8, 8, seed=i) for i in range(2)]
    x = torch.cat(batches)
    before, after = layer_ranges(net, batches), layer_ranges(fuse(net), batches)
    whole = [one | {"part": ""} for one in before if one["part"] in ("", "sum")]
    assert [one["layer"] for one in whole] == [one["layer"] for one in after]
    for ours, theirs in zip(whole, after, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    name, first = next(iter(outermost_blocks(net).items()))
    lines = {one["part"]: one for one in before if one["layer"] == name}
    assert list(lines) == [*first.branches, "sum"]
    for part, branch in first.branches.items():
        rate = 1.0 if part == first.main else 0.5
        weight = first.in_own_form(branch.kernel()).weight * rate
        out = first.branch_outputs(x)[part].detach() * rate
        numbers = sorted(abs(v) for v in weight.flatten().tolist())
        channels = sorted(max(abs(v) for v in c.flatten().tolist()) for c in weight)
        expected = {
            "weight_min": weight.min().item(),
            "weight_max": weight.max().item(),
            "weight_deviation": np.std(weight.detach().numpy()),
            "weight_peak": numbers[-1] / np.std(weight.detach().numpy()),
            "weight_channels": channels[-1] / channels[(len(channels) - 1) // 2],
            "output_min": out.min().item(),
            "output_max": out.max().item(),
            "output_deviation": np.std(out.double().numpy()),
            "output_peak": out.abs().max().item() / np.std(out.double().numpy()),
        }
        found = {key: value for key, value in lines[part].items() if key in expected}
        assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="no image has reached"):
        layer_ranges(net, [])


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["tensor", "channel"])
def test_integers_of_onnx_runtime_agree(weights, tmp_path):
    """A whole merged network, run in 8-bit integers: the same classes, logits within a few steps."""
    runtime = pytest.importorskip("onnxruntime")
    net = fuse(scrambled(build("digits", "repvgg", width=1.0, classes=10, in_channels=1)).eval())
    x = drawn(256, 1, 8, 8, seed=6)
    ours = quantize(net, x.split(64), weights)
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(ours, (x[:2],), dynamo=True, dynamic_shapes=batch, verbose=False)
    program.save(tmp_path / "net.onnx")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3
    session = runtime.InferenceSession(tmp_path / "net.onnx", options, ["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    run = (tmp_path / "run.onnx").read_bytes()
    assert run.count(b"QLinearConv") >= 4, "convolutions are of integers there"
    mine, rounding = ours(x), (ours(x) - net(x)).abs().mean()
    assert (theirs - mine).abs().mean() < rounding / 4, "closer to each other than to float32"
    assert (theirs.argmax(1) == mine.argmax(1)).float().mean() > 0.99
