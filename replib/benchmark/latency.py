"""Latency and size: one network in every form in which it can be run after training.

What is timed is inference: warm, waited for, in alternating rounds, and only where the outputs are
those of the network in float64. Sizes are counted by shapes, and are not of this machine.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
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
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise LeftOut(f"{', '.join(missing)} not installed (they are in the extra `export`)")
    if setting.on_gpu:
        raise LeftOut("ONNX Runtime runs on the processor here, and the others on the GPU")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        plain = copy.deepcopy(deployed).to(memory_format=torch.contiguous_format)
        write_onnx(plain, path, (x.contiguous(),))
        return OnnxModel(path, threads=torch.get_num_threads())


# What makes each form of a deployed network; the training form is the network itself.
FORMS: dict[str, Callable[[nn.Module, Tensor, Setting], Run]] = {
    "fused": lambda deployed, x, setting: deployed,
    "fused, compiled": compiled,
    "fused, ONNX Runtime": in_onnx_runtime,
}
CONTIGUOUS = {"fused, ONNX Runtime"}  # its memory layout; torch's forms have channels last


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
            plain, _ = images(setting, batch, subject.channels, subject.size)
            last = plain.contiguous(memory_format=torch.channels_last)
            wanted = exact(plain[:CHECKED].double())
            own = {"outputs": apart(model(last)[:CHECKED], wanted)}
            makers = {TRAINING: lambda *_: model, **FORMS}
            actions, first = {}, {}
            for form, make in makers.items():
                x = plain if form in CONTIGUOUS else last
                try:
                    run = make(deployed, x, setting)
                    first[form] = seconds_of(partial(run, x), setting.device)
                except LeftOut as reason:
                    out["left_out"][form] = str(reason)
                    continue
                error = {"outputs": apart(run(x)[:CHECKED], wanted)}
                row = {"way": f"{form}, batch {batch}"}
                row |= agreement(error, own, torch.finfo(torch.float32).eps)
                out["agreement"].append(row)
                if not row["equal"]:
                    raise Unequal(f"{row['way']}: {difference(row)}")
                actions[form] = partial(run, x)
            options = {"device": setting.device, "deadline": setting.deadline}
            rounds = max(setting.tier.rounds, ROUNDS) if setting.tier.name != "quick" else 3
            times = alternate(actions, rounds=rounds, **options)
            for form, found in times.items():
                about = {"way": f"{form}, batch {batch}", "form": form, "batch": batch}
                about["milliseconds"] = spread(found, 1000)
                about["first_call_seconds"] = rounded(first[form])
                out["ways"].append(about)
                if form != TRAINING:
                    line = {"of": f"{TRAINING}, batch {batch}", "over": about["way"]}
                    line |= {"what": "time"} | quotients(times[TRAINING], found)
                    out["ratios"].append(line)
    return out


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
