"""The pages about many tables: no typed number, sentences that evidence bears out, and any browser
opens them: nothing from outside, links that lead somewhere, text for pictures, a phone's width."""

import functools
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from conftest import ROOT, Project

from replib.analysis.statistics import estimate
from replib.errors import UserError
from replib.experiments.store import Store, read_evidence
from replib.report import declared, overview
from replib.report.catalogue import catalogue
from replib.report.declared import typed_number, without_counts
from replib.report.figures import lines
from replib.report.lookup import Numbers, duration, sign
from replib.report.notebooks import notebooks
from replib.report.overview import Overview, shell
from replib.report.render import described
from replib.report.results import profiles
from replib.report.standing import Evidence, Standings

METHODS = sorted((ROOT / "pages" / "methods").glob("*.yaml"))
VOID = {"br", "meta", "img", "hr", "input", "link", "col", "wbr"}


# -- words without numbers -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, found",
    [
        ("a gain of {table2.quick.official.gain} points", None),
        ("a 3×3 and a 31×31 kernel, k×1 bars", None),
        ("ResNet-18, RepVGG-A1, CIFAR-10, VGG-16, W3", None),
        ("`epochs=40` of `float32`, 1×1", None),
        ("K₃ and γ²", None),
        ("a gain of 0.4 points", "0.4"),
        ("a gain of +6.38 points {table2.quick.rows}", "6.38"),
        ("RepVGG-71.3", ".3"),
        ("after 40 epochs", "40"),
        ("by-5 and x5", "5"),
        ("10 %", "10"),
    ],
)
def test_a_typed_number_is_told_from_names_sizes_and_code(words, found):
    seen = typed_number(words)
    assert seen is None if found is None else found.strip(".") in (seen or "")


def planted() -> list[tuple[str, str]]:
    """(file, path of a field that is text) of everything that pages say in words."""
    fields = []
    for path in METHODS[:2]:
        for name in ("line", "idea", "pitfalls", "symbols", "formulas"):
            fields.append((f"methods/{path.name}", name))
    return [*fields, ("findings.yaml", "line"), ("findings.yaml", "says")]


@pytest.mark.parametrize("name, field", planted())
def test_a_number_that_is_typed_into_a_page_is_refused(name, field, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "pages", tmp_path / "pages")
    monkeypatch.setenv("REPLIB_HOME", str(tmp_path))
    path = tmp_path / "pages" / name
    whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    read = declared.findings if name == "findings.yaml" else declared.methods
    assert read()
    place = next(iter(whole["findings"].values())) if name == "findings.yaml" else whole
    if isinstance(place[field], list):
        place[field][0] += " It gains 12.34 points."
    elif isinstance(place[field], dict):
        place[field]["measured"] = "y = 12.34 x"
    else:
        place[field] += " It gains 12.34 points."
    path.write_text(yaml.safe_dump(whole, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read()
    line = str(caught.value)
    assert line.startswith(str(path)) and "12.34" in line and "\n" not in line, line


@pytest.mark.parametrize("words", ["in five of them", "Half of the rows", "twice as good"])
def test_findings_do_not_count_in_letters_either(words):
    with pytest.raises(ValueError, match="is typed"):
        without_counts(words)
    assert without_counts("`five` and {table2.quick.below}")


# -- what is declared exists -----------------------------------------------------------------------
def test_methods_name_what_is_here():
    works, tables, own = catalogue(), profiles(), notebooks()
    found = declared.methods()
    assert len(found) == len(METHODS) >= 11
    for name, method in found.items():
        assert method.paper in works, name
        for entry in (method.first, *method.also):
            assert entry in tables or entry in own, (name, entry)
        assert "<svg" in overview.picture(method.picture), name


def test_findings_name_items_rows_and_tables():
    works, tables = catalogue(), profiles()
    for name, one in declared.findings().items():
        for reference in one.about:
            paper, _, item = reference.partition("/")
            assert item in works[paper].items, (name, reference)
        for place in one.holds:
            table, _, profile = place.partition(".")
            assert profile in tables.get(table, ()), (name, place)
        assert re.fullmatch(r"[a-z0-9-]+", name)


# -- what pages show -------------------------------------------------------------------------------
NAMED = {"code", "pre", "time", "cite", "a", "svg", "style", "title", "footer"}
NAMING = {"name", "formula", "address"}  # classes


class Shown(html.parser.HTMLParser):
    """The text of a page by where it stands: what is looked up, what is a name, all the rest."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.rest, self.data = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in VOID:
            return
        classes = set((dict(attributes).get("class") or "").split())
        kind = "name" if tag in NAMED or classes & NAMING else ""
        if tag == "data":
            kind = "data"
            self.data.append([dict(attributes)["value"], ""])
        self.stack.append((tag, kind))

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        kinds = {kind for _, kind in self.stack}
        if "data" in kinds:
            self.data[-1][1] += data
        elif "name" not in kinds:
            self.rest.append(data)


def unfounded(page: str) -> list[str]:
    """Numbers of a page that are neither looked up nor part of a name."""
    return [number for text in Shown(page).rest if (number := typed_number(text))]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Overview:
    """The pages of the published evidence, without what this checkout has trained itself."""
    store = Store(ROOT)
    store.runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLIB_HOME", str(ROOT))
        yield Overview(Standings(Evidence(store)))


@pytest.fixture(scope="module")
def made(published) -> dict[str, str]:
    """name -> HTML."""
    values = {f"method-{n}": published.of_method(n, m) for n, m in published.methods.items()}
    pages = {name: shell("method.html.j2", made="", **one) for name, one in values.items()}
    for name in ("findings", "checklist", "index"):
        found = getattr(published, {"findings": "all_findings"}.get(name, name))()
        pages[name] = shell(f"{name}.html.j2", made="", **found)
    return pages


@pytest.mark.slow
def test_no_page_shows_a_number_that_is_not_looked_up(made):
    for name, page in made.items():
        assert unfounded(page) == [], name
        assert "".join(text for _, text in Shown(page).data), name
    planted = made["findings"].replace("<h1>", "<p>It gains 12.34 points.</p><h1>")
    assert unfounded(planted) == ["12.34"]


@functools.cache
def read(path: Path) -> dict | None:
    return read_evidence(path)


def score(evidence: dict) -> float:
    """Of the one metric that a network has."""
    deployed = evidence["result"]["deployed"]
    (name,) = {"test_accuracy", "test_mAP", "test_mIoU"} & deployed.keys()
    return 100 * deployed[name]


def by_hand(overview: Overview, reference: str) -> str | None:
    """A quantity, from the evidence files themselves; None for what this does not know."""
    table, *rest = reference.split(".")
    if table not in profiles() or rest[-1] not in ("gain", "accuracy", "above", "below", "cells"):
        return None
    (one,) = (t for t in overview.standings.tables(table) if t.profile == rest[0])
    folder = ROOT / "reports" / "evidence"

    def accuracies(row: str) -> dict[int, float]:
        keys = {seed: one.plan.by_row[row, seed] for seed in one.table.seeds}
        found = {seed: read(folder / f"{key[:16]}.json") for seed, key in keys.items()}
        return {seed: score(evidence) for seed, evidence in found.items() if evidence is not None}

    def gains(row: str) -> list[float]:
        spec = one.table.rows[row]
        other = spec.against or one.table.controls.get(spec.variant, one.table.control)
        ours, theirs = accuracies(row), accuracies(other)
        return [] if other == row else [ours[s] - theirs[s] for s in ours if s in theirs]

    if rest[-1] == "cells":
        keys = {key for key in one.plan.by_row.values() if (folder / f"{key[:16]}.json").is_file()}
        return str(len(keys))
    if rest[-1] == "accuracy":
        values = list(accuracies(rest[1]).values())
        return f"{sum(values) / len(values):.2f} %" if values else None
    if rest[-1] == "gain":
        values = gains(rest[1])
        return f"{sum(values) / len(values):+.2f}".replace("-", "−") if values else "–"
    found = [estimate(g) for row, r in one.table.rows.items() if not r.hidden and (g := gains(row))]
    return str(sum(e.low > 0 if rest[-1] == "above" else e.high < 0 for e in found))


@pytest.mark.slow
def test_every_number_is_that_of_the_evidence(made, published):
    checked = 0
    for name, page in made.items():
        for reference, text in Shown(page).data:
            wanted = by_hand(published, reference)
            if wanted is not None:
                assert text.partition(" [")[0] == wanted, (name, reference)
                checked += 1
    assert checked > 100


@pytest.mark.slow
def test_every_finding_is_borne_out_by_the_published_evidence(published):
    assert len(published.findings) >= 8
    assert [name for name, held in published.held.items() if not held] == []


@pytest.mark.slow
def test_a_finding_that_evidence_does_not_bear_out_says_so(published, monkeypatch):
    name, one = next(iter(published.findings.items()))
    place, rows = next(iter(one.holds.items()))
    wrong = dict.fromkeys(rows, "above")
    changed = one.model_copy(update={"holds": one.holds | {place: wrong}})
    monkeypatch.setitem(published.findings, name, changed)
    monkeypatch.setitem(published.held, name, published.numbers.holds(changed))
    page = shell("findings.html.j2", made="", **published.all_findings())
    assert not published.held[name] and page.count("(does not hold)") >= 1
    assert "does not bear this out" in page
    assert name not in [found for found, _ in published.about(one.about[0])], "nor on the index"


# -- look-ups --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "reference, named",
    [
        ("table2.quick.official.size", ["expected TABLE.PROFILE.ROW", "gain"]),
        ("table2.quick", ["expected TABLE.PROFILE.ROW"]),
        ("tableX.quick.rows", ["no profile 'quick' of a table 'tableX'"]),
        ("table2.slow.rows", ["no profile 'slow'"]),
        ("table2.quick.offical.gain", ["no row 'offical'", "official"]),
        ("catalogue.repan.cifar_main.cifar_10_repvgg_a1.gain", ["not to be shown"]),
    ],
)
def test_a_slip_in_a_placeholder_is_refused_in_one_line(reference, named):
    numbers = Numbers(Standings(Evidence(Store(Path("nowhere")))))
    with pytest.raises(UserError) as caught:
        numbers.fill(f"So many: {{{reference}}}.")
    line = str(caught.value)
    assert f"{{{reference}}}" in line and "\n" not in line
    assert all(text in line for text in named), line


def test_what_stands_for_a_placeholder_names_its_source(shared_project, monkeypatch):
    monkeypatch.setenv("REPLIB_HOME", str(shared_project.folder))
    numbers = Numbers(Standings())
    shown = numbers.fill(
        "`a<b` {tiny9.tiny.official.accuracy} {catalogue.dbb.table4.linear_dbb.top1}"
    )
    assert "<code>a&lt;b</code>" in shown
    assert re.search(r'<data value="tiny9.tiny.official.accuracy">[\d.]+ %</data>', shown)
    assert shown.endswith('<data value="catalogue.dbb.table4.linear_dbb.top1">70.12</data>')


def test_signs_and_times():
    assert sign(estimate([1.0, 1.1])) == "above" and sign(estimate([-1.0, -1.1])) == "below"
    assert sign(estimate([1.0])) == sign(estimate([-1.0, 1.0])) == "unclear" and sign(None) is None
    said = {5: "5 s", 80: "80 s", 100: "2 min", 5000: "83 min", 7000: "1.9 h", 50000: "14 h"}
    assert {seconds: duration(seconds) for seconds in said} == said


# -- as a browser sees them ------------------------------------------------------------------------
class Tree(html.parser.HTMLParser):
    """Links, anchors, pictures and what would be requested or run."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors, self.pictures, self.tags = [], set(), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        if "id" in found:
            self.anchors.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "img":
            self.pictures.append(found.get("alt") or "")
        if tag == "svg":
            self.pictures.append(found.get("aria-label") or found.get("id") or "")


def broken(folder: Path) -> list[str]:
    """Links of the pages in a folder that lead nowhere, pictures without words."""
    trees = {p.name: Tree(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.html"))}
    wrong = []
    for name, tree in trees.items():
        wrong += [f"{name}: a picture without words" for text in tree.pictures if not text.strip()]
        for link in tree.links:
            file, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:|//", link) or not (folder / unquote(file)).exists():
                wrong.append(f"{name}: {link}")
            elif anchor and not {anchor, unquote(anchor)} & trees[file or name].anchors:
                wrong.append(f"{name}: {link}")
    return wrong


@pytest.fixture(scope="module")
def rendered(shared_project, tmp_path_factory) -> Path:
    """The reports of a project with one table that was run: every kind of page there is."""
    made = Project(tmp_path_factory.mktemp("rendered"))
    for path in (made.folder / "params").glob("*/*.yaml"):
        if path.parent.name != "table2":  # which findings and methods may name
            path.unlink()
    shutil.copytree(ROOT / "pages", made.folder / "pages")
    (made.folder / "pages" / "findings.yaml").write_text(FINDING, encoding="utf-8")
    for path in (made.folder / "pages" / "methods").iterdir():
        if path.stem not in ("repan", "repmlp", "resrep"):
            path.unlink()
    shutil.copytree(shared_project.folder / "params" / "tiny9", made.folder / "params" / "tiny9")
    shutil.copytree(shared_project.folder / "reports", made.folder / "reports", dirs_exist_ok=True)
    # What other tests have published there would stand in place of the project's own results.
    shutil.rmtree(made.folder / "reports" / "evidence", ignore_errors=True)
    (made.folder / "benchmarks").mkdir()  # which the page of speed links
    shutil.copy(ROOT / "benchmarks" / "NOTES.md", made.folder / "benchmarks")
    (made.folder / "catalogue" / "tiny.yaml").write_text(TINY_PAPER, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLIB_HOME", str(made.folder))
        for path in (made.folder / "reports").glob("*.html"):
            path.unlink()
        yield made.folder


FINDING = """
findings:
  tiny:
    line: "A line about it"
    says: "Of {tiny9.tiny.rows} rows, {tiny9.tiny.above} are above."
    about: [tiny/table1]
    holds: {tiny9.tiny: {"*": unclear}}
"""
TINY_PAPER = """
name: "Tiny"
title: "A paper of one table"
year: 2000
links: ["https://example.org/paper"]
items:
  table1: {where: "Table 1", shows: "everything", here: [tiny9]}
"""


def test_every_link_leads_somewhere_and_every_picture_has_words(rendered):
    page = rendered / "reports" / "tiny9-tiny.html"
    page.write_text(shell("base.html.j2", title="t", body='<img src="" alt="w">', made=""))
    overview.index()
    folder = rendered / "reports"
    names = {path.name for path in folder.glob("*.html")}
    assert names == {"index.html", "findings.html", "checklist.html", page.name} | {
        f"method-{name}.html" for name in ("repan", "repmlp", "resrep")
    }
    assert broken(folder) == []
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert 'href="findings.html#tiny"' in text and 'href="tiny9-tiny.html"' in text
    for hole in ('<a href="nowhere.html">', '<a href="index.html#nowhere">', '<img src="" alt="">'):
        page.write_text(shell("base.html.j2", title="t", body=hole, made=""))
        assert len(broken(folder)) == 1, hole


def test_pages_are_made_for_paper_and_for_a_phone(rendered):
    overview.index()
    for path in (rendered / "reports").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "@media print" in text and "@media (max-width" in text, path.name
        assert '<meta name="viewport" content="width=device-width' in text, path.name
        assert "http://" not in re.sub(r'xmlns="[^"]*"', "", text), path.name


def test_figures_are_described(monkeypatch):
    said = described("figures.gains(page.results)", "The table")
    assert said.startswith("Figure: The table. Paired gains over the control: every seed")
    assert described("figures.nothing(x); other_figures.y(1)", "") == "Figure."


def test_lines_differ_by_more_than_colour():
    looks = lines(40)
    assert len({(look["color"], look["ls"]) for look in looks}) == 40
    assert {look["ls"] for look in looks[:10]} == {"-"}


def test_figures_use_palettes_that_the_colour_blind_can_read():
    allowed = {"YlGnBu", "viridis", "RdBu_r", "magma", "cividis", "colorblind"}
    greys = re.compile(r"#([0-9a-f]{6})$")
    for path in (ROOT / "replib" / "report").glob("*figures.py"):
        text = path.read_text(encoding="utf-8")
        maps = re.findall(r"""(?:cmap=|get_cmap\(|palette=|color_palette\()["'](\w+)""", text)
        assert set(maps) <= allowed, path.name
        for colour in re.findall(r"""colou?r=["']([^"']+)""", text):
            if match := greys.match(colour):
                parts = [int(match[1][i : i + 2], 16) for i in (0, 2, 4)]
                assert max(parts) - min(parts) <= 32, f"{path.name}: {colour} is no grey"
            else:
                assert re.fullmatch(r"C\d|C\{.*|black|white", colour), f"{path.name}: {colour}"


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><script>
const pages = %s, widths = [1200, 390], found = [];
const wait = pages.length * widths.length;
for (const page of pages) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px;border:0`;
  frame.onload = () => {
    const inside = frame.contentDocument, window_ = frame.contentWindow;
    const pictures = [...inside.images].filter(one => !one.naturalWidth).length;
    found.push({page, width, needs: inside.documentElement.scrollWidth, pictures,
      loaded: window_.performance.getEntriesByType("resource").length,
      words: inside.body.innerText.length});
    if (found.length === wait) document.title = JSON.stringify(found);
  };
  frame.src = page; document.body.append(frame);
}
</script>"""


def browse(folder: Path, work: Path) -> tuple[list[dict], str, list[str]]:
    """(what every page needs at two widths, what the console said, addresses asked for)."""
    frames, log = folder / "frames.htm", work / "net.json"
    pages = sorted(path.name for path in folder.glob("*.html"))
    frames.write_text(FRAMES % json.dumps(pages), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        "--allow-file-access-from-files", f"--user-data-dir={work / 'profile'}",
        "--enable-logging=stderr", f"--log-net-log={log}", "--virtual-time-budget=20000",
        "--dump-dom", frames.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    frames.unlink()
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr[-2000:]
    asked = set()  # by pages; what the browser itself asks for has no origin
    for line in log.read_text(encoding="utf-8").splitlines():
        if '"initiator":' in line and '"initiator":"not an origin"' not in line:
            asked |= set(re.findall(r'"url":"(https?://[^"]*)"', line))
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(title[1].replace("&quot;", '"')), "\n".join(console), sorted(asked)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_opens_every_page_at_two_widths(rendered, tmp_path, monkeypatch):
    """Index, methods, findings, checklist, a table's page and a notebook's."""
    from replib.report import render

    monkeypatch.setenv("REPLIB_TRAIN", "0")
    render.reproduce("tiny9", "tiny", [], here=True)
    render.reproduce("bench", "quick", [], here=True)
    overview.index()
    folder = rendered / "reports"
    found, console, asked = browse(folder, tmp_path)
    assert len(found) == 2 * len(list(folder.glob("*.html"))) >= 16
    assert [one for one in found if one["needs"] > one["width"]] == []
    assert not any(one["pictures"] or one["loaded"] for one in found)
    assert min(one["words"] for one in found) > 100
    assert (console, asked) == ("", [])
    assert broken(folder) == []
    wide = '<p style="width:900px">w</p><img src="http://127.0.0.1:9/x.png" alt="x">'
    wide += "<script>console.error('planted')</script>"
    guarded = shell("base.html.j2", title="t", body=wide, made="")
    (bare, guards) = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", guarded)
    assert guards == 1
    (folder / "wide.html").write_text(guarded)
    found, console, asked = browse(folder, tmp_path)
    assert [one["width"] for one in found if one["needs"] > one["width"]] == [390]
    assert "violates" in console and "planted" not in console and asked == []
    (folder / "wide.html").write_text(bare)
    found, console, asked = browse(folder, tmp_path)
    (folder / "wide.html").unlink()
    assert "planted" in console and asked == ["http://127.0.0.1:9/x.png"]
