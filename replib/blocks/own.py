"""Families of one's own: a Python file, named on the command line, that registers them.

    from replib.blocks import BLOCKS, RepBlock

    class Twice(RepBlock):
        main_name = "first"

        def declare(self, g):
            return {name: g.conv() for name in ("first", "second")}

    BLOCKS["twice"] = Twice

The file is code and is run: nothing but its user's own `--blocks FILE.py` ever names one, no
parameter file, no checkpoint and no evidence does. It is one file, whose digest is a part of the
key of every cell that uses a family of it; what it imports in turn is not.
"""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
import types
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from replib.blocks import BLOCKS, RepBlock
from replib.errors import UserError

NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Source:
    """A file as it was read; worker processes run this and not what the file is by then."""

    path: str
    code: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.code).hexdigest()


OWN: dict[str, Source] = {}  # family -> the file that registered it


def sources() -> list[Source]:
    """The files that families of this process come from, each once, in order."""
    return list(dict.fromkeys(OWN.values()))


def digests(names: Collection[str]) -> dict[str, str]:
    """family -> digest of its file, of those of these names that come from one."""
    return {name: OWN[name].digest for name in sorted(set(names) & OWN.keys())}


def read(path: Path) -> list[str]:
    """Run a file of one's own and return the families that it registers.

    Raises: OSError where it cannot be read; UserError as `run` does.
    """
    return run(Source(str(path), path.read_bytes()))


def run(source: Source) -> list[str]:
    """The families that a file registers in `BLOCKS`; run a second time it changes nothing.

    Raises: UserError, in one line, where it fails, registers none, or a name that is taken; then
    nothing is registered.
    """
    known = [name for name, other in OWN.items() if other.digest == source.digest]
    if known:
        return known
    before, where = dict(BLOCKS), f"--blocks (={source.path!r})"
    module = types.ModuleType(f"replib_own_{source.digest[:16]}")
    module.__file__ = source.path
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        try:
            exec(compile(source.code, source.path, "exec"), vars(module))
        except Exception as error:  # whatever a file of our user's does
            line = line_of(error, source.path)
            said = " ".join(str(error).split()) or "no message"
            raise UserError(f"{where}{line}: {type(error).__name__}: {said}") from None
        for name in before:
            if BLOCKS.get(name) is not before[name]:
                raise UserError(f"{where}: {name!r} is a family already: choose another name.")
        new = {name: family for name, family in BLOCKS.items() if name not in before}
        if not new:
            raise UserError(
                f"{where} registers no family: it must say BLOCKS['NAME'] = CLASS at its end "
                "(from replib.blocks import BLOCKS)."
            )
        for name, family in new.items():
            if not (isinstance(name, str) and NAME.fullmatch(name)):
                raise UserError(f"{where}: the name {name!r} must be letters, digits and _.")
            if not (isinstance(family, type) and issubclass(family, RepBlock)):
                raise UserError(f"{where}: BLOCKS[{name!r}] must be a subclass of RepBlock.")
    except BaseException:
        BLOCKS.clear()
        BLOCKS.update(before)
        del sys.modules[module.__name__]
        raise
    OWN.update(dict.fromkeys(new, source))
    return list(new)


def line_of(error: Exception, path: str) -> str:
    """Where in the file something went wrong: ", line 3"; empty where it is not known."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""
