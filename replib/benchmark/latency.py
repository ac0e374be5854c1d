"""Latency and size: one network in every form in which it can be run after training.

What is timed is inference: warm, waited for, in alternating rounds, and only where the outputs are
those of the network in float64; in 8 bits, where they are as far from them as torch's are. Sizes
are counted by shapes, and are not of this machine.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from replib.analysis.cost import operations
from replib.benchmark.agreement import Unequal, agreement, difference
from replib.benchmark.cases import Case, large, seconds, small
from replib.benchmark.forms import apart, calibrated
from replib.benchmark.setting import Setting, Subject, images
from replib.benchmark.subjects import LeftOut, body
from replib.benchmark.timing import alternate, quotients, rounded, seconds_of, spread
from replib.branches import Convolution
from replib.export import PACKAGES, OnnxModel, write_onnx
from replib.fusing import fuse
from replib.networks import CONVOLUTIONS
from replib.quantization import quantize
from replib.training.step import why_not

BATCHES = (1, 64)
ROUNDS = 9  # at least, where time allows
CHECKED = 8  # images on which a form is compared with the network in float64
TRAINING = "training form"
Run = Callable[[Tensor], Tensor]


# -- forms -----------------------------------------------------------------------------------------
def compiled(deployed: nn.Module, x: Tensor, setting: Setting) -> Run:
    """Through torch.compile, for the batch that it is given."""
    if reason := why_not(setting.device):
        raise LeftOut(reason)
    torch.compiler.reset()
    return torch.compile(copy.deepcopy(deployed), dynamic=False)


def in_onnx_runtime(deployed: nn.Module, x: Tensor, setting: Setting) -> Run:
    """As an ONNX file, by as many threads as torch has."""
    needed(PACKAGES, "export")
    if setting.on_gpu:
        raise LeftOut("ONNX Runtime runs on the processor here, and the others on the GPU")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        plain = copy.deepcopy(deployed).to(memory_format=torch.contiguous_format)
        write_onnx(plain, path, (x.contiguous(),))
        return OnnxModel(path, threads=torch.get_num_threads())


def in_eight_bits(deployed: nn.Module, x: Tensor, setting: Setting) -> nn.Module:
    """In 8 bits by torchao, calibrated on these images; weights in 7, so that no processor's sums
    of two products saturate."""
    needed(("torchao",), "quant")
    plain = copy.deepcopy(deployed).to(memory_format=torch.contiguous_format)
    with torch.inference_mode(False):  # whose tensors torch.export does not take
        return quantize(plain, [x[:CHECKED].clone()], weights="channel", bits=7)


def needed(packages: Iterable[str], extra: str) -> None:
    """Raises: LeftOut where a package is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise LeftOut(f"{', '.join(missing)} not installed (they are in the extra `{extra}`)")


@dataclass(frozen=True)
class Form:
    """A form of a deployed network. rounded: into the network that it runs, where that is another
    one: it may be as far from float64 as that one is, and not as rounding explains."""

    made: Callable[[nn.Module, Tensor, Setting], Run] = lambda network, x, setting: network
    rounded: Callable[[nn.Module, Tensor, Setting], nn.Module] | None = None
    contiguous: bool = False  # its memory layout; torch's forms have channels last


FORMS: dict[str, Form] = {  # the training form is the network itself
    "fused": Form(),
    "fused, compiled": Form(compiled),
    "fused, ONNX Runtime": Form(in_onnx_runtime, contiguous=True),
    "fused, 8 bits, ONNX Runtime": Form(in_onnx_runtime, in_eight_bits, contiguous=True),
}
FURTHER = 1.25  # times as far from float64 as the network of rounded numbers: ties round otherwise


# -- sizes -----------------------------------------------------------------------------------------
def size(model: nn.Module, subject: Subject) -> dict:
    """What there is of a network in eval mode, and what it does with one image."""
    shape = (subject.channels, subject.size, subject.size)
    numbers = list(model.state_dict().values())
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "statistics": sum(2 * norm.num_features for norm in norms if norm.track_running_stats),
        "norms": len(norms),
        "kernels": kernels(model),
        "flops": 2 * operations(copy.deepcopy(model).to("meta"), shape)[0],
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in numbers),
    }


def kernels(model: nn.Module) -> int:
    """How many convolutions there are, those of branches included."""
    return sum(isinstance(m, (*CONVOLUTIONS, Convolution)) for m in model.modules())


# -- the measurement -------------------------------------------------------------------------------
def latency(network: Callable[[Setting], Subject], setting: Setting) -> dict:
    """Every form at every batch: milliseconds, the ratio over the training form, the error."""
    subject = network(setting)
    model = calibrated(subject.make(), setting, subject).eval()
    deployed, exact = fuse(model), copy.deepcopy(model).double()
    out: dict = {"ways": [], "ratios": [], "agreement": [], "left_out": {}}
    out["sizes"] = {TRAINING: size(model, subject), "fused": size(deployed, subject)}
    model, deployed = (m.to(memory_format=torch.channels_last) for m in (model, deployed))
    batches = (1, 4) if setting.tier.name == "quick" else BATCHES
    with torch.inference_mode():
        for batch in batches:
            many, _ = images(setting, max(batch, CHECKED), subject.channels, subject.size)
            plain = many[:batch].contiguous()
            last = plain.contiguous(memory_format=torch.channels_last)
            wanted = exact(many[:CHECKED].double())
            own = {"outputs": apart(first_of(model, many, last), wanted)}
            actions, first, files = {}, {}, {}
            for name, form in {TRAINING: Form(lambda *_: model), **FORMS}.items():
                x = plain if form.contiguous else last
                try:
                    network = form.rounded(deployed, many, setting) if form.rounded else deployed
                    run = form.made(network, x, setting)
                    first[name] = seconds_of(partial(run, x), setting.device)
                except LeftOut as reason:
                    out["left_out"][name] = str(reason)
                    continue
                found = first_of(run, many, x)
                error = {"outputs": apart(found, wanted)}
                row = {"way": f"{name}, batch {batch}"}
                if form.rounded:
                    row |= as_far(found, network(many[:CHECKED]), wanted)
                else:
                    row |= agreement(error, own, torch.finfo(torch.float32).eps)
                out["agreement"].append(row)
                if not row["equal"]:
                    raise Unequal(f"{row['way']}: {difference(row)}")
                actions[name], files[name] = partial(run, x), getattr(run, "bytes", None)
            options = {"device": setting.device, "deadline": setting.deadline}
            rounds = max(setting.tier.rounds, ROUNDS) if setting.tier.name != "quick" else 3
            times = alternate(actions, rounds=rounds, **options)
            for form, found in times.items():
                about = {"way": f"{form}, batch {batch}", "form": form, "batch": batch}
                about["milliseconds"] = spread(found, 1000)
                about["first_call_seconds"] = rounded(first[form])
                about["file_bytes"] = files[form]
                out["ways"].append(about)
                if form != TRAINING:
                    line = {"of": f"{TRAINING}, batch {batch}", "over": about["way"]}
                    line |= {"what": "time"} | quotients(times[TRAINING], found)
                    out["ratios"].append(line)
    return out


def first_of(run: Run, many: Tensor, like: Tensor) -> Tensor:
    """The outputs for the first CHECKED of these images, by batches of the size and the memory
    layout of `like`: what one image alone shows is chance."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    parts = many[: max(CHECKED, len(like))].split(len(like))
    found = [run(part.contiguous(memory_format=layout)) for part in parts]
    return torch.cat(found)[:CHECKED]


def as_far(found: Tensor, floats: Tensor, wanted: Tensor) -> dict:
    """Whether a form in integers is the same as the one in floating point, as plain data: nearer to
    it than that one is to float64, and not further from float64 itself."""
    own = apart(floats, wanted)
    errors = {"outputs": apart(found, wanted), "rounding": apart(found, floats.double())}
    allowed = {"outputs": FURTHER * own, "rounding": own}
    return {
        "equal": all(errors[part] <= allowed[part] for part in errors),
        "errors": {part: rounded(error) for part, error in errors.items()},
        "allowed": {part: rounded(bound) for part, bound in allowed.items()},
    }


# -- the list --------------------------------------------------------------------------------------
def repvgg(setting: Setting) -> Subject:
    return small(setting.tier, "repvgg")


def resnet18(setting: Setting) -> Subject:
    return large(setting.tier, "dbb")


def mobileone(setting: Setting) -> Subject:
    side = 64 if setting.tier.name == "quick" else setting.tier.large_image
    return Subject(partial(body, "mobileone_s0", "mobileone"), side, 8)


LATENCY: dict[str, Case] = {
    case.id: case
    for case in (
        Case(
            "latency/repvgg",
            "RepVGG-A1 for CIFAR",
            partial(latency, repvgg),
            seconds(10, 60, 60),
        ),
        Case(
            "latency/resnet18-dbb",
            "ResNet-18 with DBB",
            partial(latency, resnet18),
            seconds(15, 150, 90),
        ),
        Case(
            "latency/mobileone",
            "MobileOne-S0",
            partial(latency, mobileone),
            seconds(15, 120, 90),
        ),
    )
}
