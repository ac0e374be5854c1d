"""Measuring side by side: fair turns, true counts, nothing unequal compared, killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn

from replib.__main__ import main
from replib.benchmark import agreement, loops, running, shapes, steps, subjects, timing
from replib.benchmark.agreement import Unequal
from replib.benchmark.cases import CASES, Case
from replib.benchmark.setting import TIERS, Setting, Subject, images
from replib.benchmark.subjects import BRANCHES, FORMS, LeftOut, Way, stack
from replib.benchmark.targets import (
    MET,
    MISSED,
    TARGETS,
    best_ratio,
    judged,
    least_over_batches,
    number,
)
from replib.blocks import BLOCKS
from replib.networks import outermost_blocks

QUICK = Setting(TIERS["quick"])
TINY = Subject(partial(stack, "repvgg", 4, 1), size=6, batch=4, channels=4)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# -- turns and times ------------------------------------------------------------------------------
@pytest.fixture
def clock(monkeypatch):
    """Every action takes what its list says next; the turns are noted."""
    turns = []

    def seconds_of(action, device, repeats=1):
        turns.append(action.name)
        return action.takes

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    monkeypatch.setattr(timing, "SHORT", -1.0)  # no more rounds than asked for
    return turns


def actions(**takes):
    return {name: SimpleNamespace(name=name, takes=seconds) for name, seconds in takes.items()}


def test_every_round_runs_all_in_another_order(clock):
    found = timing.alternate(actions(a=0.1, b=0.2, c=0.3), device="cpu", rounds=4)
    assert found == {"a": [0.1] * 4, "b": [0.2] * 4, "c": [0.3] * 4}
    rounds = ["".join(clock[i : i + 3]) for i in range(0, len(clock), 3)]
    assert rounds == ["abc", "abc", "abc", "bca", "cab", "abc"]  # two of them warm up


def test_a_long_second_call_is_a_round(clock):
    found = timing.alternate(actions(a=2.0, b=3.0), device="cpu", rounds=4)
    assert len(clock) == 2 * 5 and found["b"] == [3.0] * 4


def test_after_the_deadline_there_is_still_a_spread(clock):
    found = timing.alternate(actions(a=0.1), device="cpu", rounds=9, deadline=0.0)
    assert len(found["a"]) == timing.MIN_ROUNDS == 3


def test_what_is_short_is_repeated_and_done_more_often(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-3)
    timing.alternate({"a": lambda: calls.append(1)}, device="cpu", rounds=3)
    assert len(calls) > 2 + 3 * 3


def test_garbage_waits():
    import gc

    with pytest.raises(KeyError), timing.quiet():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_summaries_are_of_the_rounds():
    line = timing.spread([1.0, 2.0, 3.0, 4.0, 100.0], 1000)
    assert line == {"median": 3000.0, "low": 2000.0, "high": 4000.0, "rounds": 5}
    # A round in which everything is ten times slower changes no ratio.
    assert timing.quotients([2, 4, 60], [1, 2, 30])["median"] == 2.0
    assert timing.quotients([2, 4, 60], [1, 2, 30])["high"] == 2.0
    xs = (2, 4, 8)
    assert timing.slope(xs, [[5 * x**2 for x in xs]] * 2)["median"] == 2.0
    assert abs(timing.slope(xs, [[7.0, 7.0, 7.0]])["median"]) < 1e-12


def test_a_profile_names_operators():
    rows = timing.profile(lambda: torch.ones(64, 64) @ torch.ones(64, 64), "cpu")
    assert any(row["operator"] == "aten::mm" and row["calls"] == 1 for row in rows)
    assert sum(row["share"] for row in rows) <= 1.001


# -- agreement ------------------------------------------------------------------------------------
def gated(model):
    """A shared form with a fault: the side branches count by 1 % too little."""
    for block in outermost_blocks(model).values():
        block.set_rate(0.99)
    return model


def slightly_gated(model):
    """Too little for float32 to see."""
    for block in outermost_blocks(model).values():
        block.set_rate(1 - 1e-5)
    return model


def frozen_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return model


def lost_gradient(model):
    list(model.parameters())[3].requires_grad_(False)
    return model


def not_a_number(model):
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("nan"))
    return model


FAULTS = {
    gated: "outputs",
    slightly_gated: "in float64",
    frozen_statistics: "statistics",
    lost_gradient: "gradients",
    not_a_number: "no number",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.slow
def test_a_ratio_of_unequal_things_is_refused(monkeypatch, fault):
    monkeypatch.setitem(FORMS, "shared", fault)
    ways = [Way("net", BRANCHES), Way("net"), Way("net", BRANCHES, "contiguous")]
    result, times = steps.steps(QUICK, {"net": TINY}, ways)
    wrong, right = ways[1].name, ways[2].name
    assert [row["equal"] for row in result["agreement"]] == [True, False, True]
    refused = [line for line in result["ratios"] if line["over"] == wrong]
    assert len(refused) == 1 and "median" not in refused[0]
    assert FAULTS[fault] in refused[0]["refused"]
    assert wrong not in times and wrong not in [line["way"] for line in result["ways"]]
    assert [line["what"] for line in result["ratios"] if line["over"] == right] == ["time", "saved"]


def test_where_nothing_agrees_there_is_no_result(monkeypatch):
    monkeypatch.setitem(FORMS, "shared", gated)
    with pytest.raises(Unequal, match="outputs differ by"):
        steps.steps(QUICK, {"net": TINY}, [Way("net")])


def test_no_own_error_allows_everything():
    """A reference that float32 cannot follow is no excuse."""
    errors = {"outputs": 0.2}
    assert not agreement.agreement(errors, {"outputs": 1.0}, 1e-7)["equal"]
    assert not agreement.agreement({}, {}, 1e-7)["equal"]
    assert agreement.largest([1.0, float("nan"), 2.0]) != agreement.largest([1.0, 2.0])


def test_a_way_that_is_not_here_is_left_out(monkeypatch):
    monkeypatch.setattr(subjects.importlib.util, "find_spec", lambda name: None)
    ways = [Way("net", BRANCHES), Way("net", "timm repvgg_a0"), Way("net", mode="cudagraphs")]
    result, _ = steps.steps(QUICK, {"net": TINY}, ways)
    reasons = result["left_out"].values()
    assert any("timm is not installed" in reason for reason in reasons) and len(reasons) == 2


def test_steps_leave_the_weights_alone():
    """Otherwise the ways drift apart, and slow down in denormal numbers."""
    reference = TINY.make()
    x, labels = images(QUICK, 4, 4, 6)
    run = steps.running(Way("net"), reference, x, labels, "cpu")
    for _ in range(3):
        run()
    for ours, theirs in zip(run.model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.grad is not None


@pytest.mark.parametrize("block", ["dbb", "orepa"])
@pytest.mark.parametrize("form", [BRANCHES, "shared", "unsqueezed"])
def test_what_is_saved_can_be_counted_without_computing(block, form):
    reference = stack(block, 4, 1)
    x, labels = images(QUICK, 4, 4, 6)
    run = steps.running(Way("net", form), reference, x, labels, "cpu")
    assert run.saved() == run.saved_for(x, labels) > 0
    assert run.saved_for(torch.cat([x, x]), torch.cat([labels, labels])) > run.saved()


def test_the_two_loops_train_alike(monkeypatch):
    assert loops.same_training(8)["equal"]
    monkeypatch.setattr(loops, "derive", lambda *names: 1)  # another order of images
    assert not loops.same_training(8)["equal"]


# -- cases ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a1/dbb", "deployed/a1", "cycle", "machine"])
@pytest.mark.slow
def test_a_case_runs(name):
    entry = running.entry_of(CASES[name], QUICK)
    assert entry["status"] == "done", entry["reason"]
    result = entry["result"]
    assert all(row["equal"] for row in result.get("agreement", []))
    assert all("median" in line for line in result.get("ratios", []))
    assert result.get("ratios") or result.get("numbers")


FAMILIES = [n for n in CASES if n.startswith(("a1/", "resnet18/")) and n.split("/")[1] in BLOCKS]
ENOUGH = ("a1/repvgg", "a1/orepa", "a1/csla", "resnet18/dbb", "resnet18/orepa_1x1")  # all are alike


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in CASES.items()
        if "quick" in case.seconds and (name not in FAMILIES or name in ENOUGH)
        # Minutes: the first is growth/batch on another network, the second another block.
        if name not in ("crossover", "resnet18/orepa-full")
    ],
)
def test_every_case_runs(name, monkeypatch):
    monkeypatch.setattr(timing, "SHORT", -1.0)  # no more rounds than asked for
    shared = os.environ.get("REPLIB_SHARED", ROOT.parent / "shared")
    entry = running.entry_of(CASES[name], replace(QUICK, vectors=shared / "vectors"))
    assert entry["status"] in ("done", "left out"), entry["reason"]


def test_the_reference_is_held_against_official_numbers(tmp_path):
    with pytest.raises(LeftOut):
        steps.vectors(QUICK)
    with pytest.raises(Unequal):  # a folder without a number proves nothing
        steps.vectors(replace(QUICK, vectors=tmp_path))


def failing(error):
    def run(setting):
        raise error

    return Case("fails", "fails", run, {"quick": 1})


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (LeftOut("no such thing"), "left out", "no such thing"),
        (Unequal("outputs differ"), "failed", "not equal: outputs differ"),
        (ValueError("in /a/path/of/mine.py\nand more"), "failed", "ValueError: in ... and more"),
    ],
)
def test_what_goes_wrong_is_recorded_in_one_line(error, status, reason):
    assert running.entry_of(failing(error), QUICK) == {"status": status, "reason": reason}


def test_a_number_that_is_none_is_a_failure():
    case = Case("nan", "nan", lambda setting: {"numbers": {"x": float("nan")}}, {"quick": 1})
    assert running.entry_of(case, QUICK)["status"] == "failed"


# -- the file -------------------------------------------------------------------------------------
@pytest.fixture
def cases(monkeypatch):
    """Three cases that run in this process; the list of what has run."""
    ran = []

    def one(case, where, *options):
        ran.append(case.id)
        case.run(None)
        return {"status": "done", "reason": "", "result": {}, "seconds": 1.0, "elsewhere": 0.0}

    made = {n: Case(n, n, lambda setting: None, {"quick": 1}) for n in ("one", "two", "three")}
    monkeypatch.setattr(running, "CASES", made)
    monkeypatch.setattr(running, "one", one)
    return SimpleNamespace(made=made, ran=ran)


def measured(path, **options):
    options = {"tier": "quick", "say": lambda text: None} | options
    return running.measure(path, **options)


def test_killed_it_goes_on(cases, tmp_path):
    path = tmp_path / "bench.json"

    def killed(setting):
        raise KeyboardInterrupt

    whole = cases.made["two"]
    cases.made["two"] = replace(whole, run=killed)
    with pytest.raises(KeyboardInterrupt):
        measured(path)
    assert list(running.read(path)["cases"]) == ["one"]
    cases.made["two"] = whole
    found = measured(path)
    assert cases.ran == ["one", "two", "two", "three"]
    assert running.read(path) == found and set(found["cases"]) == {"one", "two", "three"}
    assert not list(tmp_path.glob(".*"))


def test_a_case_of_other_code_is_measured_again_and_others_stay(cases, tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    measured(path)
    monkeypatch.setattr(running, "code", lambda: "other")
    found = measured(path, cases=["two"])
    assert cases.ran == ["one", "two", "three", "two"]
    assert [found["cases"][n]["code"] == "other" for n in ("one", "two", "three")] == [0, 1, 0]
    measured(path, fresh=True, cases=["two"])
    assert cases.ran[-1] == "two" and len(cases.ran) == 5


def test_a_file_of_another_machine_is_started_anew(cases, tmp_path):
    path = tmp_path / "bench.json"
    found = measured(path)
    found["context"]["processor"] = "another"
    running.write(path, found)
    measured(path, cases=["one"])
    assert list(running.read(path)["cases"]) == ["one"]


def test_what_does_not_fit_is_said_and_tried_again(cases, tmp_path):
    path, said = tmp_path / "bench.json", []
    found = measured(path, budget_seconds=1, say=said.append)
    assert cases.ran == [] and {e["status"] for e in found["cases"].values()} == {"out of time"}
    assert any("out of time" in line for line in said)
    measured(path)
    assert cases.ran == ["one", "two", "three"]


def test_a_failure_does_not_stop_the_rest(cases, tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    fine = running.one

    def one(case, *options):
        done = fine(case, *options)
        return done | {"status": "failed", "reason": "why"} if case.id == "one" else done

    monkeypatch.setattr(running, "one", one)
    assert running.main("cpu", path, quick=True, threads=1) == 1
    assert len(cases.ran) == 3
    measured(path, threads=1)
    assert cases.ran[3:] == ["one"]  # a failed case is tried again


def test_a_damaged_file_is_told(tmp_path, project):
    path = tmp_path / "bench-x.json"
    path.write_text("{}")
    with pytest.raises(running.UserError, match="is no measurement of speed"):
        running.read(path)


# -- the command ----------------------------------------------------------------------------------
def test_list_names_every_case(project, capsys):
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    listed = {line.split()[0] for line in out.splitlines()[:-1]}
    assert listed == {name for name, case in CASES.items() if "cpu" in case.seconds}


@pytest.mark.parametrize(
    "options, said",
    [
        (["--cases", "a1/nothing"], "cases: 'a1/nothing' is none of the cpu tier"),
        (["--device", "gpu"], "device (='gpu') is not on this machine"),
        (["--budget-seconds", "0"], "--budget-seconds (=0.0) must be a number above 0"),
    ],
)
def test_mistakes_are_told_in_one_line(project, capsys, options, said):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"replib: {said}") and error.count("\n") == 1


def test_all_cases_have_a_place_in_the_time():
    for case in CASES.values():
        assert case.seconds and set(case.seconds) <= set(TIERS)


BARE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "papermill", "matplotlib", "timm", "pandas", "yaml",
                                  "sklearn", "scipy", "tqdm", "safetensors", "seaborn", "IPython"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from replib.__main__ import main
"""


@pytest.mark.slow
def test_torch_is_all_that_measuring_needs(project):
    code = f"{BARE}\nsys.exit(main(['bench', '--quick', '--list']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=project.environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "a1/repvgg" in done.stdout


# -- processes ------------------------------------------------------------------------------------
def dies(*arguments):
    os.kill(os.getpid(), signal.SIGSEGV)


def sleeps(*arguments):
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize(
    "does, left, status, reason",
    [
        (dies, 600, "failed", "its process ended with status -11"),
        (sleeps, 3, "out of time", "stopped after 3 s"),
    ],
)
def test_a_process_that_dies_or_hangs_is_recorded(monkeypatch, does, left, status, reason):
    monkeypatch.setattr(running, "child", does)
    where = {"device": "cpu", "tier": "quick", "threads": 1}
    entry = running.one(CASES["machine"], where, left=left)
    assert (entry["status"], entry["reason"], entry["result"]) == (status, reason, None)


@pytest.mark.slow
def test_a_real_kill(project, tmp_path):
    out = tmp_path / "bench.json"
    command = ["bench", "--quick", "--threads", "1", "--out", str(out)]
    command += ["--cases", "machine", "a1/dbb", "a1/repvgg"]
    process = project.start(*command)
    while not out.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    first = running.read(out)["cases"]
    assert 0 < len(first) < 3
    status, _, error = project.run(*command)
    assert (status, error) == (0, "")
    cases = running.read(out)["cases"]
    assert len(cases) == 3 and all(cases[name] == entry for name, entry in first.items())


# -- targets --------------------------------------------------------------------------------------
def target(name):
    return next(target for target in TARGETS if target.id == name)


def cycle_measurement(value, status="done", tier="cpu"):
    line = {"of": "merge, redraw, restore", "over": "training step", "what": "time"}
    entry = {"status": status, "reason": "why", "result": {"ratios": [line | value]}}
    return {"settings": {"tier": tier}, "cases": {"cycle": entry}}


@pytest.mark.parametrize(
    "value, more, verdict",
    [
        ({"median": 0.4}, {}, MET),
        ({"median": 1.0}, {}, MET),
        ({"median": 1.2}, {}, MISSED),
        ({"refused": "outputs differ"}, {}, "not measured: outputs differ"),
        ({"median": 0.4}, {"status": "failed"}, "not measured: cycle failed: why"),
        ({"median": 0.4}, {"tier": "quick"}, "not measured: the quick tier only shows"),
        ({"median": 0.4}, {"tier": "cuda"}, "not measured here (is of a processor)"),
    ],
)
def test_verdicts(value, more, verdict):
    assert judged(target("cycle"), cycle_measurement(value, **more)).text.startswith(verdict)


def test_a_target_without_its_machine_or_case():
    empty = {"settings": {"tier": "cpu"}, "cases": {}}
    assert judged(target("gpu-packed"), empty).text == "not measured here (needs a GPU)"
    assert judged(target("cycle"), empty).text == "not measured: cycle not run"


def test_the_worst_family_decides():
    cases = {}
    for case in target("none-slower").cases:
        name = case.split("/")[1]
        line = {"of": Way(name, BRANCHES).name, "over": Way(name).name, "what": "time"}
        result = {"ratios": [line | {"median": 0.9 if name == "acb" else 1.3}]}
        cases[case] = {"status": "done", "reason": "", "result": result}
    verdict = judged(target("none-slower"), {"settings": {"tier": "cpu"}, "cases": cases})
    assert (verdict.text, verdict.found.by, verdict.found.value) == (MISSED, "acb", 0.9)


def line(of, over, median, what="time"):
    return {"of": of, "over": over, "what": what, "median": median}


@pytest.mark.parametrize(
    "find, results, expected",
    [
        (
            least_over_batches("dbb", "shared", "time"),
            {"crossover": {"ratios": [line("dbb 8, shared", "orepa 8", 2.0),
                line("dbb 64, shared", "orepa 64", 1.5), line("dbb 64, shared", "plain", 0.5),
                line("dbb 64, shared", "orepa 64", 0.7, "saved"),
                line("dbb 64, branches", "orepa 64", 0.4)]}},
            1.5,
        ),
        (
            best_ratio("1 process"),
            {"packed": {"ratios": [line("2 processes", "1 process", 1.4),
                line("2 processes", "streams", 9.0)]},
             "packed/graphs": {"ratios": [line("4 processes", "1 process", 2.2)]}},
            2.2,
        ),
        *(
            (
                number("share", "rate, %", begin="plain", largest=largest),
                {"share": {"numbers": {"plain 8: rate, %": {"median": 30.0},
                    "plain 64: rate, %": {"median": 40.0}, "dbb: rate, %": {"median": 99.0},
                    "plain 64: seconds": {"median": 1.0}}}},
                expected,
            )
            for largest, expected in ((True, 40.0), (False, 30.0))
        ),
    ],
)  # fmt: skip
def test_the_number_that_a_target_asks_for_is_found(find, results, expected):
    assert find(results).value == expected


def test_targets_name_cases_and_ways_that_exist():
    """A target on a number that no case makes would stay silent for ever."""
    for one in TARGETS:
        for case in (*one.cases, *one.more):
            assert one.device in CASES[case].seconds, one.id


@pytest.mark.parametrize("values, verdict", [((1.5, 1.7), MET), ((1.5, 1.4), MISSED)])
def test_the_fastest_form_decides(values, verdict):
    lines = [
        {"of": Way("repvgg", BRANCHES, "contiguous").name, "over": way.name, "what": "time"}
        for way in (Way("repvgg"), Way("repvgg", mode="default"))
    ]
    ratios = [line | {"median": value} for line, value in zip(lines, values, strict=True)]
    entry = {"status": "done", "reason": "", "result": {"ratios": ratios}}
    found = judged(
        target("a1-repvgg"), {"settings": {"tier": "cpu"}, "cases": {"a1/repvgg": entry}}
    )
    assert (found.text, found.found.value) == (verdict, max(values))


def test_the_limit_is_what_is_left_without_all_but_products():
    times = {"slow": 200.0, "fast": 100.0}
    rows = [("aten::mkldnn_convolution", 0.5), ("aten::mul", 0.3), ("aten::addmm", 0.125)]
    result = {
        "ways": [{"way": way, "milliseconds": {"median": t}} for way, t in times.items()],
        "profiles": {"fast": [{"operator": name, "share": share} for name, share in rows]},
    }
    assert steps.limits(result) == {"fast": {"products_ms": 62.5, "times": 3.2, "over": "slow"}}
    assert steps.limits(result | {"ways": []}) == {}


@pytest.mark.parametrize("error, equal", [(0.009, True), (0.011, False)])
def test_one_relu_on_the_other_side_is_no_disagreement(error, equal):
    """The reference met none, and is far better than the bound; outputs have no such excuse."""
    own = {"outputs": 1e-7, "gradients": 1e-6}
    found = agreement.agreement({"outputs": 1e-7, "gradients": error}, own, 2**-23)
    assert found["equal"] == equal
    assert not agreement.agreement({"outputs": error, "gradients": 0.0}, own, 2**-23)["equal"]


# -- RepVGG's own measurements --------------------------------------------------------------------
def test_a_shortcut_keeps_one_map_more():
    """By hand: a layer has its input and its output; a shortcut keeps what is added later."""
    numbers = shapes.shortcut(QUICK)["numbers"]
    found = {name: line["median"] for name, line in numbers.items()}
    assert found == {
        "plain: maps at once, between layers": 1,
        "plain: maps at once, within a layer": 2,
        "residual: maps at once, between layers": 2,
        "residual: maps at once, within a layer": 3,
    }
    layer, x = nn.Conv2d(2, 2, 3, padding=1), torch.randn(1, 2, 4, 4)
    assert torch.equal(shapes.Residual(layer)(x), layer(x) + x)


def test_what_is_still_used_is_counted_and_what_is_not_is_not():
    with shapes.Watched() as watched:
        kept = torch.ones(10)
        view = kept.view(5, 2)
        del kept  # the view still holds it
        torch.ones(1000)
        more = torch.ones(20)
        torch.ones(1)
        del more
        last = torch.ones(1)  # after the most that there was between two operations
    assert watched.between == 4 * 30 and watched.within == 4 * 1010
    assert watched.there() == 4 * 11 and view.numel() + last.numel() == 11


def test_kernel_sizes_do_the_operations_that_torch_counts(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(timing, "SHORT", -1.0)  # no more rounds than asked for
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)
    shape = images, channels, side = 2, 3, 7
    for size in shapes.SIZES:
        conv = nn.Conv2d(channels, channels, size, padding=size // 2)
        with FlopCounterMode(display=False) as counter:
            conv(torch.zeros(images, channels, side, side))
        assert shapes.operations(shape, size) == counter.get_total_flops()
    found = shapes.kernel_sizes(QUICK)
    gflop = {way["way"]: way["gflop"] for way in found["ways"]}
    assert [gflop[f"{k} × {k}"] / gflop["1 × 1"] for k in shapes.SIZES] == pytest.approx(
        [1, 9, 25, 49], rel=1e-3
    )
    assert [(r["of"], r["over"]) for r in found["ratios"]] == [
        (f"{k} × {k}", "1 × 1") for k in shapes.SIZES[1:]
    ]
    assert len(found["numbers"]) == len(shapes.SIZES)
