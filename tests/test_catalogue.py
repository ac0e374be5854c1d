"""The catalogue: whole, what it names exists, and nothing but its read numbers is ever shown."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import CONTEXT, ROOT, TINY, whole
from test_report import offline

from replib.__main__ import main
from replib.errors import UserError
from replib.experiments.cells import key_of, versions_of
from replib.experiments.params import Cell, Paper, load_table
from replib.experiments.store import Store
from replib.report import page as page_module
from replib.report import render
from replib.report.catalogue import (
    KINDS,
    catalogue,
    item_of,
    number,
    numbers,
    read,
    uncatalogued,
)
from replib.report.notebooks import notebooks
from replib.report.page import NONE, Page
from replib.report.page import number as shown
from replib.report.results import Results, profiles
from replib.report.standing import Evidence, Recorded, Standings, catalogue_counts

ITEMS = {
    f"{name}/{key}": item for name, work in catalogue().items() for key, item in work.items.items()
}


def cells():
    """(reference, column, value, confidence) of the whole catalogue."""
    for reference, item in ITEMS.items():
        for row in item.rows:
            for column in item.columns:
                value = item.rows[row].get(column)
                yield f"{reference}/{row}", column, value, item.confidence_of(row, column)


def readable(value: object, confidence: str) -> bool:
    return confidence == "read" and type(value) in (int, float)


# -- what is in it ---------------------------------------------------------------------------------
def test_what_an_item_names_is_here():
    tables, own = profiles(), {path.stem for path in ROOT.glob("notebooks/*.ipynb")}
    for reference, item in ITEMS.items():
        for entry in item.here:
            name, *profile = entry.split("/")
            assert name in tables or name in own, (reference, entry)
            assert set(profile) <= set(tables.get(name, ())), (reference, entry)
        trained = [entry for entry in item.here if entry.split("/")[0] in tables]
        assert trained or item.kind or not item.here, f"{reference}: nothing gives it a verdict"


def test_every_table_and_notebook_is_in_the_catalogue(project):
    """Of a paper, or as ours."""
    assert uncatalogued([*profiles(), *notebooks()]) == []
    project.table("tiny9", TINY)
    assert uncatalogued([*profiles(), *notebooks()]) == ["tiny9"]


def test_every_paper_says_where_it_is_and_ours_is_last():
    works = catalogue()
    assert [name for name, work in works.items() if work.year is None] == ["ours"] == [*works][-1:]
    assert all(work.links for work in works.values() if work.year is not None)
    for pruning in ("csgd", "aofp", "gsm"):
        assert [item.not_implemented is None for item in works[pruning].items.values()] == [False]


def test_numbers_have_a_source():
    for reference, item in ITEMS.items():
        given = any(readable(item.rows[r].get(c), item.confidence_of(r, c))
                    for r in item.rows for c in item.columns)  # fmt: skip
        assert item.source or not given, reference


# -- only what was read is given out ---------------------------------------------------------------
def test_a_number_is_given_out_if_and_only_if_it_was_read():
    given = refused = 0
    for reference, column, value, confidence in cells():
        if readable(value, confidence):
            assert number(reference, column) == value
            given += 1
        else:
            with pytest.raises(UserError, match="not to be shown"):
                number(reference, column)
            refused += 1
    assert given > 700 and refused > 100


@pytest.mark.parametrize(
    "reference, named",
    [
        ("dbb/table2/imagenet_alexnet", ["expected PAPER/ITEM/ROW/COLUMN"]),
        ("70.99", ["expected PAPER/ITEM/ROW/COLUMN"]),
        ("dbd/table2/imagenet_alexnet/dbb", ["no paper 'dbd'", "acnet", "dbb"]),
        ("../table2/imagenet_alexnet/dbb", ["no paper '..'"]),
        ("dbb/table9/imagenet_alexnet/dbb", ["no item 'table9'", "table4"]),
        ("dbb/table2/imagenet_alex/dbb", ["no row 'imagenet_alex'", "imagenet_alexnet"]),
        ("dbb/table2/imagenet_alexnet/dbd", ["no column 'dbd'", "original"]),
        ("dbb/table2/imagenet_alexnet/model", ["'AlexNet'", "not to be shown"]),
        ("dbb/table2/imagenet_alexnet/dbb_std", ["None", "not to be shown"]),
        ("dbb/table4/dbb/b_1x1", ["True", "not to be shown"]),
        ("dyrep/cifar_vgg16/origin/cifar10_top1", ["94.68", "recalled", "not to be shown"]),
        ("repan/cifar_main/cifar_10_repvgg_a1/gain", ["None", "unknown", "not to be shown"]),
    ],
)
def test_a_slip_is_refused_in_one_line(reference, named):
    with pytest.raises(UserError) as caught:
        numbers(Paper.model_validate(reference))
    line = str(caught.value)
    assert f"paper (={reference})" in line and all(text in line for text in named), line


def test_a_slip_of_a_row_is_told_by_every_command(home, capfd):
    setting = ["--set", "rows.official.paper=dyrep/cifar_vgg16/origin/cifar10_top1"]
    for command in ("run", "figure --out none.png", "publish"):
        name, *options = command.split()
        assert main([name, "tiny9", "--profile", "tiny", *setting, *options]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "row official: paper" in error and "recalled" in error


@pytest.fixture
def home(shared_project, monkeypatch):
    """The shared project as this process's own."""
    monkeypatch.setenv("REPLIB_HOME", str(shared_project.folder))
    return shared_project


def papers_columns(html: str) -> list[str]:
    """What stands in the columns of a table that are headed as the paper's."""
    header = re.findall(r"<th>(.*?)</th>", html)
    lines = [re.findall(r"<td>(.*?)</td>", line, re.S) for line in html.split("<tr>")[2:]]
    places = [i for i, title in enumerate(header) if "in the paper" in title]
    return [line[i] for line in lines for i in places if line[i] != NONE]


def papers_shown(made: Page) -> list[str]:
    """What all of the paper's columns of a page show."""
    parts = (made.summary().data, made.views().data, made.counts().data)
    return [text for part in parts for text in papers_columns(part)]


def unfounded(made: Page) -> list[str]:
    """What the paper's columns of a page show and no read number of the items it cites is."""
    cited = [one.paper for one in (*made.table.rows.values(), *made.table.networks.values())]
    items = {item_of(paper.row) for paper in cited if paper is not None}
    known = {
        shown(value, digits)
        for reference, _, value, confidence in cells()
        if item_of(reference) in items and readable(value, confidence)
        for digits in (1, 2)
    }
    return [text for text in papers_shown(made) if text not in known]


def recorded_page(table: str, profile: str, evidence: Evidence) -> Page:
    """A page that opens no data."""
    made = Page.__new__(Page)
    made.results = Recorded(table, profile, evidence)
    made.table = made.results.table
    made.cell = lambda row: Cell.model_construct(
        **{"views": [], "data": "digits"} | made.table.cell_of(row, made.table.seeds[0])
    )
    made.results.__dict__["views"] = max((made.cell(row).views for row in made.table.rows), key=len)
    return made


def test_pages_show_the_catalogues_numbers_and_a_planted_one_is_caught(monkeypatch):
    counted = {"training_parameters": 0, "parameters": 0, "flops": 0}
    monkeypatch.setattr(page_module, "counts", lambda *network: counted)
    monkeypatch.setattr(Recorded, "views", None)  # of cells, which are not planned here
    evidence, seen = Evidence(Store(Path("nowhere"))), 0
    for table, names in profiles().items():
        for profile in names:
            made = recorded_page(table, profile, evidence)
            assert unfounded(made) == [], (table, profile)
            seen += len(papers_shown(made))
    assert seen > 300 and "41.86" in papers_shown(
        recorded_page("acnet-cifar", "imagenet", evidence)
    )
    for table, profile, planted in (
        ("dbb-table4", "imagenet", lambda made: made.results.paper["whole"]),
        ("repopt-table2", "quick", lambda made: made.results.paper_networks["repvgg_b1"]),
        ("acnet-cifar", "imagenet", lambda made: made.results.paper["resnet18_acnet"]),
    ):
        made = recorded_page(table, profile, evidence)
        planted(made)["accuracy"] = 12.34
        assert unfounded(made) == ["12.34"]


# -- files that are refused ------------------------------------------------------------------------
@pytest.mark.parametrize(
    "item, named",
    [
        ("{where: null, shows: x}", ["one of here, cannot_run, not_implemented", "not 0"]),
        ("{where: null, shows: x, here: [a], cannot_run: y}", ["must be stated, not 2"]),
        ("{where: null, shows: x, cannot_run: y, kind: drawn}", ["kind (='drawn')", "needs here"]),
        ("{where: null, shows: x, here: [a], kind: painted}", ["kind (='painted')", "drawn"]),
        ("{where: null, shows: x, here: [a], status: reproduced}", ["status (='reproduced')"]),
        (
            "{where: null, shows: x, here: [a], columns: [b], rows: {r: {c: 1}}}",
            ["rows.r: no column 'c'", "there are b"],
        ),
        (
            "{where: null, shows: x, here: [a], columns: [b], rows: {r: {_confidence: {c: read}}}}",
            ["rows.r: no column 'c'"],
        ),
        ("{where: null, shows: x, here: [a], confidence: sure}", ["confidence (='sure')", "read"]),
        ("{where: null, shows: 3, here: [a]}", ["shows (=3)", "string"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line(item, named, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(f"name: B\ntitle: B\nyear: 2000\nitems: {{one: {item}}}\n")
    with pytest.raises(UserError) as caught:
        read(path, 0)
    line = str(caught.value)
    assert line.startswith(f"{path}: items.one") and all(text in line for text in named), line


# -- how items stand -------------------------------------------------------------------------------
CATALOGUED = """
name: "X"
title: "A <b>bold</b> paper"
year: 2000
items:
  first: {where: "Table 1", shows: "both", here: [mini], source: s, confidence: read,
    columns: [a], rows: {base: {a: 70}, better: {a: 72}, worse: {a: 69}}}
  second: {where: "Table 2", shows: "none cites it", here: [mini]}
  third: {where: "Table 3", shows: "another profile", here: [mini/other]}
  fourth: {where: "Table 4", shows: "drawn", here: [mini], kind: drawn}
  fifth: {where: "Table 5", shows: "no data", cannot_run: "no <data>"}
  sixth: {where: "Table 6", shows: "not there", not_implemented: "nobody wrote it"}
"""


class Mini:
    """A project whose table `mini` has made-up evidence on data that are not here."""

    def __init__(self, project):
        self.store, self.project = Store(project.folder), project
        for path in (project.folder / "catalogue").iterdir():
            path.unlink()
        shutil.rmtree(project.folder / "params")
        (project.folder / "catalogue" / "x.yaml").write_text(CATALOGUED)
        text = TINY.replace("data: digits", "data: cifar10").replace("seeds: [0]", "seeds: [0, 1]")
        text = re.sub("\nproxy: .*", "", text).replace("control: control", "control: control", 1)
        for row, cell in (("Control", "base"), ("Official", "better"), ("Preserving", "worse")):
            text = text.replace(f'label: "{row}",', f'label: "{row}", paper: x/first/{cell}/a,')
        project.table("mini", text)
        self.text = text

    def run(
        self, row: str, *accuracies: float, profile="tiny", digest="of a folder", key_on=None
    ) -> None:
        """Evidence of a row, seed by seed, in percent; what it starts from is there too."""
        path = self.project.folder / "params" / "mini" / f"{profile}.yaml"
        table = load_table(path, networks=False)
        for seed, accuracy in enumerate(accuracies):
            start = None
            for name in [*table.ancestors(row), row]:
                cell = Cell.model_validate(table.cell_of(name, seed) | {"start": start})
                start = key_of(cell, key_on or digest)
                result = {"key": start, "parameters": cell.in_key, "versions": versions_of(cell)}
                result["data"] = {"name": "cifar10", "digest": digest}
                result["deployed"] = {"test_accuracy": accuracy / 100}
                self.store.write(start, whole(result), CONTEXT)

    def standing(self, item: str):
        return Standings().all()[f"x/{item}"]


@pytest.fixture
def mini(project) -> Mini:
    made = Mini(project)
    made.run("control", 70, 70)
    return made


REPRODUCED, NOISE, OTHER = (71.9, 72.1), (71, 73), (75, 75.1)  # against + 2 of the paper


@pytest.mark.parametrize(
    "official, preserving, said",
    [
        ((), (), "not run"),
        (REPRODUCED, (), "reproduced (1 reproduced, 1 not run)"),
        (REPRODUCED, (68.95, 69.05), "reproduced"),
        (REPRODUCED, (67, 71), "within noise (1 within noise, 1 reproduced)"),
        (NOISE, (67, 71), "within noise"),
        (NOISE, OTHER, "not reproduced (1 not reproduced, 1 within noise)"),
        (OTHER, (68.95, 69.05), "not reproduced (1 not reproduced, 1 reproduced)"),
    ],
)
def test_a_standing_is_what_its_verdicts_say(official, preserving, said, mini):
    mini.run("official", *official)
    mini.run("preserving", *preserving)
    assert mini.standing("first").said == said
    ran = 1 + bool(official) + bool(preserving)  # `base` has run too, and `distilled` has not
    uncited = {"not comparable": ran, "not run": 4 - ran}
    assert mini.standing("second").verdicts == uncited, "their numbers are another item's"
    assert mini.standing("third").said == "not run", "only the profile that it names counts"
    for key in Evidence(mini.store).own:
        mini.store.publish(key)
    mini.store.clean()
    assert mini.standing("first").said == said, "published evidence counts as our own does"


def test_stand_ins_count_where_they_have_been_run(mini):
    folder = mini.project.folder / "params" / "mini"
    (folder / "proxy.yaml").write_text(
        "extends: tiny.yaml\nproxy: Other.\ncell: {batch_size: 10}\n"
    )
    (folder / "smoke.yaml").write_text("extends: tiny.yaml\nproxy: Other.\ncell: {batch_size: 5}\n")
    for profile in ("proxy", "smoke"):  # the second is about the machinery alone
        mini.run("control", 70, 70, profile=profile)
        mini.run("official", *OTHER, profile=profile)
    said = "not comparable (2 not comparable, 2 not run)"  # `base` ran on them, too
    assert mini.standing("first").said == said
    mini.run("official", *REPRODUCED)
    assert mini.standing("first").status == "reproduced"


def test_evidence_of_another_version_does_not_count(mini):
    mini.run("official", *REPRODUCED, key_on="what an older version made of it")
    assert mini.standing("first").said == "not run"


def test_results_on_other_images_are_not_compared(mini):
    path = mini.project.folder / "params" / "mini" / "tiny.yaml"
    path.write_text(re.sub(r"(, |\n    )start: base", "", mini.text))  # or their keys would tell
    mini.run("control", 70, 70)
    mini.run("official", *REPRODUCED, digest="of another folder")
    assert mini.standing("first").said == "not run"
    mini.run("official", *REPRODUCED)
    assert mini.standing("first").verdicts["reproduced"] == 1


def test_rows_with_a_parent_from_elsewhere_are_found(mini):
    """A teacher's key holds a digest that is known only once it has been opened."""
    path = mini.project.folder / "params" / "mini" / "tiny.yaml"
    path.write_text(mini.text.replace("    teacher: teacher", '    teacher: "timm:any"'))
    table = load_table(path, networks=False)
    base = key_of(Cell.model_validate(table.cell_of("base", 0)), "of a folder")
    parents = {"start": base, "teacher": "timm:any:0123", "teacher_mean": [0.5]}
    values = table.cell_of("distilled", 0) | parents | {"teacher_deviation": [0.5]}
    cell = Cell.model_validate(values)
    for digest, versions in (("of a folder", {"engine": 0}), ("of a folder", versions_of(cell))):
        key = key_of(cell, digest + str(versions))
        result = {"key": key, "parameters": cell.in_key, "versions": versions}
        result |= {"data": {"name": "cifar10", "digest": digest}}
        mini.store.write(key, whole(result), CONTEXT)
        found = Recorded("mini", "tiny", Evidence(mini.store)).accuracies("distilled")
        assert found == ({0: 50} if versions == versions_of(cell) else {})


def test_what_needs_no_verdict_has_none(mini):
    assert mini.standing("fourth").said == "drawn"
    assert mini.standing("fifth").said == "cannot be run here: no <data>"
    assert mini.standing("sixth").said == "not implemented: nobody wrote it"


def test_what_is_recorded_is_what_a_plan_finds(home):
    planned = Results("tiny9", "tiny")
    found = Recorded("tiny9", "tiny", Evidence(planned.store))
    assert found.plan.by_row == planned.plan.by_row
    assert found.frame().equals(planned.frame()) and found.own == planned.own


def test_the_list_and_the_index_show_every_item_and_the_counts(mini, capfd):
    (mini.project.folder / "params" / "mini" / "bad.yaml").write_text("title: 3\n")
    mini.run("official", *REPRODUCED)
    assert main(["list"]) == 0
    listed = capfd.readouterr().out
    line = next(line for line in listed.splitlines() if line.startswith("  x/first "))
    assert "Table 1: both" in line and line.endswith("  make reproduce-mini")
    assert "reproduced (1 reproduced, 1 not run)" in line
    assert "  make reproduce-mini PROFILE=other\n" in listed and "mini bad: " in listed
    said = "1 reproduced, 1 not comparable, 1 not run, 1 drawn, "
    said += "1 cannot be run here, 1 not implemented"
    counts = catalogue_counts(Standings().all())
    assert sum(counts.values()) == 6 and f"6 tables and figures of papers: {said}\n" in listed
    (mini.project.folder / "reports" / "mini-tiny.html").write_text("a page")
    reader = offline(render.index())
    words = " ".join("".join(reader.text).split())
    assert f"Of 6: {said}." in words and "A <b>bold</b> paper" in words and "b" in reader.tags
    assert "no <data>" in words and "make reproduce-mini PROFILE=other" in words
    assert reader.all("href").count("mini-tiny.html") == 5, "four items, and the table's own line"


def test_kinds_are_said_in_the_counts():
    counts = catalogue_counts(Standings(Evidence(Store(Path("nowhere")))).all())
    papers = sum(len(work.items) for work in catalogue().values() if work.year is not None)
    assert sum(counts.values()) == papers > 90
    assert {item.kind for item in ITEMS.values()} <= {None, *KINDS}
