"""What pages say in words: a file per method, and the findings; numbers in them are looked up.

    pages/methods/NAME.yaml    a method, explained in one screen
    pages/findings.yaml        what the tables say, each sentence with the rows that it stands on

A number is not typed in these words: `{TABLE.PROFILE.ROW.QUANTITY}` is looked up in the evidence
when a page is made (replib.report.lookup says what can be asked for). Digits may stand in
`code`, in the size of a kernel (3×3), and in a name that begins with a capital letter (ResNet-18).
Formulas may hold whole numbers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from replib.errors import UserError
from replib.experiments.params import Strict, parse_yaml, short
from replib.experiments.store import home

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
CODE = re.compile(r"`([^`]*)`")
NAME = r"\b[A-Z][\w-]*"
KERNEL = r"\b[0-9k]+(?:×[0-9k]+)+"
NO_NUMBER = re.compile("|".join((PLACEHOLDER.pattern, CODE.pattern, NAME, KERNEL)))
COUNTS = re.compile(
    r"\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozens?|hundreds?|thousands?|"
    r"twice|half|halves|thirds?|quarters?|percent)\b",
    re.IGNORECASE,
)


def typed_number(words: str) -> str | None:
    """The first number in words that is neither looked up nor part of a name, a size or code."""
    found = re.search(r"[0-9][0-9.,]*", NO_NUMBER.sub(" ", words))
    return found and found.group()


def without_numbers(words: str) -> str:
    """Words that may stand on a page. Raises: ValueError with the number that was typed."""
    if (number := typed_number(words)) is not None:
        raise ValueError(f"{number} is typed; name its evidence, as {{TABLE.PROFILE.ROW.gain}}")
    return words


def without_counts(words: str) -> str:
    """The same for words about results, where a count in letters is a number, too."""
    if found := COUNTS.search(CODE.sub(" ", PLACEHOLDER.sub(" ", words))):
        raise ValueError(
            f"{found.group()!r} is typed; name its evidence, as {{TABLE.PROFILE.rows}}"
        )
    return without_numbers(words)


def without_results(formula: str) -> str:
    """A formula. Raises: ValueError for a decimal fraction, which is a result or a setting."""
    if found := re.search(r"[0-9]+[.,][0-9]+", formula):
        raise ValueError(f"{found.group()} is no part of a formula")
    return formula


Words = Annotated[str, Field(min_length=1), AfterValidator(without_numbers)]
Said = Annotated[Words, AfterValidator(without_counts)]
Formula = Annotated[str, Field(min_length=1), AfterValidator(without_results)]
Sign = Literal["above", "below", "unclear", "not above", "not below", "diverged"]


class Picture(Strict):
    """The block that is drawn: its family, and what it is built with."""

    block: str
    channels: Annotated[int, Field(gt=0)] = 64
    options: dict[str, Any] = Field(default_factory=dict)


class Method(Strict):
    """A method, as its page explains it."""

    name: str
    paper: str  # of the catalogue: links, tables, figures
    line: Words  # what it is, in one line, for the index
    idea: list[Words]  # paragraphs
    picture: Picture
    caption: Words | None = None  # what the picture does not show
    formulas: dict[Words, Formula]  # what it says -> the formula
    symbols: Words
    here: Words | None = None  # how it is used here, other than as a block
    code: str  # Python, short
    pitfalls: Annotated[list[Words], Field(min_length=1)]  # of the released code, and what we do
    first: str  # the notebook or table to open first
    also: list[str] = Field(default_factory=list)  # other notebooks


class Finding(Strict):
    """A sentence, the items of the catalogue that it is about, and what evidence must say for it.

    holds: TABLE.PROFILE -> row, or a pattern of rows ("*_official") -> the sign of their gains:
    above or below their control by more than seeds differ, or unclear; or that all runs diverged.
    """

    line: Said
    says: Said
    about: Annotated[list[str], Field(min_length=1)]  # PAPER/ITEM
    holds: Annotated[dict[str, dict[str, Sign]], Field(min_length=1)]


class Findings(Strict):
    findings: dict[str, Finding] = Field(default_factory=dict)


def folder() -> Path:
    """Where these files are."""
    return home() / "pages"


def methods() -> dict[str, Method]:
    """All methods by the names of their files. Raises: UserError in one line."""
    return {path.stem: declared(path, Method) for path in sorted(folder().glob("methods/*.yaml"))}


def findings() -> dict[str, Finding]:
    """All findings. Raises: UserError in one line."""
    path = folder() / "findings.yaml"
    return declared(path, Findings).findings if path.is_file() else {}


def declared(path: Path, model: type[Strict]) -> Any:
    """A file, checked. Raises: UserError in one line."""
    try:
        return model.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = first.get("input")
        shown = "" if isinstance(value, dict) else f" (={short(value)})"
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {key}{shown}: {said}.") from None
