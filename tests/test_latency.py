"""Latency and size: what is counted, what is refused, and a page of nothing but the file."""

import re
from functools import partial

import pytest
import torch

from replib.__main__ import main
from replib.benchmark import latency as measured
from replib.benchmark import running, timing
from replib.benchmark.agreement import Unequal
from replib.benchmark.cases import CASES
from replib.benchmark.latency import FORMS, LATENCY, TRAINING, Form, as_far, first_of, latency, size
from replib.benchmark.setting import TIERS, Setting, Subject
from replib.benchmark.subjects import LeftOut, stack
from replib.fusing import fuse
from replib.report.latency import Latency

torch.set_num_threads(1)
QUICK = Setting(TIERS["quick"])
SMALL = Subject(partial(stack, "repvgg", 4, 1), size=8, batch=2, channels=4)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "SHORT", -1.0)  # no more rounds than asked for


def test_sizes_are_those_worked_out_by_hand():
    model = SMALL.make().eval()
    head, pixels = 4 * 10, 8 * 8
    kernels, norms = 4 * 4 * 9 + 4 * 4, 3  # 3x3 and 1x1; theirs and the identity's
    assert size(model, SMALL) == {
        "parameters": kernels + norms * 2 * 4 + head + 10,
        "statistics": norms * 2 * 4,
        "norms": norms,
        "kernels": 2,
        "flops": 2 * (kernels * pixels + head),
        "bytes": 4 * (kernels + norms * 4 * 4 + head + 10 + 1) + 8 * norms,  # rate; counters
    }
    assert size(fuse(model), SMALL) == {
        "parameters": 4 * 4 * 9 + 4 + head + 10,
        "statistics": 0,
        "norms": 0,
        "kernels": 1,
        "flops": 2 * (4 * 4 * 9 * pixels + head),
        "bytes": 4 * (4 * 4 * 9 + 4 + head + 10),
    }


def forms(monkeypatch, **more):
    monkeypatch.setattr(measured, "FORMS", {"fused": FORMS["fused"], **more})


def test_every_form_is_timed_at_every_batch(monkeypatch):
    def absent(deployed, x, setting):
        raise LeftOut("it is not here")

    forms(monkeypatch, absent=Form(absent))
    result = latency(lambda setting: SMALL, QUICK)
    names = [f"{form}, batch {batch}" for batch in (1, 4) for form in (TRAINING, "fused")]
    assert [way["way"] for way in result["ways"]] == names
    assert [row["way"] for row in result["agreement"]] == names
    assert all(row["equal"] and 0 < row["errors"]["outputs"] for row in result["agreement"])
    assert all(way["milliseconds"]["rounds"] == 3 for way in result["ways"])
    ratios = [(line["of"], line["over"]) for line in result["ratios"]]
    assert ratios == [(f"{TRAINING}, batch {b}", f"fused, batch {b}") for b in (1, 4)]
    assert result["left_out"] == {"absent": "it is not here"}
    assert result["sizes"].keys() == {TRAINING, "fused"}


def test_a_form_that_computes_otherwise_is_not_timed(monkeypatch):
    forms(monkeypatch, wrong=Form(lambda deployed, x, setting: lambda x: 1.001 * deployed(x)))
    with pytest.raises(Unequal, match=r"wrong, batch 1: outputs differ by 1\.0e-03"):
        latency(lambda setting: SMALL, QUICK)


def test_eight_bits_may_be_as_far_from_float64_as_they_are_in_floating_point(monkeypatch):
    """Integers and floats round ties otherwise; a form that is wrong is further."""
    pytest.importorskip("onnxruntime")
    name = "fused, 8 bits, ONNX Runtime"
    form = FORMS[name]
    forms(monkeypatch, **{name: form})
    result = latency(lambda setting: SMALL, QUICK)
    rows = [row for row in result["agreement"] if row["way"].startswith(name)]
    plain = [row for row in result["agreement"] if row["way"].startswith("fused, batch")]
    for row, other in zip(rows, plain, strict=True):
        found, allowed = row["errors"]["outputs"], row["allowed"]["outputs"]
        assert row["equal"] and 1e-4 < found <= allowed < 0.1
        assert found > 100 * other["errors"]["outputs"]
    bytes = {way["way"]: way["file_bytes"] for way in result["ways"]}
    assert bytes[f"{name}, batch 1"] > 0 and bytes["fused, batch 1"] is None

    def doubled(network, x, setting):
        run = form.made(network, x, setting)
        return lambda x: 2 * run(x)

    forms(monkeypatch, **{name: Form(doubled, form.rounded, contiguous=True)})
    with pytest.raises(Unequal, match="8 bits, ONNX Runtime, batch 1: outputs differ"):
        latency(lambda setting: SMALL, QUICK)


@pytest.mark.parametrize("batch, calls", [(1, [1] * 8), (4, [4, 4]), (64, [64])])
def test_a_form_is_compared_on_eight_images_whatever_its_batch(batch, calls):
    """In batches of the size and the layout in which it is timed; ONNX files have one layout."""
    many, seen = torch.randn(max(batch, 8), 3, 4, 4), []

    def run(x):
        seen.append((len(x), x.is_contiguous(memory_format=torch.channels_last)))
        return x.sum((2, 3))

    for layout in (torch.channels_last, torch.contiguous_format):
        like = many[:batch].contiguous(memory_format=layout)
        torch.testing.assert_close(first_of(run, many, like), many[:8].sum((2, 3)))
        assert seen == [(size, layout == torch.channels_last) for size in calls]
        seen.clear()


def test_nothing_at_all_is_not_the_same_as_a_network_that_rounding_has_ruined():
    wanted = torch.tensor([[1.0, 2.0, -2.0]], dtype=torch.float64)
    ruined = torch.tensor([[-1.0, 0.8, -1.0]])  # no nearer to it than nothing at all nearly is
    assert as_far(ruined + 0.1, ruined, wanted)["equal"]
    for other in (0 * ruined, -ruined, ruined.roll(1, 1)):
        assert not as_far(other, ruined, wanted)["equal"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LATENCY)
def test_every_case_runs(name, monkeypatch):
    if name != "latency/repvgg":  # compiling a large network takes minutes
        forms(monkeypatch)
    entry = running.entry_of(LATENCY[name], QUICK)
    assert entry["status"] == "done", entry["reason"]
    done = {way["form"] for way in entry["result"]["ways"]}
    assert done | entry["result"]["left_out"].keys() == {TRAINING, *measured.FORMS}
    assert "fused" in done


def test_it_is_a_command_and_a_file_of_its_own(project, capsys):
    assert main(["latency", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert listed == list(LATENCY) == list(running.chosen(["latency/"], "cpu"))
    assert running.chosen(None, "cpu").keys() <= CASES.keys()
    assert running.file_name("cpu", "latency").startswith("latency-")


# -- the page --------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A measurement of one case, made here, and of one that failed."""

    def absent(*_):
        raise LeftOut("it is <not> here")

    forms(monkeypatch, absent=Form(absent))
    result = latency(lambda setting: SMALL, QUICK)
    stamp = {"code": "c0de", "commit": "abcdef", "finished": "2026-11-21T10:00:00+00:00"}
    done = {"status": "done", "reason": "", "result": result, "seconds": 1.5, "elsewhere": 0.0}
    failed = {"status": "failed", "reason": "not equal: <b>", "result": None, "seconds": 1.0}
    cases = {"latency/repvgg": done | stamp, "latency/mobileone": failed | stamp}
    context = {"device": "cpu", "processor": "A <processor>", "cores": 2, "python": "3.11.7",
               "libraries": {"torch": "2.11.0"}, "system": "Linux", "commit": "abc"}  # fmt: skip
    settings = {"device": "cpu", "tier": "cpu", "threads": 2}
    measurement = {"context": context, "settings": settings, "cases": cases}
    running.write(tmp_path / "latency-a.json", measurement)
    return tmp_path


def test_the_page_shows_what_the_file_says(folder):
    page = Latency(folder)
    result = running.read(folder / "latency-a.json")["cases"]["latency/repvgg"]["result"]
    times = page.times().data
    for way in result["ways"]:
        for part in ("median", "low", "high"):
            assert f'value="{way["milliseconds"][part]!r}"' in times
    for line in result["ratios"]:
        assert f'value="{line["median"]!r}"' in times
    assert "it is &lt;not&gt; here" in times and "<not>" not in times
    sizes = page.sizes().data
    for form in result["sizes"].values():
        assert f'value="{form["parameters"] / 1e6!r}"' in sizes
    assert "not equal: &lt;b&gt;" in page.rest().data and "not run" in page.rest().data
    assert "A &lt;processor&gt;" in page.provenance().data
    (figure,) = page.figures()
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == ["RepVGG-A1 for CIFAR\nfused"]


def test_a_page_without_a_measurement_says_so(tmp_path):
    page = Latency(tmp_path)
    assert "Not measured: <code>make latency</code>" in page.times().data
    assert page.figures() == [] and not re.search(r"\d", page.sizes().data)
