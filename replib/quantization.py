"""Deployed networks in 8 bits: quantized after training, or trained for it; ranges of layers.

    eight_bit = quantize(fuse(net.eval()), batches)        # after training
    in_training = trainable(fuse(net.eval()), batches)     # for it: ... train as any module ...
    eight_bit = converted(in_training)
    pandas.DataFrame(layer_ranges(net, batches))           # before or after fusing

Inputs of convolutions and linear layers become unsigned 8-bit numbers with a zero point, one scale
for a map; weights signed ones, -127 to 127, symmetric, with one scale for a kernel or one for each
output channel; biases stay float32. What is returned computes with these numbers in float32 (its
weights are stored in 8 bits), which is the arithmetic of integers up to the rounding of float32
sums; written as ONNX, it runs in integers in ONNX Runtime wherever one such layer follows another.
There, sums of two products saturate on processors without instructions for them (VNNI), and differ
from these: `bits=7` keeps weights small enough. Other layers, transposed convolutions among them,
stay in float32. Observers, rounding and the graph are torchao's (pt2e).

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018; for merged networks, Ding et al., "Re-parameterizing
Your Optimizers rather than Architectures", ICLR 2023, tables 8 and 10.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, fx, nn

from replib.blocks import RepBlock
from replib.errors import UserError
from replib.networks import CONVOLUTIONS, in_train_mode, outermost, outermost_blocks

VERSION = 1  # raise when the numbers of a network in 8 bits change
WEIGHTS = ("tensor", "channel")  # what has one scale: a kernel, or each of its output channels
# How the range of a map is found: its smallest and largest value, or the range whose rounding
# and cutting off lose least, by a histogram; None: maps stay float32.
CALIBRATIONS = ("minmax", "histogram", None)
LAYERS = (*CONVOLUTIONS, nn.Linear)
# What computes otherwise in train mode; an exported graph has it as in eval mode.
STILL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
MOVING = 0.01  # weight of a batch in the moving average of a range, in training
LEAST_SCALE = 2.0**-24  # of numbers that are all 0


def check_packages() -> None:
    """Raises: UserError where torchao is missing."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "quantization needs torchao, which is not installed: "
            'pip install "replib[quant]" (or, in a checkout, pip install ".[quant]").'
        )


@torch.no_grad()
def quantize(
    fused: nn.Module,
    batches: Iterable[Tensor] | Tensor,
    weights: str = "tensor",
    activations: str | None = "minmax",
    bits: int = 8,
) -> nn.Module:
    """A copy of a deployed network in 8 bits, calibrated after training (PTQ).

    fused: what `replib.fuse` returns, in eval mode. batches: calibration images (N, C, *space)
    where the network is, normalised as in testing; one tensor is one batch. weights: of `WEIGHTS`;
    activations: of `CALIBRATIONS`. bits: of weights, 2 to 8; maps have 8.
    Raises: ValueError for other values, for a network in train mode or with blocks that are not
    fused, and without images; UserError where torchao is missing or the network cannot be exported.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits (={bits!r}) must be from 2 to 8.")
    prepared = observed(fused, batches, weights, activations, training=False, bits=bits)
    return finished(prepared)


def trainable(
    fused: nn.Module, batches: Iterable[Tensor] | Tensor, weights: str = "tensor"
) -> Trainable:
    """A copy of a deployed network that rounds to 8 bits as it computes, for training (QAT).

    Arguments and errors as of `quantize`; ranges of maps begin as those of the batches. What it
    computes is the network in eval mode, also while it is trained: dropout drops nothing, and norms
    that are left keep their statistics. A warning names them.
    """
    still = [n for n, m in fused.named_modules() if isinstance(m, STILL) and getattr(m, "p", 1)]
    if still:
        kind = type(fused.get_submodule(still[0])).__name__
        warnings.warn(
            f"{still[0]} ({kind}) stays as in eval mode while the network is trained in 8 bits"
            + (f", like {len(still) - 1} more." if still[1:] else "."),
            stacklevel=2,
        )
    return Trainable(observed(fused, batches, weights, "minmax", training=True)).eval()


@torch.no_grad()
def converted(model: Trainable) -> nn.Module:
    """What was trained, as `quantize` returns it: a copy; its own outputs to rounding.

    Raises: ValueError in train mode, where ranges still move, and for a network that has diverged.
    """
    refuse_training(model)
    if model.diverged:
        raise ValueError("a weight or range is no number: training in 8 bits has diverged.")
    with quiet():
        graph = copy.deepcopy(model.graph)
    shape = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["val"].shape
    first = next(graph.parameters())
    graph(first.new_zeros(2, *map(int, shape[1:])))  # ranges of the weights as they are now
    return finished(graph)


class Trainable(nn.Module):
    """A network that computes as in 8 bits, with gradients that pass through the rounding.

    Shapes: as the network's. In train mode the ranges of maps follow a moving average; in eval
    mode they stay. Ranges of weights are always those of the weights. Once it has diverged its
    outputs are no numbers, as those of any network.
    """

    def __init__(self, graph: fx.GraphModule):
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.graph(x)
        except AssertionError:  # torchao's, of a range that is no number; or of another mistake
            if not self.diverged:
                raise
            shape = self.graph.graph.output_node().args[0][0].meta["val"].shape
            nothing = x.new_full((len(x), *shape[1:]), torch.nan)
            return nothing * sum(parameter.sum() for parameter in self.parameters())

    @property
    def diverged(self) -> bool:
        """Whether a parameter, or an end of the range of a map, is no finite number."""
        seen = [each.activation_post_process for each in rounded_maps(self.graph)]
        ends = [end for one in seen for end in (one.min_val, one.max_val)]
        return not all(values.isfinite().all() for values in (*self.parameters(), *ends))

    def train(self, mode: bool = True) -> Trainable:
        for module in self.modules():  # an exported graph has no train() and eval() of its own
            module.training = mode
        for module in rounded_maps(self.graph):
            module.enable_observer(mode)
        return self


# -- torchao ---------------------------------------------------------------------------------------
def observed(
    fused: nn.Module,
    batches: Iterable[Tensor] | Tensor,
    weights: str,
    activations: str | None,
    training: bool,
    bits: int = 8,
) -> fx.GraphModule:
    """The network as a graph in which observers have seen the batches."""
    for name, value, allowed in (
        ("weights", weights, WEIGHTS),
        ("activations", activations, CALIBRATIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} (={value!r}) must be one of {', '.join(map(str, allowed))}.")
    refuse_training(fused)
    if blocks := outermost_blocks(fused):
        raise ValueError(f"{next(iter(blocks)) or 'the model'} is not fused: call fuse() first.")
    check_packages()
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

    batches = in_batches(batches)
    first = next(batches, None)
    if first is None or not len(first):
        raise ValueError("batches must hold images: ranges are calibrated on them.")
    with quiet():
        prepare = prepare_qat_pt2e if training else prepare_pt2e
        rules = quantizer(weights, activations, training, 2 ** (bits - 1) - 1)
        prepared = prepare(exported(fused, first), rules)
    with torch.no_grad():
        calibrate(prepared, chain([first], batches))
    return prepared


def in_batches(batches: Iterable[Tensor] | Tensor) -> Iterator[Tensor]:
    """The batches, of which one tensor (N, C, *space) is one."""
    return iter([batches] if isinstance(batches, Tensor) else batches)


def calibrate(prepared: fx.GraphModule, batches: Iterable[Tensor]) -> None:
    """Show a graph its batches. What is to follow a moving average in training begins with the
    smallest and largest value of all of them, not with those of the first."""
    rounding = list(rounded_maps(prepared))
    ranges: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        for each in rounding:
            each.activation_post_process.reset_min_max_vals()
        prepared(batch)
        seen = [(e.activation_post_process.min_val, e.activation_post_process.max_val)
                for e in rounding]  # fmt: skip
        ranges = [
            (torch.minimum(low, least), torch.maximum(high, most))
            for (low, high), (least, most) in zip(ranges or seen, seen, strict=True)
        ]
    for each, (low, high) in zip(rounding, ranges, strict=True):
        each.activation_post_process.min_val.copy_(low)
        each.activation_post_process.max_val.copy_(high)
        scale, zero_point = each.calculate_qparams()
        each.scale.copy_(scale)
        each.zero_point.copy_(zero_point)


def rounded_maps(graph: fx.GraphModule) -> Iterator[nn.Module]:
    """What rounds maps in a graph that is trained; there is nothing such in others."""
    for module in graph.modules():
        if getattr(module, "dtype", None) == torch.uint8 and hasattr(module, "enable_observer"):
            yield module


def refuse_training(model: nn.Module) -> None:
    """Raises: ValueError for a network with a module in train mode."""
    if training := in_train_mode(model):
        raise ValueError(f"{training[0]} is in train mode: call model.eval() first.")


def exported(fused: nn.Module, x: Tensor) -> fx.GraphModule:
    """The graph of a network for any number of images, with a copy of its weights."""
    batch = {0: torch.export.Dim.DYNAMIC}
    two = torch.cat([x[:1], x[:1]])  # of one, the number of images would be taken to be fixed
    try:
        program = torch.export.export(copy.deepcopy(fused), (two,), dynamic_shapes=(batch,))
    except Exception as error:  # whatever a model does when it is run on symbols
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{type(fused).__name__} cannot be quantized, torch.export cannot trace it: {said}"
        ) from None
    graph = program.module()
    for module in graph.modules():
        module.training = False
    return graph


def quantizer(weights: str, activations: str | None, training: bool, steps: int):
    """What tells torchao which tensors are rounded, and how; weights from -steps to steps."""
    from torchao.quantization.pt2e import fake_quantize, observer
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
    )

    def spec(kind: type, dtype: torch.dtype, least: int, most: int, scheme, **options):
        options["eps"] = LEAST_SCALE
        if training:
            made = fake_quantize.FakeQuantize.with_args(observer=kind, **options)
        else:
            made = kind.with_args(**options)
        axis = 0 if weights == "channel" and dtype == torch.int8 else None
        return QuantizationSpec(dtype, made, least, most, scheme, axis)

    # Moving with a constant of 1 is to follow: in training, weights have the range they have now.
    kinds = {
        ("tensor", False): (observer.MinMaxObserver, torch.per_tensor_symmetric),
        ("tensor", True): (observer.MovingAverageMinMaxObserver, torch.per_tensor_symmetric),
        ("channel", False): (observer.PerChannelMinMaxObserver, torch.per_channel_symmetric),
        ("channel", True): (
            observer.MovingAveragePerChannelMinMaxObserver,
            torch.per_channel_symmetric,
        ),
    }
    kind, scheme = kinds[weights, training]
    follow = {"averaging_constant": 1.0} if training else {}
    kernels = spec(kind, torch.int8, -steps, steps, scheme, **follow)
    maps = None
    if activations is not None:
        if training:
            kind, options = observer.MovingAverageMinMaxObserver, {"averaging_constant": MOVING}
        else:
            names = {"minmax": "MinMaxObserver", "histogram": "HistogramObserver"}
            kind, options = getattr(observer, names[activations]), {}
        maps = spec(kind, torch.uint8, 0, 255, torch.per_tensor_affine, **options)

    class Annotating(Quantizer):
        """Rounds what enters convolutions and linear layers."""

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            for node in layers_of(model):
                found = {node.args[1]: kernels} | ({} if maps is None else {node.args[0]: maps})
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map=found, _annotated=True
                )
            return model

        def validate(self, model: fx.GraphModule) -> None:
            pass

    return Annotating()


def layers_of(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """The calls of a graph that are of a convolution or a linear layer with weights of its own."""
    aten = torch.ops.aten
    kinds = (aten.conv1d, aten.conv2d, aten.conv3d, aten.linear)
    calls = [getattr(kind, name) for kind in kinds for name in kind.overloads()]
    for node in graph.graph.nodes:
        if node.target in calls and node.args[1].op == "get_attr":
            yield node


def finished(prepared: fx.GraphModule) -> fx.GraphModule:
    """What was observed, with its weights in 8 bits."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    with quiet():
        out = convert_pt2e(prepared)
        move_exported_model_to_eval(out)
    used = {node.target for node in out.graph.nodes if node.op == "get_attr"}
    for name, _ in list(out.named_parameters()):
        if name not in used:  # kernels in float32, of which those in 8 bits are made
            holder, _, leaf = name.rpartition(".")
            delattr(out.get_submodule(holder), leaf)
    for module in out.modules():
        module.training = False
    return out


@contextmanager
def quiet() -> Iterator[None]:
    """What torch and torchao have to say to each other is not for our user."""
    log = logging.getLogger("torchao")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


# -- ranges ----------------------------------------------------------------------------------------
@torch.no_grad()
def layer_ranges(model: nn.Module, batches: Iterable[Tensor] | Tensor) -> list[dict]:
    """The ranges of weights and outputs of every layer, in the network's order; as plain data.

    A convolution or linear layer is one line. A block that is not fused is a line for each branch,
    its norms folded in and times the rate, and one for their sum, the kernel that is deployed;
    `part` says which. Columns: weight_min, weight_max, weight_deviation; weight_peak, the largest
    |weight| over the deviation: how few of the 127 steps most weights have; weight_channels, the
    largest |weight| of the channel that has the largest over that of the channel in the middle;
    output_min, output_max, output_deviation and output_peak over all images, before activation.
    batches: images (N, C, *space) where the model is.
    Raises: ValueError in train mode, and where no image reaches a layer.
    """
    refuse_training(model)
    layers = outermost(model, lambda m: isinstance(m, (RepBlock, *LAYERS)))
    sums: dict[tuple[str, str], Outputs] = {}

    def see(name: str, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        if isinstance(layer, RepBlock):
            for part, map in layer.branch_outputs(x).items():
                rate = 1 if part == layer.main else layer.rate
                sums.setdefault((name, part), Outputs()).add(map * rate)
        sums.setdefault((name, part_of(layer)), Outputs()).add(out)

    hooks = [
        layer.register_forward_hook(lambda m, given, out, name=name: see(name, m, given[0], out))
        for name, layer in layers.items()
    ]
    try:
        for batch in in_batches(batches):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, layer in layers.items():
        for part, weight in kernels_of(layer).items():
            if (name, part) not in sums:
                raise ValueError(f"no image has reached {name or 'the model'}.")
            shown = {"layer": name, "part": part} | weight_ranges(weight)
            found.append(shown | sums[name, part].ranges())
    return found


def part_of(layer: nn.Module) -> str:
    """The name of the whole of a layer among its parts."""
    return "sum" if isinstance(layer, RepBlock) else ""


def kernels_of(layer: nn.Module) -> dict[str, Tensor]:
    """part -> kernel of a layer: branches, then the whole."""
    if not isinstance(layer, RepBlock):
        return {"": layer.weight.double()}
    kernels = {
        name: layer.in_own_form(branch.kernel()).weight * (1 if name == layer.main else layer.rate)
        for name, branch in layer.branches.items()
    }
    return kernels | {"sum": layer.in_own_form(layer.kernel()).weight}


def weight_ranges(weight: Tensor) -> dict[str, float]:
    """The columns of weights (O, ...)."""
    deviation, largest = weight.std(unbiased=False), weight.abs().max()
    channels = weight.abs().flatten(1).amax(1)
    values = {
        "min": weight.min(),
        "max": weight.max(),
        "deviation": deviation,
        "peak": largest / deviation,
        "channels": channels.max() / channels.median(),
    }
    return {f"weight_{name}": value.item() for name, value in values.items()}


class Outputs:
    """The range of a map over batches."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self.least, self.most = float("inf"), float("-inf")

    def add(self, x: Tensor) -> None:
        low, high = x.aminmax()
        self.least, self.most = min(self.least, low.item()), max(self.most, high.item())
        x = x.double()
        self.count += x.numel()
        self.total += x.sum().item()
        self.squares += x.square().sum().item()

    def ranges(self) -> dict[str, float]:
        mean = self.total / self.count
        deviation = max(self.squares / self.count - mean**2, 0.0) ** 0.5
        largest = max(abs(self.least), abs(self.most))
        return {
            "output_min": self.least,
            "output_max": self.most,
            "output_deviation": deviation,
            "output_peak": largest / deviation if deviation else float("nan"),
        }
