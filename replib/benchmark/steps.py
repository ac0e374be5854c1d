"""Training steps of several ways side by side: times, saved memory, agreement, growth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib.analysis.cost import saved_bytes
from replib.benchmark.agreement import (
    EXACT,
    GRADIENT,
    OUTPUT,
    Pass,
    Unequal,
    agreement,
    buffers_kept,
    difference,
    distances,
    largest,
    network_pass,
    official_vectors,
    reference_pass,
    step_pass,
)
from replib.benchmark.setting import Setting, Subject, images, timed
from replib.benchmark.subjects import BRANCHES, FORMATS, LeftOut, Way
from replib.benchmark.timing import (
    MIB,
    Action,
    profile,
    quotients,
    rounded,
    seconds_of,
    slope,
    spread,
)
from replib.methods.cycle import decay_groups
from replib.training.step import PRECISIONS, Step, set_rate, sgd, why_not


@dataclass
class Running:
    """A way that is built, and has agreed with its reference."""

    way: Way
    model: nn.Module
    step: Step
    x: Tensor
    labels: Tensor
    notes: dict

    def __call__(self) -> Tensor:
        return self.step(self.x, self.labels)

    def saved(self) -> int:
        """Bytes kept for the backward pass."""

        def forward() -> Tensor:
            return self.step.forward(self.x, self.labels)

        return saved_bytes(self.model, forward, (self.x, self.labels))

    def saved_for(self, x: Tensor, labels: Tensor) -> int:
        """The same for other images, counted without computing: on the meta device."""
        model = copy.deepcopy(self.model).to("meta")
        inputs = laid_out(x.to("meta"), self.way), labels.to("meta")
        return saved_bytes(model, lambda: F.cross_entropy(model(inputs[0]), inputs[1]), inputs)


def training_step(way: Way, model: nn.Module, batch: int, said: list[str]) -> Step:
    """Our own step, at learning rate 0: all of its work is done, and the weights stay."""

    def objective(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels)

    optimizer = sgd(decay_groups(model, 0.0), momentum=0.9, nesterov=False)
    set_rate(optimizer, 0.0)
    options = {"precision": way.precision, "compile": way.mode, "say": said.append}
    return Step(model, optimizer, objective, batch=batch, **options)


def running(way: Way, reference: nn.Module, x: Tensor, labels: Tensor, device: str) -> Running:
    """A way, built and run once. Raises: LeftOut where something for it is missing."""
    if way.mode != "none" and (missing := why_not(device)):
        raise LeftOut(missing)
    if way.mode == "cudagraphs" and not device.startswith("cuda"):
        raise LeftOut("there is no GPU")
    model, said = way.model(reference, device), []
    x = laid_out(x, way)
    step = training_step(way, model, len(x), said)
    made = Running(way, model, step, x, labels, {})
    with buffers_kept(model):
        first = seconds_of(made, device)
    if said and step.mode != way.mode:
        raise LeftOut(said[0])
    made.notes |= {"note": said[0]} if said else {}
    if way.mode != "none":
        made.notes["first_step_seconds"] = rounded(first)
    return made


class Reference:
    """The branch-by-branch network that ways of one network must agree with."""

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor, few: int | None):
        self.model, self.whole, self.some = model, (x, labels), (x[:few], labels[:few])
        self.passes: dict[bool, Pass] = {}
        self.own: dict[tuple, dict[str, float]] = {}

    def exact(self, whole: bool) -> Pass:
        """Its pass in float64, over all images or some."""
        if whole not in self.passes:
            self.passes[whole] = reference_pass(self.model, *(self.whole if whole else self.some))
        return self.passes[whole]

    def own_errors(self, way: Way, whole: bool) -> dict[str, float]:
        """{part: error} of itself in the layout and in the precision of a way.

        Torch's norms sum less precisely channels last on a processor, so the layout counts.
        """
        key = (way.precision, way.layout, whole)
        if key not in self.own:
            plain = replace(way, form=BRANCHES, mode="none").model(self.model, self.device)
            x, labels = self.whole if whole else self.some
            lower = PRECISIONS[way.precision] is not torch.float32
            with torch.autocast(x.device.type, PRECISIONS[way.precision], enabled=lower):
                found = network_pass(plain, laid_out(x, way), labels)
            self.own[key] = distances(found, self.exact(whole), "everything")
        return self.own[key]

    @property
    def device(self) -> str:
        return str(self.whole[0].device)

    def check(self, made: Running) -> dict:
        """The agreement of a way: in float64, exactly; and of the very step that is timed."""
        way, model = made.way, made.model
        whole = way.mode != "none"  # what is compiled is so for one size
        named = dict(self.model.named_parameters()).keys()
        ours = dict(model.named_parameters()).keys() == named
        x, labels = self.some
        double = network_pass(copy.deepcopy(model).double(), laid_out(x.double(), way), labels)
        view = "everything" if ours else "network"
        exactly = largest(distances(double, self.exact(False), view).values())
        x, labels = self.whole if whole else self.some
        x = laid_out(x, way)
        if ours:
            found, view = step_pass(model, made.step, x, labels), "step"
        else:
            found = network_pass(model, x, labels)
        errors = distances(found, self.exact(whole), view)
        eps = torch.finfo(PRECISIONS[way.precision]).eps
        row = {"way": way.name} | agreement(errors, self.own_errors(way, whole), eps)
        row["errors"]["in float64"], row["allowed"]["in float64"] = rounded(exactly), EXACT
        row["equal"] = row["equal"] and exactly <= EXACT
        return row


def laid_out(x: Tensor, way: Way) -> Tensor:
    return x.contiguous(memory_format=FORMATS[way.layout])


def steps(
    setting: Setting,
    subjects: Mapping[str, Subject],
    ways: Sequence[Way],
    *,
    pairs: Sequence[tuple[Way, Way]] = (),
    untimed: Sequence[Way] = (),
) -> tuple[dict, dict[str, list[float]]]:
    """Training steps of several ways: their times, what they save, and that they agree.

    Of every network the first way named is the one that the others are compared with.
    pairs: more ratios (of, over). untimed: ways of which only the memory is asked.
    Returns the result, and the seconds of every round by way.
    Raises: Unequal where nothing is left to be timed.
    """
    out: dict = {"ways": [], "ratios": [], "agreement": [], "left_out": {}}
    runs: dict[str, Running] = {}
    unequal: dict[str, str] = {}
    saved: dict[str, int] = {}
    for network, subject in subjects.items():
        x, labels = images(setting, subject.batch, subject.channels, subject.size)
        reference = Reference(subject.make().to(setting.device), x, labels, subject.few)
        for way in (way for way in (*ways, *untimed) if way.network == network):
            # Eager and on a processor, the full batch is left to the rounds that are timed.
            light = way.mode == "none" and not setting.on_gpu
            given = reference.some if light else reference.whole
            try:
                made = running(way, reference.model, *given, setting.device)
                result = reference.check(made)
            except LeftOut as reason:
                out["left_out"][way.name] = str(reason)
                continue
            out["agreement"].append(result)
            if not result["equal"]:
                unequal[way.name] = difference(result)
                continue
            saved[way.name] = made.saved_for(x, labels) if light else made.saved()
            line = {"way": way.name, "network": network, "saved_mib": in_mib(saved[way.name])}
            out["ways"].append(line | made.notes)
            if way not in untimed:
                runs[way.name] = replace(made, x=laid_out(x, way), labels=labels)
    if not runs:
        raise Unequal("; ".join(unequal.values()) or "; ".join(out["left_out"].values()))
    times = timed(setting, runs)
    for line in out["ways"]:
        if line["way"] in times:
            line["milliseconds"] = spread(times[line["way"]], 1000)
            line |= {"peak_mib": peak_mib(runs[line["way"]])} if setting.on_gpu else {}
    out["ratios"] = ratios([*first_of_each(ways), *pairs], times, saved, unequal)
    out["profiles"] = {
        name: profile(run, setting.device) for name, run in runs.items() if name in setting.profiled
    }
    out["limits"] = limits(out)
    return out, times


def limits(result: dict) -> dict[str, dict]:
    """By profiled way: the milliseconds of its convolutions and matrix products, and how many times
    as fast as the first way it would be if all else were free."""
    times = {w["way"]: w["milliseconds"]["median"] for w in result["ways"] if "milliseconds" in w}
    if not times:
        return {}
    first, found = next(iter(times)), {}
    for way, rows in result["profiles"].items():
        share = sum(r["share"] for r in rows if any(p in r["operator"] for p in ("conv", "mm")))
        if share and way in times:
            least = share * times[way]
            numbers = {"products_ms": rounded(least), "times": rounded(times[first] / least)}
            found[way] = numbers | {"over": first}
    return found


def in_mib(size: int) -> float:
    return rounded(size / MIB)


def growth(
    setting: Setting,
    axis: str,
    families: Mapping[str, Callable[[int], Subject]],
    xs: Sequence[int],
    forms: Sequence[str],
    pairs: Sequence[tuple[str, str, str, str]] = (),
) -> dict:
    """Training steps over one axis: points for a figure, and slopes on logarithmic axes.

    families: the subject of a series at x. forms: of the blocks; "plain" networks have one.
    pairs: more ratios at every x, (network, form, other network, its form).
    """

    def way(name: str, form: str, x: int) -> Way:
        return Way(f"{name}, {axis} {x}", form)

    subjects = {f"{name}, {axis} {x}": f(x) for name, f in families.items() for x in xs}
    forms_of = {name: ("plain",) if name == "plain" else forms for name in families}
    series = [(name, form) for name in families for form in forms_of[name]]
    ways = [way(name, form, x) for x in xs for name, form in series]
    more = [(way(a, f, x), way(b, g, x)) for a, f, b, g in pairs for x in xs]
    out, times = steps(setting, subjects, ways, pairs=more)
    by_name = {line["way"]: line for line in out["ways"]}
    out |= {"axis": axis, "points": [], "slopes": []}
    for name, form in series:
        found = [(x, way(name, form, x).name) for x in xs if way(name, form, x).name in times]
        label = name if form == "plain" else f"{name}, {form}"
        for x, key in found:
            line = by_name[key]
            numbers = {"milliseconds": line["milliseconds"], "saved_mib": line["saved_mib"]}
            out["points"].append({"series": label, "x": x, "way": key} | numbers)
        if len(found) > 1:
            rounds = zip(*(times[key] for _, key in found), strict=False)
            slopes = slope([x for x, _ in found], list(rounds))
            out["slopes"].append({"series": label, "what": "time"} | slopes)
            saved = [by_name[key]["saved_mib"] for _, key in found]
            memory = slope([x for x, _ in found], [saved])["median"]
            out["slopes"].append({"series": label, "what": "saved", "median": memory})
    return out


def first_of_each(ways: Sequence[Way]) -> list[tuple[Way, Way]]:
    """(the first way of a network, another one of it)."""
    pairs = []
    for network in dict.fromkeys(way.network for way in ways):
        first, *others = (way for way in ways if way.network == network)
        pairs += [(first, other) for other in others]
    return pairs


def ratios(
    pairs: Iterable[tuple[Way, Way]],
    times: Mapping[str, list[float]],
    saved: Mapping[str, int],
    unequal: Mapping[str, str],
) -> list[dict]:
    """A line for the time and one for the saved memory of every pair; of unequal ways, why not."""
    lines = []
    for of, over in dict.fromkeys(pairs):
        names = {"of": of.name, "over": over.name}
        wrong = [f"{n}: {unequal[n]}" for n in (of.name, over.name) if n in unequal]
        if wrong:
            lines.append(names | {"what": "time", "refused": "; ".join(wrong)})
            continue
        if of.name in times and over.name in times:
            lines.append(names | {"what": "time"} | quotients(times[of.name], times[over.name]))
        if of.name in saved and over.name in saved:
            value = rounded(saved[of.name] / saved[over.name])
            lines.append(names | {"what": "saved", "median": value})
    return lines


def peak_mib(action: Action) -> float:
    """The most memory of a GPU that is allocated at once during an action."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return in_mib(torch.cuda.max_memory_allocated())


# -- the reference itself -------------------------------------------------------------------------
def vectors(setting: Setting) -> dict:
    """The branch-by-branch blocks against what the official implementations computed."""
    if setting.vectors is None or not setting.vectors.is_dir():
        raise LeftOut("the official numbers (REPLIB_SHARED, or ../shared/vectors) are not here")
    rows = official_vectors(setting.vectors)
    if not rows or not all(row["equal"] for row in rows):
        wrong = [row["file"] for row in rows if not row["equal"]]
        raise Unequal(f"the reference differs from the official numbers: {', '.join(wrong)}")
    bounds = {"outputs": OUTPUT, "gradients": GRADIENT, "statistics": OUTPUT}
    return {
        "agreement": [
            {"way": row["file"], "equal": row["equal"], "errors": row["errors"]}
            | {"allowed": {part: bounds[part] for part in row["errors"]}}
            for row in rows
        ]
    }
