"""What is done to a network between and after training: merge, restore, fuse, verify, deploy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from replib.benchmark.agreement import Unequal, agreement, difference
from replib.benchmark.setting import Setting, Subject, images, timed
from replib.benchmark.steps import running
from replib.benchmark.subjects import Way
from replib.benchmark.timing import Action, profile, quotients, rounded, spread
from replib.fusing import fuse
from replib.methods.cycle import Cycle
from replib.networks import outermost_blocks
from replib.verification import verify


def cycle(setting: Setting, subject: Subject) -> dict:
    """Merging, restoring, fusing and verifying a network, in units of one training step."""
    x, labels = images(setting, subject.batch, subject.channels, subject.size)
    x = x.contiguous(memory_format=torch.channels_last)
    model = subject.make().to(setting.device, memory_format=torch.channels_last)
    step = running(Way("network"), model, x, labels, setting.device)
    official, preserving = (
        Cycle(copy.deepcopy(model), warmup=5, fidelity=f) for f in ("official", "preserving")
    )
    still = copy.deepcopy(model).eval()
    fused = fuse(still)
    verdict = verify(still, fused, x[:8])
    before = copy.deepcopy(preserving.model).eval()
    preserving.start_cycle(x)
    kept = verify(before, preserving.model.eval(), x[:8])
    preserving.model.train()
    checks = {"fuse": verdict, "merge, redraw, restore, preserving": kept}
    rows = [
        {
            "way": name,
            "equal": check.ok,
            "errors": {"outputs": rounded(check.network.error)},
            "allowed": {"outputs": rounded(check.network.allowed)},
        }
        for name, check in checks.items()
    ]
    if not all(row["equal"] for row in rows):
        raise Unequal("; ".join(difference(row) for row in rows))

    def merge() -> None:
        for block in outermost_blocks(still).values():
            block.merged()

    actions = {
        "training step": step,
        "merge": merge,
        "merge, redraw, restore": official.start_cycle,
        "merge, redraw, restore, preserving": lambda: preserving.start_cycle(x),
        "fuse": lambda: fuse(still),
        "verify, 8 images": lambda: verify(still, fused, x[:8]),
    }
    times = timed(setting, actions)
    if not all(p.isfinite().all() for p in official.model.parameters()):
        raise Unequal("the restored network is not finite")
    ways = [{"way": n, "milliseconds": spread(t, 1000)} for n, t in times.items()]
    step_times = times["training step"]
    lines = [
        {"of": name, "over": "training step", "what": "time"} | quotients(found, step_times)
        for name, found in times.items()
        if name != "training step"
    ]
    return {"ways": ways, "ratios": lines, "agreement": rows}


def deployed(
    setting: Setting, subject: Subject, plain: Callable[[nn.Module], nn.Module], batches=(1, 64)
) -> dict:
    """Inference of the training form, of the deployed network and of a plain one.

    plain: a network that never had blocks, with the weights of a deployed one.
    """
    model = calibrated(subject.make(), setting, subject).eval()
    forms = {"training form": model, "deployed": fuse(model)}
    forms["plain"] = plain(forms["deployed"]).eval()
    layout = torch.channels_last
    exact = copy.deepcopy(model).double()
    forms = {k: m.to(setting.device, memory_format=layout) for k, m in forms.items()}
    out: dict = {"ways": [], "ratios": [], "agreement": []}
    actions: dict[str, Action] = {}
    with torch.inference_mode():
        for batch in batches:
            x, _ = images(setting, batch, subject.channels, subject.size)
            x = x.contiguous(memory_format=layout)
            wanted = exact(x[:8].double())
            own = {"outputs": apart(model(x[:8]), wanted)}
            for form, network in forms.items():
                name = f"{form}, batch {batch}"
                error = {"outputs": apart(network(x[:8]), wanted)}
                eps = torch.finfo(torch.float32).eps
                out["agreement"].append({"way": name} | agreement(error, own, eps))
                actions[name] = partial(network, x)
        wrong = [difference(row) for row in out["agreement"] if not row["equal"]]
        if wrong:
            raise Unequal("; ".join(wrong))
        times = timed(setting, actions)
        out["profiles"] = {
            name: profile(action, setting.device)
            for name, action in actions.items()
            if name in setting.profiled
        }
    out["ways"] = [{"way": n, "milliseconds": spread(t, 1000)} for n, t in times.items()]
    for batch in batches:
        for of, over in (("training form", "deployed"), ("deployed", "plain")):
            names = f"{of}, batch {batch}", f"{over}, batch {batch}"
            line = {"of": names[0], "over": names[1], "what": "time"}
            out["ratios"].append(line | quotients(*(times[name] for name in names)))
    return out


def apart(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def calibrated(model: nn.Module, setting: Setting, subject: Subject) -> nn.Module:
    """Running statistics as data leave them: an untrained network's outputs would fade away."""
    model = model.to(setting.device).train()
    x, _ = images(setting, min(subject.batch, 32), subject.channels, subject.size)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 1.0
    model(x)
    return model
