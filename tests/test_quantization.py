"""Networks in 8 bits: against plain loops, against integers of ONNX Runtime, in training."""

import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_blocks import scrambled
from torch import nn

from replib import export, fuse, parallel
from replib.blocks import BLOCKS
from replib.errors import UserError
from replib.experiments import cells, measurements
from replib.experiments.params import Cell
from replib.experiments.store import Store
from replib.models import build
from replib.networks import outermost_blocks
from replib.quantization import converted, layer_ranges, quantize, rounded_maps, trainable
from replib.training.evaluation import Split, accuracy
from replib.training.loop import OutOfTime

torch.set_num_threads(1)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_layer() -> nn.Module:
    """A convolution, its channels of very different size."""
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, groups=1)
    conv.weight.data = drawn(3, 2, 3, 3) * torch.tensor([0.01, 1.0, 30.0]).view(3, 1, 1, 1)
    conv.bias.data = drawn(3, seed=1)
    return nn.Sequential(conv, nn.ReLU()).eval()


def rounded_weights(weight: np.ndarray, by_channel: bool, steps: int = 127) -> np.ndarray:
    """Weights in 8 bits, number by number."""
    out = np.zeros_like(weight)
    for o in range(len(weight)):
        largest = max(abs(v) for v in (weight[o] if by_channel else weight).flatten())
        scale = largest / steps
        for at in np.ndindex(weight[o].shape):
            out[(o, *at)] = min(steps, max(-steps, round(float(weight[(o, *at)] / scale)))) * scale
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


@pytest.mark.parametrize("weights", ["tensor", pytest.param("channel", marks=pytest.mark.slow)])
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


@pytest.mark.slow
def test_fewer_bits():
    net, x = one_layer(), drawn(4, 2, 6, 6)
    kernel = rounded_weights(net[0].weight.detach().double().numpy(), True, steps=7)
    expected = F.relu(F.conv2d(x, torch.tensor(kernel).float(), net[0].bias, 2, 1))
    found = quantize(net, [x], "channel", None, bits=4)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_eight_bits_are_the_arithmetic_of_integers():
    """The graph of one layer beside sums of whole numbers: to the rounding of float32."""
    net, x = one_layer(), drawn(4, 2, 6, 6, seed=7)
    weight, bias = net[0].weight.detach().double(), net[0].bias.detach().double()
    low, high = x.min().double(), x.max().double()
    step = (high - low) / 255
    zero = (-low / step).round()
    images = (x.double() / step + zero).round().clamp(0, 255).long()
    scales = weight.abs().flatten(1).amax(1) / 127
    kernel = (weight / scales.view(-1, 1, 1, 1)).round().long()
    padded = F.pad(images, (1, 1, 1, 1), value=int(zero)) - int(zero)
    columns = F.unfold(padded.double(), 3, stride=2).long()  # whole numbers, exact in float64
    sums = (kernel.flatten(1) @ columns).view(4, 3, 3, 3)
    expected = sums * (scales * step).view(-1, 1, 1) + bias.view(-1, 1, 1)
    found = quantize(net, [x], "channel")(x)
    torch.testing.assert_close(found, expected.clamp(min=0).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_a_histogram_cuts_off_what_is_rare():
    net, x = one_layer(), drawn(8, 2, 256, 256, seed=3)
    x[0, 0, 0, 0] = 40.0  # of a million numbers: its own error is the smaller one
    errors = {
        activations: (quantize(net, [x], "channel", activations)(x) - net(x))[1:].abs().mean()
        for activations in ("minmax", "histogram")
    }
    assert errors["histogram"] < errors["minmax"] / 1.5


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
    with warnings.catch_warnings(action="error"):
        stored = converted(model)
    torch.testing.assert_close(stored(x), after, rtol=0, atol=1e-5)
    again = trainable(net, [torch.ones(1, 2, 6, 6)])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), after), "ranges are among its weights"


def test_ranges_of_training_begin_with_those_of_all_batches():
    """Not with a moving average of them, in which all but the first weigh little."""
    net = one_layer()
    x = drawn(4, 2, 5, 5)
    for batches in ([x, 10 * x, -20 * x], [10 * x, x], x):
        model = trainable(net, batches)
        (rounding,) = rounded_maps(model.graph)
        seen = torch.cat(list(batches)) if isinstance(batches, list) else batches
        step = (seen.max() - seen.min()) / 255
        torch.testing.assert_close(rounding.scale, step.view(1))
        with torch.no_grad():
            assert (model(seen) - net(seen)).abs().max() < 0.05 * net(seen).max(), "not cut off"
    with pytest.warns(UserWarning, match=r"1 \(Dropout\) stays as in eval mode .* like 1 more"):
        trainable(nn.Sequential(net, nn.Dropout(0.5), nn.BatchNorm2d(3)).eval(), x)


def test_what_has_diverged_computes_no_numbers():
    """As in floating point, where training goes on all the same; torchao's observers stop it."""
    model, x = trainable(one_layer(), drawn(2, 2, 6, 6)).train(), drawn(3, 2, 6, 6)
    assert not model.diverged
    whole = model(x)
    out = model(x * torch.inf)  # 0 * inf
    assert out.shape == whole.shape and out.isnan().all() and model.diverged, "its ranges"
    with pytest.raises(ValueError, match=r"^a weight or range is no number: .* diverged\.$"):
        converted(model.eval())
    out.sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert any(parameter.isnan().any() for parameter in model.parameters())
    assert model.train()(x).isnan().all() and model.eval()(x).isnan().all() and model.diverged


def test_images_that_do_not_fit_are_not_taken_for_divergence():
    model = trainable(one_layer(), drawn(2, 2, 6, 6))
    for wrong in (drawn(2, 3, 6, 6), drawn(2, 2, 7, 7)):
        with pytest.raises((AssertionError, RuntimeError)):
            model(wrong)
    assert not model.diverged


def test_what_is_stored_has_eight_bits():
    """And one tensor of images is one batch."""
    net = nn.Sequential(nn.Conv2d(2, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    x = drawn(4, 2, 7, 7)
    found = quantize(net, x)
    kernels = sum(conv.weight.numel() for conv in (net[0], net[2]))
    floats = [t for t in found.state_dict().values() if t.dtype != torch.int8]
    assert sum(t.numel() for t in found.state_dict().values() if t.dtype == torch.int8) == kernels
    assert sum(t.numel() for t in floats) == 2 * 64, "biases"
    assert torch.equal(found(x), quantize(net, [x])(x))
    assert layer_ranges(net, x) == layer_ranges(net, [x])
    with pytest.raises(UserError, match="a network in 8 bits cannot be proved"):
        export(found, "network.pt2", x)


def test_mistakes_are_told(monkeypatch):
    net, x = one_layer(), drawn(2, 2, 6, 6)
    with pytest.raises(ValueError, match=r"weights \(='row'\) must be one of tensor, channel\."):
        quantize(net, [x], "row")
    with pytest.raises(
        ValueError, match=r"activations \(='max'\) must be one of minmax, histogram"
    ):
        quantize(net, [x], activations="max")
    with pytest.raises(ValueError, match=r"bits \(=9\) must be from 2 to 8\."):
        quantize(net, [x], bits=9)
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
    net = scrambled(build("digits", block, classes=4, in_channels=1)).eval()
    for one in outermost_blocks(net).values():
        one.set_rate(0.5)
    batches = [drawn(5, 1, 8, 8, seed=i) for i in range(2)]
    x = torch.cat(batches)
    before, after = layer_ranges(net, batches), layer_ranges(fuse(net), batches)
    whole = [one for one in before if one["part"] in ("", "sum")]
    assert [one["layer"] for one in whole] == [one["layer"] for one in after]
    for ours, theirs in zip(whole, after, strict=True):
        ours, theirs = (list(one.values())[2:] for one in (ours, theirs))
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
    """A whole merged network, run in integers: the same classes, logits within a few steps."""
    runtime = pytest.importorskip("onnxruntime")
    net = fuse(scrambled(build("digits", "repvgg", width=1.0, classes=10, in_channels=1)).eval())
    x = drawn(256, 1, 8, 8, seed=6)
    ours = quantize(net, x.split(64), weights, bits=7)  # more would saturate on some processors
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(ours, (x[:2],), dynamo=True, dynamic_shapes=batch, verbose=False)
    program.save(tmp_path / "net.onnx")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3
    session = runtime.InferenceSession(tmp_path / "net.onnx", options, ["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    run = (tmp_path / "run.onnx").read_bytes()
    assert run.count(b"QLinearConv") == 3, "all but the last, which no layer of 8 bits follows"
    mine, rounding = ours(x), (ours(x) - net(x)).abs().mean()
    assert (theirs - mine).abs().mean() < rounding / 4, "closer to each other than to float32"
    assert (theirs.argmax(1) == mine.argmax(1)).float().mean() > 0.95


# -- cells -----------------------------------------------------------------------------------------
def cell(**changes) -> Cell:
    values = dict(
        data="digits", train_images=80, held_out=20, seed=0, body="digits", block="repvgg",
        epochs=2, batch_size=20, learning_rate=0.05, momentum=0.9, weight_decay=1e-3,
    )  # fmt: skip
    return Cell.model_validate(values | changes)


def test_several_processes_train_no_cell_in_eight_bits(tmp_path, monkeypatch):
    """Each would have ranges of its own, and so another network."""
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    planned = cells.Planned("2" * 64, cell(quantized={"images": 50}, start="1" * 64))
    with pytest.raises(UserError, match=r"quantized is for one process, here are 2: .* torchrun"):
        cells.run_cell(planned, {}, Store(tmp_path))


@pytest.mark.slow
def test_a_cell_goes_on_in_eight_bits_and_a_killed_one_goes_on(tmp_path, one_thread):
    store = Store(tmp_path)
    base = cells.Planned("1" * 64, cell(epochs=10))
    cells.run_cell(base, {}, store, say=lambda text: None)
    found = []
    for key, stop in (("2", False), ("3", True)):
        planned = cells.Planned(key * 64, cell(quantized={"images": 50}, start="1" * 64))
        if stop:  # after its first step
            with pytest.raises(OutOfTime):
                cells.run_cell(planned, {"1" * 64: base}, store, deadline=0.0)
        cells.run_cell(planned, {"1" * 64: base}, store, say=lambda text: None)
        found.append(store.read(key * 64)["result"] | {"key": None})
    assert found[0] == found[1]
    result = found[0]
    assert result["versions"]["quantized"] == 1
    float32 = store.read("1" * 64)["result"]["deployed"]
    assert result["deployed"]["parameters"] == float32["parameters"]
    assert result["history"]["train_loss"][0] < 2, "it begins as what was trained"
    model = cells.trained_model(planned, store)
    test = Split.test(cells.dataset(planned.cell), "cpu")
    said = measurements.in_eight_bits(model, planned.cell, "cpu")["eight_bits"]
    assert said == {"trained": accuracy(converted(model), test)}
    assert said["trained"] == result["deployed"]["test_accuracy"]
    merged = fuse(cells.trained_model(base, store))
    images = list(cells.calibration(base.cell, "cpu", 60))
    assert sum(map(len, images)) == 60 == len(base_images := torch.cat(images).unique(dim=0))
    again = torch.cat(list(cells.calibration(base.cell, "cpu", 60))).unique(dim=0)
    assert torch.equal(base_images, again)
    measured = measurements.in_eight_bits(cells.trained_model(base, store), base.cell, "cpu")
    assert measured["float"] == pytest.approx(accuracy(merged, test), abs=1e-9)
    assert set(measured["eight_bits"]) == set(measured["same_class"]) == set(measurements.SCHEMES)
    ranges = list(cells.calibration(base.cell, "cpu", measurements.IMAGES))
    for name, (weights, activations) in measurements.SCHEMES.items():
        quantized = quantize(merged, ranges, weights, activations)
        assert measured["eight_bits"][name] == pytest.approx(accuracy(quantized, test), abs=1e-9)
        assert 0.9 < measured["same_class"][name] <= 1


@pytest.mark.parametrize(
    "changes, named",
    [
        ({}, "quantized needs start"),
        ({"start": "x", "ema": 0.9}, r"ema \(=0.9\) with quantized must be \(=0.0\)"),
        ({"start": "x", "accumulate": 2}, r"accumulate \(=2\) with quantized must be \(=1\)"),
        ({"start": "x", "cycle": {"warmup": 1}}, "cycle and quantized exclude each other"),
        (
            {"start": "x", "decay": "weights"},
            r"decay \(=weights\) with quantized must be one of all",
        ),
    ],
)
def test_cells_that_make_no_sense_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        cell(quantized={}, **changes)
