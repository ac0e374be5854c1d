"""Where the packages come from: hashes, licences, known vulnerabilities, and a wheel that works."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from test_project import LOCK, PROJECT, canonical

HASHES = (ROOT / "requirements.hashes").read_text(encoding="utf-8")
NOTEBOOKS = ("papermill", "nbconvert", "jupyterlab", "IPython")  # not a part of the core


def script(name: str):
    """A module of .ci, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- hashes --------------------------------------------------------------------------------------
def hashed() -> dict[str, list[str]]:
    """A pin as the lock writes it, name canonical -> the hashes of its files."""
    found: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", HASHES.strip()):
        pin, *hashes = re.split(r"\s*\\\n\s*", entry)
        found[pin] = [one.removeprefix("--hash=sha256:") for one in hashes]
    return found


def pinned(line: str) -> tuple[str, str, str]:
    """(name, version, marker) of a line, however it is spelt."""
    wanted = Requirement(line)
    return canonical(wanted.name), str(wanted.specifier), str(wanted.marker or "")


def test_the_hashes_are_of_the_lock():
    """`make hashes` was run after the last change of a version."""
    assert sorted(map(pinned, hashed())) == sorted(map(pinned, LOCK))


def test_every_package_has_hashes_and_pip_is_told_no_place():
    """Any index that serves the same files will do; none is named."""
    for pin, hashes in hashed().items():
        assert hashes and all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes), pin
    for text in (HASHES, "\n".join(LOCK)):
        assert not re.search(r"://|@|--(?!hash=)|file:", text)


# -- licences ------------------------------------------------------------------------------------
def test_the_list_of_licences_is_of_the_lock():
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\d\S*) \| (.+) \|$", page, re.M)
    assert sorted(f"{name}=={of}" for name, of, _ in rows) == sorted(
        line.split()[0] for line in LOCK
    )


def test_the_list_of_licences_says_what_the_packages_say():
    """Of those that are installed as they are locked; on Linux these are all."""
    licences, seen = script("licences"), 0
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    for name, wanted in licences.locked().items():
        try:
            if version(name) != wanted:
                continue
        except PackageNotFoundError:
            continue
        seen += 1
        assert f"| {name} | {wanted} | {licences.stated(name).replace('|', '/')} |" in page
    assert seen > 100


# -- known vulnerabilities -----------------------------------------------------------------------
BUG = {"id": "PYSEC-2026-1", "fix_versions": ["1.1"], "description": "", "aliases": []}


def package(name: str, **more) -> dict:
    return {"name": name, "version": "1.0", "vulns": []} | more


@pytest.mark.parametrize(
    "packages, accepted, bad, said",
    [
        ([package("a")], "", False, "1 of 1 packages asked for, 0 vuln"),
        ([package("a", vulns=[BUG])], "", True, "a 1.0: PYSEC-2026-1, mended in 1.1"),
        ([package("a", vulns=[BUG])], "PYSEC-2026-1: why", False, "0 vulnerabilities that SEC"),
        ([{"name": "a", "skip_reason": "x"}], "", False, "NOT DONE: the service knows none of"),
        ([package("b"), {"name": "a", "skip_reason": "x"}], "", False, "NOT ASKED FOR, unknown"),
    ],
    ids=["none", "new", "accepted", "no service", "one unknown"],
)
def test_what_an_audit_says(packages, accepted, bad, said):
    lines, found_bad = script("audit").judged(json.dumps({"dependencies": packages}), accepted)
    assert found_bad is bad and said.partition(" SEC")[0] in " ".join(lines)


@pytest.mark.parametrize("how", ["absent", "no network"])
def test_an_audit_that_was_not_made_says_so(how, monkeypatch, capfd):
    audit = script("audit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: how != "absent" or None)
    monkeypatch.setattr(audit, "COMMAND", [sys.executable, "-c", "raise SystemExit(1)"])
    assert audit.main() == 0
    assert "NOT DONE" in capfd.readouterr().out


# -- the wheel -----------------------------------------------------------------------------------
def core() -> set[str]:
    """The distributions that a plain installation has: what the core needs, and they need."""
    seen, wanted = set(), [Requirement(text) for text in PROJECT["dependencies"]]
    while wanted:
        one = wanted.pop()
        if (canonical(one.name), frozenset(one.extras)) in seen:
            continue
        seen.add((canonical(one.name), frozenset(one.extras)))
        try:
            needed = map(Requirement, distribution(one.name).requires or [])
        except PackageNotFoundError:  # of another platform
            continue
        for need in needed:
            asked = ({"extra": extra} for extra in ("", *one.extras))
            if need.marker is None or any(map(need.marker.evaluate, asked)):
                wanted.append(need)
    return {name for name, _ in seen}


def linked(names: set[str], folder: Path) -> None:
    """These installed distributions, without any other, in another environment."""
    for name in names:
        for file in distribution(name).files or []:
            top, link = file.parts[0], folder / file.parts[0]
            if top not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(Path(distribution(name).locate_file(top)))


@pytest.mark.slow
def test_a_wheel_trains_without_the_notebooks_packages(tmp_path):
    """Built, installed into a bare environment, with the core's packages alone: those of this one,
    or with REPLIB_INDEX=1 (`make test-wheel`) installed anew from the index, by their hashes."""
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run([sys.executable, *map(str, build)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("replib-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "REPLIB_HOME")}
    install = [python, "-m", "pip", "install", "-q", "--no-deps"]
    if os.environ.get("REPLIB_INDEX"):
        pins = {canonical(pin.split("==")[0]): pin for pin in hashed()}
        lines = [
            " ".join([pin, *(f"--hash=sha256:{one}" for one in hashed()[pin])])
            for pin in (pins[name] for name in sorted(core()))
        ]
        (tmp_path / "core.txt").write_text("\n".join(lines))
        from_index = [*install, "--require-hashes", "-r", tmp_path / "core.txt"]
        subprocess.run(from_index, env=environment, check=True)
    else:
        (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
        linked(core(), site)
    here = [*install, "--no-index", wheel]
    subprocess.run(here, env=environment, check=True, capture_output=True)

    def said(*arguments) -> str:
        command = [python, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    absent = "import importlib.util as u; print([n for n in {} if u.find_spec(n)])"
    assert said("-c", absent.format(NOTEBOOKS)).strip() == "[]"
    assert str(tmp_path) in said("-c", "import replib; print(replib.__file__)")
    small = ["--epochs", "1", "--train-images", "60", "--held-out", "20", "--batch-size", "20"]
    train = ["-m", "replib", "train", "--data", "digits", "--body", "digits", *small]
    said(*train, "--out", "net.safetensors")
    said(
        "-m", "replib", "deploy", "net.safetensors", "--data", "digits", "--out", "out.safetensors"
    )
    assert (tmp_path / "out.safetensors").stat().st_size < (
        tmp_path / "net.safetensors"
    ).stat().st_size
