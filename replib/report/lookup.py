"""The numbers that pages about many tables show: each is looked up by a reference, and says which.

    TABLE.PROFILE.ROW.QUANTITY    gain, accuracy, seeds, verdict: of a row
    TABLE.PROFILE.QUANTITY        rows, above, below, unclear, seeds, cells, planned, flops, time
    catalogue.PAPER.ITEM.ROW.COLUMN    what the paper prints, where it was read

The evidence is the published one where there is any, else this machine's: findings are about what
the project has published, and a table's own page sets the two beside each other.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable
from html import escape

from markupsafe import Markup

from replib.analysis.statistics import Estimate
from replib.errors import UserError
from replib.report.catalogue import number as papers_number
from replib.report.declared import CODE, PLACEHOLDER, Finding
from replib.report.page import NONE, engineering, number
from replib.report.standing import Recorded, Standings

SIGNS = {"above", "below", "unclear"}


def published(one: Recorded) -> bool:
    """Whether its published evidence is what counts."""
    return bool(one.published)


def sign(gain: Estimate | None) -> str | None:
    """above, below: by more than seeds differ; unclear; None without a gain."""
    if gain is None:
        return None
    return "above" if gain.low > 0 else "below" if gain.high < 0 else "unclear"


def duration(seconds: float) -> str:
    """In words that a person can plan with."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{number(seconds / size, int(size > 60 and seconds < 10 * size))} {unit}"
    return f"{number(seconds)} s"


def evidence_of(one: Recorded) -> dict[str, dict]:
    """key -> the evidence of a profile that counts."""
    return one.published if published(one) else one.own


def signs(one: Recorded) -> dict[str, str]:
    """row -> the sign of its gain, for every row that has one."""
    found = {row: sign(one.gain(row, published(one))) for row in one.rows}
    return {row: text for row, text in found.items() if text is not None}


def seconds(one: Recorded) -> float:
    """That its cells took, all of them, one after the other."""
    return sum(e["context"].get("wall_seconds", 0) for e in evidence_of(one).values())


def operations(one: Recorded) -> float:
    """FLOPs that its cells took to train."""
    computes = (e["result"].get("compute", {}) for e in evidence_of(one).values())
    return sum(compute.get("training_flops", 0) for compute in computes)


def diverged(one: Recorded, row: str) -> list[int]:
    """The seeds of a row whose training loss was no number at some time."""
    found = one.evidence(row, published(one)).items()
    return [s for s, e in found if None in e["result"].get("history", {}).get("train_loss", ())]


def seen_of(one: Recorded, row: str, found: str | None, wanted: str) -> str:
    """What evidence says of a row, of what a finding says of it."""
    runs = one.evidence(row, published(one))
    if wanted == "diverged" and runs and len(diverged(one, row)) == len(runs):
        return "diverged"
    return found or "not run"


def gain_text(gain: Estimate | None) -> str:
    """In points, with its interval; a true minus sign."""
    if gain is None:
        return NONE
    text = f"{gain.mean:+.2f}"
    if gain.n > 1:
        text += f" [{gain.low:+.2f}, {gain.high:+.2f}]"
    return text.replace("-", "−")


def accuracy_text(accuracy: Estimate | None) -> str:
    """In percent."""
    return NONE if accuracy is None else f"{accuracy.mean:.2f} %"


ROW: dict[str, Callable[[Recorded, str], str]] = {
    "gain": lambda one, row: gain_text(one.gain(row, published(one))),
    "accuracy": lambda one, row: accuracy_text(one.accuracy(row, published(one))),
    "seeds": lambda one, row: number(len(one.evidence(row, published(one)))),
    "verdict": lambda one, row: one.verdict(row),
}
TABLE: dict[str, Callable[[Recorded], str]] = {
    "rows": lambda one: number(len(signs(one))),
    "above": lambda one: number(Counter(signs(one).values())["above"]),
    "below": lambda one: number(Counter(signs(one).values())["below"]),
    "unclear": lambda one: number(Counter(signs(one).values())["unclear"]),
    "seeds": lambda one: number(len(one.table.seeds)),
    "cells": lambda one: number(len(evidence_of(one))),
    "planned": lambda one: number(len(one.plan.by_row)),
    "claims": lambda one: number(sum(claim.confidence == "read" for claim in one.table.claims)),
    "time": lambda one: duration(seconds(one)),
    "flops": lambda one: engineering(operations(one)),
}


class Numbers:
    """Looks up what texts and pages ask for."""

    def __init__(self, standings: Standings):
        self.standings = standings

    def profile(self, table: str, profile: str) -> Recorded:
        """A profile. Raises: UserError where there is none."""
        for one in self.standings.tables(table) if table in self.standings.profiles else ():
            if one.profile == profile:
                return one
        raise UserError(f"no profile {profile!r} of a table {table!r} can be read.")

    def text(self, reference: str) -> str:
        """What stands for a reference on a page. Raises: UserError in one line."""
        first, *rest = reference.split(".")
        try:
            if first == "catalogue" and len(rest) == 4:
                paper, item, row, column = rest
                return f"{papers_number(f'{paper}/{item}/{row}', column):g}"
            if len(rest) == 3 and rest[2] in ROW:
                one = self.profile(first, rest[0])
                if rest[1] not in one.table.rows:
                    raise UserError(f"no row {rest[1]!r}; there are {', '.join(one.table.rows)}.")
                return ROW[rest[2]](one, rest[1])
            if len(rest) == 2 and rest[1] in TABLE:
                return TABLE[rest[1]](self.profile(first, rest[0]))
        except UserError as error:
            raise UserError(f"{{{reference}}}: {error}") from None
        raise UserError(
            f"{{{reference}}}: expected TABLE.PROFILE.ROW.({', '.join(ROW)}), "
            f"TABLE.PROFILE.({', '.join(TABLE)}) or catalogue.PAPER.ITEM.ROW.COLUMN."
        )

    def shown(self, reference: str) -> Markup:
        """The same as HTML that names its source."""
        return Markup(f'<data value="{escape(reference)}">{escape(self.text(reference))}</data>')

    def fill(self, words: str) -> Markup:
        """Words as HTML, what they ask for looked up, code as code."""
        text = CODE.sub(lambda m: f"<code>{m[1]}</code>", escape(words, quote=False))
        return Markup(PLACEHOLDER.sub(lambda m: self.shown(m[1]), text))

    def support(self, finding: Finding) -> list[dict]:
        """The rows that a finding stands on: what it says of them, and what evidence says.

        Raises: UserError for a name that no row with a control has.
        """
        lines = []
        for place, wanted in finding.holds.items():
            one = self.profile(*place.split("."))
            found = signs(one)
            rows = [row for row in one.rows if one.against(row) != row]
            for pattern, text in wanted.items():
                if not (named := fnmatch.filter(rows, pattern)):
                    raise UserError(f"{place}: no row {pattern!r}; there are {', '.join(rows)}.")
                for row in named:
                    seen = seen_of(one, row, found.get(row), text)
                    holds = seen in (SIGNS - {text[4:]} if text.startswith("not ") else {text})
                    line = {"one": one, "row": row, "wanted": text, "seen": seen, "holds": holds}
                    lines.append(line)
        return lines

    def holds(self, finding: Finding) -> bool:
        """Whether the evidence that is here says what a finding says."""
        lines = self.support(finding)
        return bool(lines) and all(line["holds"] for line in lines)
