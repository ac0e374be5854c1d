"""The licence of every package of requirements.lock, by its own metadata, as docs/licences.md.

`python .ci/licences.py` in an environment that `make setup` made. What a package does not state is
not guessed.
"""

from __future__ import annotations

from collections import Counter
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from replib.training.checkpoint import write_bytes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
NOT_STATED = "not stated in its metadata"
OTHERS = {"Other/Proprietary License", "DFSG approved"}  # classifiers that name no licence


def locked() -> dict[str, str]:
    """name -> version of every package of the lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = (line.split()[0] for line in lines if line and not line.startswith("#"))
    return dict(pin.split("==") for pin in pins)


def stated(name: str) -> str:
    """The licence that an installed package states: its SPDX expression, else one line of its field
    `License`, else its classifiers."""
    of = metadata(name)
    if expression := of.get("License-Expression"):
        return expression
    field = (of.get("License") or "").strip()
    if field and len(field) <= 60 and "\n" not in field and field != "UNKNOWN":
        return field
    classifiers = [c for c in of.get_all("Classifier", []) if c.startswith("License ::")]
    names = {c.rpartition(" :: ")[2] for c in classifiers} - OTHERS
    return ", ".join(sorted(names)) or NOT_STATED


def page() -> str:
    """The list as Markdown. Raises: SystemExit for a package of the lock that is not installed."""
    lines, found = [], Counter()
    for name, version in sorted(locked().items(), key=lambda pin: pin[0].lower()):
        try:
            licence = stated(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is in the lock and not installed: run make setup.") from None
        found[licence] += 1
        lines.append(f"| {name} | {version} | {licence.replace('|', '/')} |")
    silent = found[NOT_STATED]
    return "\n".join(
        [
            "# Licences of the locked packages",
            "",
            f"What the {len(lines)} packages of `requirements.lock` state in their own metadata, "
            f"written by `make licences`; {silent} state nothing there. The packages named "
            "nvidia-* and cuda-* are Nvidia's and come with torch on Linux. None of these packages "
            "is part of this repository, or of a wheel built from it.",
            "",
            "| package | version | licence |",
            "|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    write_bytes(PAGE, page().encode())
    print(PAGE.relative_to(ROOT))
