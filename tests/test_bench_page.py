"""The page of speed and memory shows what the files say: all of it, and nothing else."""

import copy
import itertools
import json
import re
from html import unescape

import pytest

from replib.benchmark import running
from replib.benchmark.cases import CASES
from replib.benchmark.subjects import BRANCHES, Way
from replib.benchmark.targets import FULL, TARGETS
from replib.report import render
from replib.report.bench import Bench

NUMBER = re.compile(r'<data value="([^"]+)">([^<]*)</data>')


def made():
    """A measurement with a result of every shape, and a new number wherever one can be."""
    counter = itertools.count(1)

    def value():
        return next(counter) / 8 + 3  # exact in JSON

    def spread():
        return {"median": value(), "low": value(), "high": value(), "rounds": 4}

    def step(case):
        name = case.split("/")[1]
        before, after = Way(name, BRANCHES).name, Way(name).name
        refused = case == "resnet18/acb"
        slower = {"median": 0.5} if name == "qarepvgg" else {}
        ratios = [{"of": before, "over": after, "what": "time"} | spread() | slower]
        ratios += [{"of": before, "over": after, "what": "saved", "median": value()}]
        if refused:
            ratios = [
                {"of": before, "over": after, "what": "time", "refused": "gradients <differ>"}
            ]
        return {
            "ways": [
                {"way": w, "network": name, "milliseconds": spread(), "saved_mib": value()}
                for w in ((before,) if refused else (before, after))
            ],
            "ratios": ratios,
            "agreement": [
                {"way": w, "equal": not (refused and w == after), "allowed": {"outputs": 1.0},
                 "errors": {"outputs": value(), "gradients": value()}}
                for w in (before, after)
            ],
            "left_out": {"compiled <form>": "there is no C++ compiler"},
            "limits": {after: {"products_ms": value(), "times": value(), "over": before}},
            "profiles": {after: [{"operator": "aten::<mm>", "calls": 3, "milliseconds": value(),
                                  "share": value()}]},
        }  # fmt: skip

    def growth(axis):
        points = [
            {"series": f"dbb, {form}", "x": x, "way": f"{form}{x}", "milliseconds": spread(),
             "saved_mib": value()}
            for form in (BRANCHES, "shared") for x in (1, 2)
        ]  # fmt: skip
        slopes = [{"series": "dbb, shared", "what": "time"} | spread()]
        slopes.append({"series": "dbb, shared", "what": "saved", "median": value()})
        return step("a1/dbb") | {"axis": axis, "points": points, "slopes": slopes}

    def numbers():
        return {"numbers": {"copy, GB/s": spread(), "matrix product, GFLOP/s": spread()}}

    def ratios(*lines):
        return {"ratios": [dict(zip(("of", "over", "what"), li, strict=True)) | spread()
                           for li in lines]}  # fmt: skip

    results = {
        "machine": numbers(),
        "packed": numbers() | ratios(("2 processes", "1 process", "throughput")),
        "cycle": ratios(("merge, redraw, restore", "training step", "time")),
        "growth/width": growth("width"),
        "crossover": growth("batch"),
        FULL: ratios((Way("dbb", BRANCHES).name, Way("orepa").name, "time")),
    }
    names = [n for n, case in CASES.items() if n.startswith(("a1/", "resnet18/")) and n != FULL]
    results |= {name: step(name) for name in names}
    stamp = {"code": "c0de", "commit": "abcdef", "finished": "2026-11-21T10:00:00+00:00"}
    cases = {
        name: {"status": "done", "reason": "", "result": result, "seconds": value(),
               "elsewhere": 0.0} | stamp
        for name, result in results.items()
    }  # fmt: skip
    failed = {"status": "failed", "reason": "not equal: <b>", "result": None, "seconds": 1.0}
    cases["share/a1"] = failed | {"elsewhere": 1.375} | stamp
    context = {
        "device": "cpu", "processor": "A <processor>", "cores": 2, "python": "3.11.7",
        "libraries": {"torch": "2.11.0"}, "system": "Linux x86_64", "commit": "abcdef",
    }  # fmt: skip
    settings = {"device": "cpu", "tier": "cpu", "threads": 2}
    return {"context": context, "settings": settings, "cases": cases}


def page(folder):
    bench = Bench(folder)
    parts = [
        bench.provenance(), bench.targets(), bench.profiles(), bench.families("a1"),
        bench.families("resnet18"), bench.cases(*CASES), bench.slopes(), bench.rest(),
    ]  # fmt: skip
    bench.growth(), bench.crossover()
    return "".join(part.data for part in parts)


@pytest.fixture
def measurement():
    return made()


@pytest.fixture
def write(tmp_path):
    def write(measurement, name="bench-a.json"):
        running.write(tmp_path / name, measurement)
        return tmp_path

    return write


def leaves(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def texts(value):
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield str(key)
            yield from texts(inner)
    elif isinstance(value, str):
        yield value


def test_no_number_is_shown_that_the_file_does_not_hold(write, measurement):
    html = page(write(measurement))
    held = set(leaves(measurement)) | {sum(e["seconds"] for e in measurement["cases"].values())}
    shown = [float(value) for value, _ in NUMBER.findall(html)]
    assert len(shown) > 300 and set(shown) <= held
    for value, text in NUMBER.findall(html):
        if float(value) < 100:
            assert float(text) == pytest.approx(float(value), rel=6e-3)
    # What is left after the numbers: names and texts of the file and of the declarations.
    rest = unescape(re.sub(r"<[^>]*>", " ", NUMBER.sub(" ", html)))
    rest = re.sub(r"threads: 2|during 1 of \d+ cases|Agreement: \d+ checks", "", rest)
    known = [*texts(measurement), *CASES, *(case.title for case in CASES.values())]
    known += [text for one in TARGETS for text in (one.text, f"{one.bound:.3g} {one.unit}")]
    for text in sorted((t for t in known if re.search(r"\d", t)), key=len, reverse=True):
        rest = rest.replace(text, " ")
    rest = rest.replace("float64", "")
    assert re.findall(r".{,40}\d[\d.]*", rest) == []


def test_other_numbers_make_another_page(write, measurement):
    before = NUMBER.findall(page(write(measurement)))

    def moved(value):
        if isinstance(value, dict):
            return {k: moved(v) for k, v in value.items()}
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value * 1.01 if isinstance(value, float) else value

    after = NUMBER.findall(page(write(moved(measurement))))
    same = [a for (a, _), (b, _) in zip(before, after, strict=True) if a == b]
    assert set(same) <= {"1", "2", "3"}  # cores, threads, calls


def test_every_target_is_shown_with_its_verdict(write, measurement):
    html = Bench(write(measurement)).targets().data
    assert html.count("<tr>") == len(TARGETS) + 1
    for target in TARGETS:
        assert target.text in unescape(html)
    gpu = sum(target.device == "cuda" for target in TARGETS)
    assert html.count("not measured here (needs a GPU)") == gpu == 5
    assert "<b>missed</b>" in html  # the restore of the fixture takes more than a step


def test_without_a_measurement_every_target_is_still_shown(tmp_path):
    html = Bench(tmp_path).targets().data
    assert html.count("<tr>") == len(TARGETS) + 1 and html.count("not measured") == len(TARGETS)


def test_a_missed_target_shows_its_profile(write, measurement):
    html = Bench(write(measurement)).profiles().data
    assert "aten::&lt;mm&gt;" in html and Way("qarepvgg").name in html
    assert "the limit without faster convolutions" in html and "&lt;data" not in html
    assert Way("dbb").name not in html


def test_a_refused_ratio_says_why(write, measurement):
    html = Bench(write(measurement)).families("resnet18").data
    row = html[html.index("<b>acb</b>") :]
    row = row[: row.index("</tr>")]
    assert "gradients &lt;differ&gt;" in row
    tables = Bench(write(measurement)).cases("resnet18/acb").data
    assert "refused: gradients &lt;differ&gt;" in tables and "NOT EQUAL" in tables


def test_what_failed_or_was_not_run_is_listed(write, measurement):
    html = Bench(write(measurement)).rest().data
    assert "not equal: &lt;b&gt;" in html
    for name, case in CASES.items():
        missing = "cpu" in case.seconds and name not in measurement["cases"]
        assert (f"<code>{name}</code>" in html) == (missing or name == "share/a1")


def test_a_noisy_machine_is_told(write, measurement):
    assert "The machine was not quiet: during 1 of" in Bench(write(measurement)).provenance().data
    measurement["cases"]["share/a1"]["elsewhere"] = 0.1
    assert "not quiet" not in Bench(write(measurement)).provenance().data


def test_several_versions_of_the_code_are_told(write, measurement):
    assert "several versions" not in Bench(write(measurement)).provenance().data
    measurement["cases"]["cycle"]["code"] = "other"
    assert "several versions" in Bench(write(measurement)).provenance().data


def test_two_devices_stand_side_by_side(write, measurement):
    other = copy.deepcopy(measurement)
    other["context"]["device"], other["settings"]["tier"] = "A GPU", "cuda"
    write(measurement)
    bench = Bench(write(other, "bench-b.json"))
    assert bench.provenance().data.count("<h3>") == 2
    html = bench.targets().data
    assert "needs a GPU" not in html and "is of a processor" not in html


def test_nothing_of_a_file_is_markup(write, measurement):
    measurement["cases"]["cycle"] |= {"status": "failed", "reason": "<reason>"}
    html = page(write(measurement))
    assert "cycle failed: &lt;reason&gt;" in html
    for text in ("<processor>", "<differ>", "<form>", "<mm>", "equal: <b>", "<reason>"):
        assert text not in html


@pytest.mark.slow
def test_the_notebook_makes_the_page(project, measurement):
    folder = project.folder / "reports" / "measurements"
    running.write(folder / "bench-a.json", measurement)
    path = render.reproduce("bench", "quick", [])
    html = path.read_text()
    assert html.count("<img") == 2 and "A &lt;processor&gt;" in html
    assert json.dumps("Error") not in html
