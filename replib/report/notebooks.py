"""Notebooks that stand for themselves: no folder in params/, all they need in one tagged cell."""

from __future__ import annotations

import ast
import warnings
from fnmatch import fnmatch

from replib.errors import UserError
from replib.experiments.params import apply_settings
from replib.experiments.store import home
from replib.foreign import in_one_line, json_of
from replib.report.results import profiles

GENERIC = "table"  # the notebook of every table that has none of its own name
PROOFS = ("proof-*", "why-*")  # what `make proofs` runs
READERS = ("bench", "latency")  # rendered by `make reports`: they read files, compute nothing


def notebooks() -> list[str]:
    """The names of the notebooks that belong to no table."""
    names = {path.stem for path in (home() / "notebooks").glob("*.ipynb")}
    return sorted(names - profiles().keys() - {GENERIC})


def proofs() -> list[str]:
    """Those of them that prove or explain."""
    return [name for name in notebooks() if any(fnmatch(name, pattern) for pattern in PROOFS)]


def cells(name: str, kind: str) -> list[tuple[list[str], str]]:
    """(tags, source) of every cell of a kind, "code" or "markdown".

    Raises: UserError for a file that is no notebook.
    """
    path = home() / "notebooks" / f"{name}.ipynb"
    try:
        return [
            (list(cell["metadata"].get("tags", [])), "".join(cell["source"]))
            for cell in json_of(path)["cells"]
            if cell["cell_type"] == kind
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no notebook ({in_one_line(error)}).") from None


def title(name: str) -> str:
    """The first heading."""
    lines = (line for _, source in cells(name, "markdown") for line in source.splitlines())
    return next((line.lstrip("# ") for line in lines if line.startswith("# ")), name)


def parameters(name: str) -> dict:
    """The names and values of the cell tagged `parameters`, which is read and not run.

    Raises: UserError where it holds anything but plain names and literals.
    """
    tagged = [source for tags, source in cells(name, "code") if "parameters" in tags]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a compiler finds odd in literals
            body = ast.parse("\n".join(tagged)).body
        return {line.targets[0].id: ast.literal_eval(line.value) for line in body}
    except (
        SyntaxError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise UserError(
            f"notebook {name}: its parameters must be lines NAME = LITERAL ({in_one_line(error)})."
        ) from None


def changed(name: str, settings: list[str]) -> dict:
    """What `--set key=value` changes, as papermill takes it.

    Raises: UserError for a name that the notebook does not have, or a value of another type.
    """
    known, given = parameters(name), apply_settings({}, settings)
    for key, value in given.items():
        if key not in known:
            have = ", ".join(known) or "none"
            raise UserError(f"{name} has no parameter {key!r}; its parameters: {have}.")
        wanted = type(known[key])
        if wanted is float and type(value) is int:
            given[key] = value = float(value)
        if type(value) is not wanted:
            raise UserError(f"{key} (={value!r}) must be of type {wanted.__name__}.")
    return given
