"""A report is one file that opens offline, shows what evidence there is, and is whole or old."""

import html.parser
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, Project, at_home
from PIL import Image

from replib.__main__ import main
from replib.errors import UserError
from replib.experiments.cells import new_model
from replib.experiments.executor import Outcome, run_plan
from replib.report import render
from replib.report.page import NONE, Page, number
from replib.report.results import Results
from replib.training import data, loop

EVIL = '<script>alert(1)</script> "$x_{$" & <img src="http://evil.example/x.png">'
CELLS, ROWS = 6, 5


class Reader(html.parser.HTMLParser):
    """Everything of a page that a browser would act on."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)

    def all(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


def with_evil_strings(project: Project) -> None:
    """The table `evil9`: the very cells of `tiny9`, with hostile words for people to read."""
    text = TINY.replace('title: "Tiny"', f"title: '{EVIL}'")
    text = text.replace('question: "Does', f"question: '{EVIL}' # ")
    text = text.replace('label: "Control"', f"label: '{EVIL}'").replace(
        "proxy:", f"claims:\n- {{text: '{EVIL}', source: '{EVIL}', confidence: read}}\nproxy:"
    )
    text = text.replace(
        "control: control", "method: '## A *way*, <script>1 & 2</script>'\ncontrol: control"
    )
    assert text.count("<script>") == 6
    project.table("evil9", text)


@pytest.fixture(scope="module")
def page(shared_project) -> Path:
    """The report of `evil9`, made by the command line; its cells are there already."""
    with_evil_strings(shared_project)
    status, out, error = shared_project.run("reproduce", "evil9", "--profile", "tiny")
    assert (status, error) == (0, ""), error
    assert f"0 cells trained, {CELLS} were there" in out
    made = shared_project.folder / "reports" / "evil9-tiny.html"
    assert out.rstrip().endswith(str(made))
    return made


@pytest.fixture
def home(shared_project, monkeypatch) -> Project:
    """The shared project as this process's own."""
    monkeypatch.setenv("REPLIB_HOME", str(shared_project.folder))
    return shared_project


def offline(path: Path) -> Reader:
    """A page that requests nothing and runs nothing."""
    text = path.read_text(encoding="utf-8")
    reader = Reader(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {*reader.tags}
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    addresses = reader.all("src", "href", "srcset", "data", "poster", "action")
    styles = "\n".join([*re.findall(r"<style.*?</style>", text, re.S), *reader.all("style")])
    addresses += re.findall(r"url\(\s*['\"]?([^)'\"]*)", styles)
    assert "@import" not in styles
    outside = [a for a in addresses if re.match(r"\s*([a-z+.-]+:|//)", a, re.I)]
    assert [a[:80] for a in outside if not a.startswith("data:image/png;base64,")] == []
    return reader


@pytest.mark.slow
def test_pages_request_nothing(page):
    offline(page)
    offline(page.with_name("index.html"))


def test_the_page_shows_everything(page, home):
    reader, text = offline(page), page.read_text(encoding="utf-8")
    words = " ".join(reader.text)
    assert len([s for s in reader.all("src") if s.startswith("data:image/png;base64,")]) >= 2
    assert "A <em>way</em>, &lt;script&gt;1 &amp; 2" in text
    assert reader.tags.count("table") >= 3 and "95 %" in words
    for expected in ("verdict", "not comparable", "accuracy", "deployed FLOPs", "commit", "torch"):
        assert expected in words, expected
    assert "make reproduce-evil9 PROFILE=tiny" in words
    for label in ("Base", "Official", "Preserving"):
        assert text.count(f"<b>{label}</b>") >= 2, label
    assert "Teacher</b>" not in text, "hidden rows are not on the page"
    for key in Results("evil9", "tiny").plan.cells:
        assert f"<code>{key[:16]}</code>" in text


def test_the_network_of_every_row_and_what_its_cycles_keep(home):
    plain = Page("tiny9", "tiny")
    assert plain.network("control") == "digits, repvgg" and plain.kept == []
    wide = Page("table2", "bodies", ["seeds=[0]"])
    assert wide.network("dbb_official") == "cifar_resnet18, width × 0.125, dbb"
    assert wide.families == ["repvgg", "dbb", "acb"]
    own, key = plain.results.own, plain.results.plan.by_row["control", 0]
    found = dict(own[key])
    kept = {"stem": "has no side branches", "last": "has no side branches", "x": "was not chosen"}
    found["result"] = found["result"] | {"kept_blocks": kept}
    plain.results.__dict__["own"] = own | {key: found}
    label = plain.table.rows["control"].label
    assert plain.kept == [
        f"Blocks that the cycle leaves as they are: 2 (has no side branches), in {label}.",
        f"Blocks that the cycle leaves as they are: 1 (was not chosen), in {label}.",
    ]
    assert plain.kept[0] in plain.said().data


def test_what_users_write_is_shown_as_text(page):
    reader, text = offline(page), page.read_text(encoding="utf-8")
    assert "".join(reader.text).count(EVIL) >= 5, "title twice, question, label, claim"
    assert "<script>" not in text and "evil.example" not in "".join(reader.all("src", "href"))


def test_the_warning_comes_first(page):
    body = page.read_text(encoding="utf-8").partition("<body")[2]
    assert body.index("says nothing about CIFAR") < body.index("<h1")


def test_links_lead_to_files(page):
    for made in (page, page.with_name("index.html")):
        links = [link for link in offline(made).all("href") if not link.startswith("#")]
        for link in links:
            assert (made.parent / link).is_file(), link
    evidence = [link for link in offline(page).all("href") if link.endswith("result.json")]
    assert len(set(evidence)) == CELLS
    assert page.name in offline(page.with_name("index.html")).all("href")


@pytest.mark.slow
def test_a_mistake_in_the_notebook_leaves_the_old_page(page, home, capfd):
    """Data that only the notebook's kernel looks for: one line, and the old page stays."""
    before, files = page.read_bytes(), sorted(page.parent.iterdir())
    settings = ["--set", "cell.data=imagefolder", "--set", "cell.data_dir=nowhere"]
    assert main(["reproduce", "evil9", "--profile", "tiny", *settings]) == 2
    error = capfd.readouterr().err
    assert error.startswith("replib: ") and error.count("\n") == 1, error
    assert "nowhere" in error
    assert page.read_bytes() == before and sorted(page.parent.iterdir()) == files


@pytest.mark.slow
def test_a_failing_notebook_leaves_the_old_page(page, home):
    before, files = page.read_bytes(), sorted(page.parent.iterdir())
    notebook = home.folder / "notebooks" / "table.ipynb"
    whole = notebook.read_text()
    notebook.write_text(whole.replace('"page.summary()"', '"1 / 0"'))
    try:
        assert notebook.read_text() != whole
        status, _, error = home.run("reproduce", "evil9", "--profile", "tiny")
    finally:
        notebook.write_text(whole)
    assert status == 2 and error.count("\n") == 1 and "ZeroDivisionError" in error, error
    assert page.read_bytes() == before and sorted(page.parent.iterdir()) == files


def test_tables_are_trained_together(home, monkeypatch):
    """A cell that two tables share is trained once, and its parents come before it."""
    home.table("tiny8", TINY.replace("seeds: [0]", "seeds: [0, 1]"))
    asked, rendered = [], []

    def run_plan(plan, store, **options):
        asked.append(plan)
        return Outcome(0, 0, 0)

    monkeypatch.setattr(render, "run_plan", run_plan)
    monkeypatch.setattr(render, "reproduce", lambda name, *_, **__: rendered.append(name))
    names = ["tiny9", "tiny8"]
    assert len(list(render.reproduce_all(names, "tiny", []))) == 2 and rendered == names
    (plan,) = asked
    assert len(plan.cells) == 2 * CELLS
    keys = list(plan.cells)
    for key, planned in plan.cells.items():
        assert all(keys.index(parent) < keys.index(key) for parent in planned.parents.values())


# -- what a page shows, without a notebook -------------------------------------------------------
@pytest.mark.slow
def test_reports_renders_what_has_evidence_and_nothing_else(home, monkeypatch, capfd):
    asked = []
    monkeypatch.setattr(render, "cores", lambda: 1)  # here, where what is asked for is seen
    monkeypatch.setattr(render, "reproduce", lambda *what, here: asked.append(what) or what)
    monkeypatch.setenv("REPLIB_TRAIN", "1")
    assert main(["reports"]) == 0
    assert ("tiny9", "tiny", []) in asked and not [w for w in asked if w[0] == "table2"]
    assert os.environ["REPLIB_TRAIN"] == "0", "what the notebook's train cell looks at"


AWAY = """
title: Away
question: Is it shown?
control: plain
seeds: [0]
cell: {data: imagefolder, data_dir: data/away, body: digits, block: repvgg, epochs: 1,
       batch_size: 4, learning_rate: 0.1, train_images: 12, held_out: 4, views: [upside_down]}
rows:
  plain: {label: Plain, set: {block: convbn}}
  repvgg: {label: Branches}
  later: {label: Later, set: {epochs: 2}}
"""


def test_published_evidence_is_shown_where_its_data_are_not(tmp_path, monkeypatch):
    """As in a fresh clone, where nothing is trained; with a row that has not been run."""
    with at_home(tmp_path, {"away9": AWAY}) as made:
        pictures = made.folder / "data" / "away"
        for i in range(24):
            path = pictures / ("train" if i < 16 else "test") / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw = torch.randint(256, (8, 8, 3), dtype=torch.uint8)
            Image.fromarray(draw.numpy()).save(path)
        results = Results("away9", "tiny")
        for row in ("plain", "repvgg"):
            key = results.plan.by_row[row, 0]
            run_plan(results.plan.of([key]), results.store, device="cpu")
            results.store.publish(key)
        found = results.accuracy("repvgg").mean
        shutil.rmtree(results.store.runs)
        shutil.rmtree(pictures)
        data.load.cache_clear()
        with pytest.raises(UserError, match="data_dir"):
            Page("away9", "tiny")
        monkeypatch.setenv("REPLIB_TRAIN", "0")
        page = Page("away9", "tiny")
        assert "shown without its data" in page.intro().data
        assert f"{found:.2f}" in page.summary().data and "not run" in page.summary().data
        assert "upside down" in page.views().data and page.pruning().data == ""
        assert page.training_parameters("later") == page.network("later") == NONE
        assert "digits, repvgg" in page.costs().data
        assert "<svg" in page.block().data and "<svg" in page.kernels().data
        assert key[:16] in page.provenance().data and page.train() is None
        with pytest.raises(UserError, match="data_dir"):
            Page("away9", "tiny", ["seeds=[0, 1]"])
        for path in results.store.published.glob("*.json"):
            path.unlink()
        with pytest.raises(UserError, match="data_dir"):
            Page("away9", "tiny")


def test_what_the_paper_has_stands_beside_what_was_found(home):
    plain = Page("tiny9", "tiny")
    assert "in the paper" not in plain.summary().data and plain.views().data == ""
    stated = Page("tiny9", "tiny", ["rows.official.paper=dbb/table4/linear_dbb/top1"])
    shown = stated.summary().data
    assert "<th>in the paper, %</th>" in shown and shown.count("<td>70.12</td>") == 1
    assert shown.count("</th>") == plain.summary().data.count("</th>") + 1
    turned = "{row: acnet/table4/resnet_18_base, views: {upside_down: updown_flip}}"
    turned = f"rows.official.paper={turned}"
    views = Page("tiny9", "tiny", ["cell.views=[upside_down]", turned]).views().data
    assert "upside down, %" in views and views.count("<td>41.86</td>") == 1


def test_the_table_of_costs_says_how_many_numbers_are_trained(home, monkeypatch):
    page = Page("tiny9", "tiny")
    model = new_model(page.cell("control"))
    found = number(sum(parameter.numel() for parameter in model.parameters()))
    assert page.training_parameters("control") == found in page.costs().data
    grown = {
        seed: {"result": {"history": {"training_parameters": sizes}}}
        for seed, sizes in enumerate(([7, 9], [8, 7]))
    }
    monkeypatch.setattr(page.results, "evidence", lambda row, source: grown)
    assert page.training_parameters("control") == "7 to 9"
    changed = "{block: dbb, block_options: {without: [avg]}}"
    rows = ("base", "control", "official", "preserving", "distilled")
    settings = [f"rows.{row}.set={changed}" for row in rows]
    other = Page("tiny9", "tiny", settings)
    assert other.network("control") == "digits, dbb, without = ['avg']"


def test_without_training_the_train_cell_trains_nothing(project, monkeypatch):
    project.table("tiny9", TINY)
    monkeypatch.setenv("REPLIB_TRAIN", "0")
    empty = Page("tiny9", "tiny")
    empty.train()
    assert not empty.results.store.runs.exists()
    for part in (empty.intro, empty.summary, empty.said, empty.costs, empty.provenance):
        assert part().data, "a page without evidence still has its parts"


def test_published_evidence_stands_beside_our_own(home):
    forget_published(home)  # of other files' tests
    before = Page("tiny9", "tiny").summary().data
    assert "published" not in before
    page = Page("tiny9", "tiny")
    for key in page.results.plan.cells:
        page.results.store.publish(key)
    try:
        page = Page("tiny9", "tiny")
        shown, own = page.summary().data, page.results.accuracy("control")
        assert "<th>published</th>" in shown
        assert shown.count(f"{own.mean:.2f}") > before.count(f"{own.mean:.2f}")
        assert page.provenance().data.count(">published</a>") == CELLS
        assert page.results.stale == []
    finally:
        forget_published(home)


def test_published_evidence_of_an_older_version_is_stale(home, monkeypatch):
    results = Results("tiny9", "tiny")
    for key in results.plan.cells:
        results.store.publish(key)
    try:
        monkeypatch.setattr(loop, "VERSION", loop.VERSION + 1)
        newer = Page("tiny9", "tiny")
        assert not newer.results.own and not newer.results.published
        assert len(newer.results.stale) == CELLS
        assert f"{CELLS} published results" in newer.summary().data
        assert "older version" in newer.summary().data
    finally:
        forget_published(home)


def forget_published(project: Project) -> None:
    """As it was: nothing is published in the shared project."""
    for path in (project.folder / "reports" / "evidence").glob("*.json"):
        path.unlink()


def test_the_numbers_of_the_page_are_those_of_the_evidence(home):
    results = Results("tiny9", "tiny")
    frame = results.frame()
    assert len(frame) == ROWS
    for row in frame.index:
        (evidence,) = results.evidence(row).values()
        deployed, compute = evidence["result"]["deployed"], evidence["result"]["compute"]
        assert frame.loc[row, "accuracy"] == pytest.approx(100 * deployed["test_accuracy"])
        parents = 0 if row == "base" else 4  # the epochs of the row it starts from
        assert frame.loc[row, "epochs"] == compute["epochs"] + parents
        gain = frame.loc[row, "accuracy"] - frame.loc["control", "accuracy"]
        assert row == "control" or frame.loc[row, "gain"] == pytest.approx(gain)


@pytest.mark.slow
def test_the_whole_way_from_nothing(project):
    """`make reproduce-ID` trains and renders; `make reports` renders and trains nothing."""
    shutil.rmtree(project.folder / "params")
    project.table("tiny9", TINY)
    status, out, error = project.run("reproduce", "tiny9", "--profile", "tiny")
    assert (status, error) == (0, ""), error
    assert f"{CELLS} cells trained" in out
    results = Results("tiny9", "tiny")
    lost = results.store.own_path(results.plan.by_row["official", 0])
    lost.unlink()
    status, out, error = project.run("reports")
    assert (status, error) == (0, ""), error
    assert not lost.exists() and "cells trained" not in out
    offline(project.folder / "reports" / "tiny9-tiny.html")
