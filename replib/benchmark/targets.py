"""What was wanted, and whether a measurement shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from replib.benchmark.cases import SMALL
from replib.benchmark.subjects import BRANCHES, Way

MET, MISSED = "met", "missed"


@dataclass(frozen=True)
class Found:
    """What a measurement says of a target: the number, its spread, and which way gave it."""

    value: float
    low: float | None
    high: float | None
    by: str


@dataclass(frozen=True)
class Target:
    """`text`, wanted as `sign` `bound`, from the results of `cases`, on a "cpu" or on "cuda".

    find: {case: result} -> what was found; None where the numbers are not there.
    more: cases that are looked at where they were measured, and not needed.
    """

    id: str
    text: str
    device: str
    cases: tuple[str, ...]
    sign: str  # ">=" or "<="
    bound: float
    unit: str
    find: Callable[[Mapping[str, dict]], Found | None]
    more: tuple[str, ...] = ()

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.sign == ">=" else value <= self.bound


@dataclass(frozen=True)
class Verdict:
    """`text` is MET, MISSED, or why there is no verdict."""

    target: Target
    text: str
    found: Found | None = None


def judged(target: Target, measurement: Mapping) -> Verdict:
    """The verdict of a target over a measurement."""
    cases, tier = measurement["cases"], measurement["settings"]["tier"]
    if tier == "quick":
        return Verdict(target, "not measured: the quick tier only shows that all runs")
    if target.device != tier:
        needs = "needs a GPU" if target.device == "cuda" else "is of a processor"
        return Verdict(target, f"not measured here ({needs})")
    for case in target.cases:
        entry = cases.get(case)
        if entry is None or entry["status"] != "done":
            said = "not run" if entry is None else f"{entry['status']}: {entry['reason']}"
            return Verdict(target, f"not measured: {case} {said}")
    more = [case for case in target.more if cases.get(case, {}).get("status") == "done"]
    results = {case: cases[case]["result"] for case in (*target.cases, *more)}
    refused = [
        line["refused"]
        for result in results.values()
        for line in result.get("ratios", [])
        if "refused" in line
    ]
    found = target.find(results)
    if found is None:
        left = [r for result in results.values() for r in result.get("left_out", {}).values()]
        return Verdict(target, f"not measured: {'; '.join([*refused, *left]) or 'no such number'}")
    return Verdict(target, MET if target.holds(found.value) else MISSED, found)


# -- where numbers are found ----------------------------------------------------------------------
def line_of(result: dict, of: str, over: str, what: str) -> dict | None:
    """The ratio of two ways, unless it was refused."""
    for line in result.get("ratios", []):
        if (line["of"], line["over"], line["what"]) == (of, over, what) and "median" in line:
            return line
    return None


def found_in(line: dict, by: str) -> Found:
    return Found(line["median"], line.get("low"), line.get("high"), by)


def ratio(case: str, of: str, *over: str, what: str = "time") -> Callable:
    """The largest ratio of one way over any of others, in one case or in "any"."""

    def find(results: Mapping[str, dict]) -> Found | None:
        found = [results[name] for name in results if case in (name, "any")]
        lines = [line_of(result, of, other, what) for result in found for other in over]
        lines = [line for line in lines if line is not None]
        best = max(lines, key=lambda line: line["median"], default=None)
        return best and found_in(best, f"{best['of']} / {best['over']}")

    return find


def fastest_over_branches(block: str) -> Callable:
    """Branch by branch, eager and contiguous, over the fastest shared way in float32."""
    of = Way(block, BRANCHES, "contiguous").name
    modes = ("none", "default", "cudagraphs")
    over = [Way(block, "shared", "contiguous"), *(Way(block, mode=mode) for mode in modes)]
    return ratio("any", of, *(way.name for way in over))


def slowest_block(results: Mapping[str, dict]) -> Found | None:
    """Of all families, the least that the shared form gains, both eager and channels last."""
    lines = []
    for case, result in results.items():
        name = case.split("/")[1]
        line = line_of(result, Way(name, BRANCHES).name, Way(name).name, "time")
        if line is None:
            return None
        lines.append(found_in(line, name))
    return min(lines, key=lambda found: found.value)


def least_over_batches(network: str, form: str, what: str) -> Callable:
    """DBB over OREPA, the least over all batches."""

    def find(results: Mapping[str, dict]) -> Found | None:
        lines = [
            found_in(line, f"{line['of']} / {line['over']}")
            for line in results["crossover"]["ratios"]
            if line["what"] == what
            and "median" in line
            and line["of"].startswith(network)
            and f", {form}" in line["of"]
            and line["over"].startswith("orepa")
        ]
        return min(lines, key=lambda found: found.value, default=None)

    return find


def number(case: str, ending: str, *, begin: str = "", largest: bool = True) -> Callable:
    """The largest, or smallest, of the numbers whose name begins and ends so."""

    def find(results: Mapping[str, dict]) -> Found | None:
        numbers = results[case].get("numbers", {}).items()
        lines = [found_in(v, k) for k, v in numbers if k.startswith(begin) and k.endswith(ending)]
        choose = max if largest else min
        return choose(lines, key=lambda found: found.value, default=None)

    return find


def best_ratio(over: str) -> Callable:
    """The largest ratio over a way whose name begins so, in any of the cases."""

    def find(results: Mapping[str, dict]) -> Found | None:
        lines = [
            found_in(line, f"{line['of']} / {line['over']}")
            for result in results.values()
            for line in result["ratios"]
            if "median" in line and line["over"].startswith(over)
        ]
        return max(lines, key=lambda found: found.value, default=None)

    return find


DBB, OREPA = Way("dbb"), Way("orepa")
FULL = "resnet18/orepa-full"
A1 = "RepVGG-A1 for CIFAR"

TARGETS = [
    Target(
        "a1-repvgg", f"{A1}, a step at batch 128: branch by branch, eager, over the fastest "
        "shared form, float32", "cpu", ("a1/repvgg",), ">=", 1.6, "times",
        fastest_over_branches("repvgg"),
    ),
    Target(
        "a1-dbb", "The same with DBB", "cpu", ("a1/dbb",), ">=", 1.25, "times",
        fastest_over_branches("dbb"), ("compiled/dbb",),
    ),
    Target(
        "a1-orepa", "The same with OREPA", "cpu", ("a1/orepa",), ">=", 1.3, "times",
        fastest_over_branches("orepa"), ("compiled/orepa",),
    ),
    Target(
        "none-slower", "No family of blocks is slower shared than branch by branch, both eager "
        "and channels last; 3 % is left to noise", "cpu",
        tuple(f"a1/{name}" for name in ("repvgg", "dbb", "orepa", *SMALL)), ">=", 0.97, "times",
        slowest_block,
    ),
    Target(
        "orepa-memory-dbb", "OREPA on ResNet-18 at 224x224, batch 64: saved memory of DBB, "
        "branch by branch, over OREPA's (0.36 of it is 2.78)", "cpu", (FULL,), ">=", 1 / 0.36,
        "times", ratio(FULL, Way("dbb", BRANCHES).name, OREPA.name, what="saved"),
    ),
    Target(
        "orepa-memory-offline", "There: OREPA's saved memory over that of its own branches on "
        "the images", "cpu", (FULL,), "<=", 0.3, "times",
        ratio(FULL, OREPA.name, Way("orepa", "unsqueezed").name, what="saved"),
    ),
    Target(
        "orepa-time", "There: a step of DBB, branch by branch, over OREPA's", "cpu", (FULL,),
        ">=", 1.8, "times", ratio(FULL, Way("dbb", BRANCHES).name, OREPA.name),
    ),
    Target(
        "orepa-time-shared", "There: a step of DBB, shared as well, over OREPA's (stricter than "
        "was asked)", "cpu", (FULL,), ">=", 1.8, "times", ratio(FULL, DBB.name, OREPA.name),
    ),
    Target(
        "orepa-any-batch-time", "OREPA is never slower than DBB, branch by branch, at any batch",
        "cpu", ("crossover",), ">=", 1.0, "times", least_over_batches("dbb", BRANCHES, "time"),
    ),
    Target(
        "orepa-any-batch-time-shared", "Nor than DBB shared", "cpu", ("crossover",), ">=", 1.0,
        "times", least_over_batches("dbb", "shared", "time"),
    ),
    Target(
        "orepa-any-batch-memory", "Nor does it save more memory than DBB at any batch", "cpu",
        ("crossover",), ">=", 1.0, "times", least_over_batches("dbb", "shared", "saved"),
    ),
    Target(
        "cycle", f"Merging, redrawing and restoring {A1} takes less than one step", "cpu",
        ("cycle",), "<=", 1.0, "steps",
        ratio("cycle", "merge, redraw, restore", "training step"),
    ),
    *(
        Target(
            f"deployed-{batch}", f"{A1}, deployed, over a plain network, batch {batch}: within "
            "2 %", "cpu", ("deployed/a1",), "<=", 1.02, "times",
            ratio("deployed/a1", f"deployed, batch {batch}", f"plain, batch {batch}"),
        )
        for batch in (1, 64)
    ),
    Target(
        "gpu-epoch", f"An epoch of {A1}: DataLoader and eager over our loop", "cuda",
        ("epoch/a1",), ">=", 10, "times", best_ratio("our loop"),
    ),
    Target(
        "gpu-epoch-dbb", "An epoch of ResNet-18 with DBB: DataLoader and eager over our loop",
        "cuda", ("epoch/resnet18-dbb",), ">=", 3, "times",
        best_ratio("our loop"),
    ),
    Target(
        "gpu-packed", f"Several cells of {A1} at once: throughput over one at a time", "cuda",
        ("packed",), ">=", 3, "times", best_ratio("1 process"), ("packed/graphs",),
    ),
    Target(
        "gpu-bandwidth", "ResNet-18: the share of the memory bandwidth", "cuda",
        ("share/resnet18",), ">=", 40, "%",
        number("share/resnet18", "share of the memory bandwidth, %", begin="plain"),
    ),
    Target(
        "gpu-recipe", f"RepAn's recipe on {A1}, 610 epochs of 50,000 images, from the time of "
        "one", "cuda", ("epoch/a1",), "<=", 10, "minutes",
        number("epoch/a1", "minutes of 610 epochs of 50,000 images", largest=False),
    ),
]  # fmt: skip


def profiled(case: str, device: str) -> frozenset[str]:
    """The ways of a case whose profile a missed target may need."""
    slow = {
        "a1/repvgg": [Way("repvgg"), Way("repvgg", BRANCHES, "contiguous")],
        "a1/dbb": [Way("dbb"), Way("dbb", BRANCHES, "contiguous")],
        "a1/orepa": [Way("orepa"), Way("orepa", BRANCHES, "contiguous")],
        FULL: [DBB, OREPA],
        "share/resnet18": [Way("plain", "plain", precision="bfloat16"), Way("plain", "plain")],
    }
    names = [way.name for way in slow.get(case, [])]
    if case == "deployed/a1":
        names = [f"{form}, batch {b}" for form in ("deployed", "plain") for b in (1, 64)]
    if case.startswith(("a1/", "resnet18/")) and case not in slow:
        names = [Way(case.split("/")[1]).name]
    return frozenset(names)
