"""The pages about many tables: the index, a page per method, the findings, the checklist.

All of them are made from the catalogue, the files of pages/ and the evidence that is here; none
opens any data, and none takes longer than a second or two, so that they are made again whenever a
page is.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from replib.blocks import BLOCKS
from replib.blocks.repmlp import RepMLP
from replib.branches import Chain, Convolution, Norm
from replib.experiments.store import home
from replib.report import declared
from replib.report.catalogue import Item, Work, catalogue
from replib.report.declared import Finding, Method, Picture
from replib.report.diagram import before_after, diagram
from replib.report.lookup import Numbers, diverged, evidence_of, published
from replib.report.notebooks import notebooks, title
from replib.report.standing import Recorded, Standing, Standings, catalogue_counts
from replib.training.checkpoint import write_bytes

TEMPLATES = Path(__file__).parent / "templates"
QUICK = "quick"  # the profile whose cost is told where an item names none


def shell(template: str, **values) -> str:
    """Fill one of our page templates; values are escaped, `body` is HTML already."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    return environment.get_template(template).render(**values)


def index() -> Path:
    """Write reports/index.html and the pages that it links: methods, findings, checklist."""
    overview = Overview(Standings())
    reports = home() / "reports"
    for name, method in overview.methods.items():
        write(reports / f"method-{name}.html", "method.html.j2", **overview.of_method(name, method))
    write(reports / "findings.html", "findings.html.j2", **overview.all_findings())
    write(reports / "checklist.html", "checklist.html.j2", **overview.checklist())
    write(reports / "index.html", "index.html.j2", **overview.index())
    return reports / "index.html"


def write(path: Path, template: str, **values) -> None:
    """One page."""
    write_bytes(path, shell(template, made=f"{datetime.now():%Y-%m-%d %H:%M}", **values).encode())


def page_of(name: str) -> dict[str, str]:
    """The page of that name and when it was made, where it exists."""
    page = home() / "reports" / f"{name}.html"
    if not page.is_file():
        return {}
    made = datetime.fromtimestamp(page.stat().st_mtime)
    return {"page": page.name, "made": f"{made:%Y-%m-%d %H:%M}"}


def pages_of(entry: str, known: dict[str, list[str]]) -> list[dict[str, str]]:
    """The pages that exist of what an item of the catalogue names: TABLE, TABLE/PROFILE, NOTEBOOK.

    Those of all profiles of a table, since others than the one that is named show it too.
    """
    name = entry.split("/")[0]
    found = [page_of(f"{name}-{profile}") for profile in known.get(name, [])]
    return [page for page in (*found, page_of(name)) if page]


def picture(wanted: Picture) -> Markup:
    """The drawing of a method's block, as it is trained and as it is deployed."""
    n = wanted.channels
    if wanted.block == "compactor":  # no block: a layer that is followed by a matrix
        pieces = Convolution(n, n, (3, 3)), Norm(n, 2), Convolution(n, n, (1, 1), identity=True)
        return Markup(diagram(Chain(*pieces), "A layer, its norm and its compactor"))
    if wanted.block == "repmlp":
        return Markup(before_after(RepMLP(n, **wanted.options)))
    return Markup(before_after(BLOCKS[wanted.block](n, n, **wanted.options)))


class Overview:
    """What those pages show, computed once for all of them."""

    def __init__(self, standings: Standings):
        self.standings, self.known = standings, standings.profiles
        self.numbers, self.works = Numbers(standings), catalogue()
        self.methods, self.findings = declared.methods(), declared.findings()
        self.stand: dict[str, Standing] = standings.all()
        self.held = {name: self.numbers.holds(one) for name, one in self.findings.items()}
        self.notebooks = notebooks()

    # -- parts that several pages show ----------------------------------------------------------
    def about(self, reference: str) -> list[tuple[str, Finding]]:
        """The findings about PAPER/ITEM, or about any item of PAPER, that evidence bears out."""
        return [
            (name, one)
            for name, one in self.findings.items()
            if self.held[name]
            and any(reference in (text, text.split("/")[0]) for text in one.about)
        ]

    def lines(self, reference: str) -> list[dict]:
        """Those findings in one line each."""
        found = self.about(reference)
        return [{"id": name, "line": self.numbers.fill(one.line)} for name, one in found]

    def tables_of(self, work: Work) -> list[str]:
        """The tables that items of a paper name."""
        entries = (entry.split("/")[0] for item in work.items.values() for entry in item.here)
        return [name for name in dict.fromkeys(entries) if name in self.known]

    def seen(self, tables: list[str]) -> list[Recorded]:
        """Their profiles that have evidence."""
        found = (one for table in tables for one in self.standings.tables(table))
        return [one for one in found if evidence_of(one)]

    def look(self, one: Recorded, *quantities: str) -> dict[str, Markup]:
        """Quantities of a profile, each with its reference."""
        return {q: self.numbers.shown(f"{one.id}.{one.profile}.{q}") for q in quantities}

    def link(self, name: str) -> dict[str, str]:
        """A notebook or a table's quick profile: its page, if there is one, and its command."""
        page = page_of(name) or page_of(f"{name}-{QUICK}")
        return {"name": name, "page": page.get("page"), "command": f"make reproduce-{name}"}

    def cost(self, item: Item) -> Markup | str:
        """What the first table that an item names took to train, where there is evidence of it."""
        for entry in item.here:
            table, _, profile = entry.partition("/")
            for one in self.seen([table] if table in self.known else []):
                if one.profile == (profile or QUICK):
                    return self.look(one, "time")["time"]
        return ""

    # -- pages ----------------------------------------------------------------------------------
    def index(self) -> dict:
        """The values of the index."""
        works = [
            {
                "work": work,
                "id": name,
                "methods": [key for key, one in self.methods.items() if one.paper == name],
                "items": [self.row(f"{name}/{key}", item) for key, item in work.items.items()],
            }
            for name, work in self.works.items()
        ]
        methods = [
            {
                "id": name,
                "method": method,
                "line": self.numbers.fill(method.line),
                "year": self.works[method.paper].year,
                "findings": self.lines(method.paper),
                "first": self.link(method.first),
                "cost": self.first_cost(method),
            }
            for name, method in self.methods.items()
        ]
        methods.sort(key=lambda entry: (entry["year"], entry["id"]))
        others = [{"title": title(name), **self.link(name)} for name in self.notebooks]
        counts = catalogue_counts(self.stand)
        found = {"title": "Structural re-parameterization, reproduced", "counts": counts}
        found |= {"works": works, "methods": methods, "others": others}
        return found | {"tables": self.profiles(), "any_finding": bool(self.findings)}

    def row(self, reference: str, item: Item) -> dict:
        """An item of the catalogue on the index."""
        return {
            "item": item,
            "standing": self.stand[reference],
            "findings": self.lines(reference),
            "pages": [page for entry in item.here for page in pages_of(entry, self.known)],
            "cost": self.cost(item),
        }

    def first_cost(self, method: Method) -> Markup | str:
        """What the table that is to be opened first took to train."""
        for one in self.seen([method.first] if method.first in self.known else []):
            if one.profile == QUICK:
                return self.look(one, "time")["time"]
        return ""

    def profiles(self) -> list[dict]:
        """All tables with their profiles."""
        tables = []
        for table, names in self.known.items():
            loaded = {one.profile: one for one in self.standings.tables(table)}
            rows = [
                {
                    "profile": profile,
                    "data": loaded[profile].table.cell.get("data", "") if profile in loaded else "",
                    "seeds": len(loaded[profile].table.seeds) if profile in loaded else "",
                    "command": f"make reproduce-{table} PROFILE={profile}",
                    "error": self.standings.refused.get(f"{table} {profile}"),
                }
                | page_of(f"{table}-{profile}")
                for profile in names
            ]
            titles = (one.table.title for one in loaded.values())
            tables.append({"table": table, "title": next(titles, ""), "rows": rows})
        return tables

    def of_method(self, name: str, method: Method) -> dict:
        """The values of a method's page."""
        work, fill = self.works[method.paper], self.numbers.fill
        tables = self.tables_of(work)
        results = [
            {"one": one, **page_of(f"{one.id}-{one.profile}")}
            | self.look(one, "rows", "above", "unclear", "below", "seeds", "time")
            for one in self.seen(tables)
        ]
        items = {f"{method.paper}/{key}": item for key, item in work.items.items()}
        status = Counter(self.stand[reference].status for reference in items)
        also = [method.first, *method.also]
        entries = (e.split("/")[0] for item in items.values() for e in item.here)
        also += [entry for entry in dict.fromkeys(entries) if entry not in also]
        return {
            "title": f"{method.name}, explained",
            "method": method,
            "work": work,
            "line": fill(method.line),
            "idea": [fill(text) for text in method.idea],
            "picture": picture(method.picture),
            "caption": fill(method.caption or ""),
            "formulas": [(fill(words), formula) for words, formula in method.formulas.items()],
            "symbols": fill(method.symbols),
            "here": fill(method.here or ""),
            "pitfalls": [fill(text) for text in method.pitfalls],
            "findings": self.lines(method.paper),
            "results": results,
            "status": status,
            "links": [self.link(entry) for entry in also],
            "id": method.paper,
        }

    def all_findings(self) -> dict:
        """The values of the page of findings."""
        found = []
        for name, one in self.findings.items():
            rows = []
            for line in self.numbers.support(one):
                results, row = line["one"], line["row"]
                ask = f"{results.id}.{results.profile}.{row}"
                rows.append(
                    {
                        "label": results.table.rows[row].label,
                        "over": results.table.rows[results.against(row)].label,
                        "table": f"{results.id}, {results.profile}",
                        "gain": self.numbers.shown(f"{ask}.gain"),
                        "seeds": self.numbers.shown(f"{ask}.seeds"),
                        "data": results.table.cell.get("data", ""),
                        "proxy": results.table.proxy,
                    }
                    | {key: line[key] for key in ("wanted", "seen", "holds")}
                    | page_of(f"{results.id}-{results.profile}")
                )
            said = {"line": self.numbers.fill(one.line), "says": self.numbers.fill(one.says)}
            proxies = dict.fromkeys(row["proxy"] for row in rows if row["proxy"])
            found.append(
                {"id": name, "holds": self.held[name], "rows": rows, "proxies": list(proxies)}
                | {"items": list(dict.fromkeys(self.item(text) for text in one.about)), **said}
            )
        return {"title": "Findings", "findings": found}

    def item(self, reference: str) -> str:
        """What an item of the catalogue is called."""
        paper, _, key = reference.partition("/")
        where = self.works[paper].items[key].where
        return f"{self.works[paper].name}, {where}" if where else self.works[paper].name

    def checklist(self) -> dict:
        """The values of the checklist: how every table that was run was run."""
        lines, runs = [], []
        for one in self.seen(list(self.known)):
            evidence = evidence_of(one)
            cells = [found["result"].get("parameters", {}) for found in evidence.values()]
            contexts = [found["context"] for found in evidence.values()]
            lost = [(row, seed, "diverged") for row in one.rows for seed in diverged(one, row)]
            lost += [
                (row, seed, "not run")
                for (row, seed), key in one.plan.by_row.items()
                if key not in evidence and one.evidence(row, published(one))
            ]
            runs += [
                {"one": one, "label": one.table.rows[row].label, "seed": seed, "why": why}
                for row, seed, why in lost
            ]
            lines.append(
                {"one": one, **page_of(f"{one.id}-{one.profile}")}
                | self.look(one, "claims", "rows", "seeds", "cells", "planned", "flops", "time")
                | {
                    "protocols": every(cells, "protocol"),
                    "data": every(cells, "data"),
                    "devices": every(contexts, "device"),
                    "processors": every(contexts, "processor"),
                    "commits": every(contexts, "commit"),
                    "published": published(one),
                    "control": one.table.rows[one.table.control].label,
                    "proxy": one.table.proxy,
                    "lost": len(lost),
                }
            )
        used = {key for line in lines for key in evidence_of(line["one"])}
        there = self.standings.evidence.published.keys() | self.standings.evidence.own.keys()
        counts = catalogue_counts(self.stand)
        found = {"title": "Checklist", "lines": lines, "runs": runs, "counts": counts}
        return found | {"used": len(used), "unused": len(there - used)}


def every(found: list[dict], key: str) -> list[str]:
    """The values of a key in evidence, each once."""
    return sorted({str(one[key]) for one in found if one.get(key) is not None})
