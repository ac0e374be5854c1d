"""What holds of the repository as a whole: imports point down, notebooks are thin, pins agree."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

SOURCES = sorted(ROOT.glob("replib/**/*.py"))
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
LOWER = {  # a part -> the parts it may import, besides itself
    "errors": set(),
    "foreign": set(),
    "parallel": set(),
    "workers": set(),
    "machine": {"parallel"},
    "kernels": {"errors"},
    "branches": {"kernels"},
    "squeezing": {"branches", "kernels"},
    "sharing": {"squeezing", "branches", "kernels"},
    "blocks": {"sharing", "branches", "kernels"},
    "networks": {"blocks", "branches", "parallel"},
    "narrowing": {"networks", "blocks"},
    "convert": {"fusing", "networks", "blocks", "branches", "kernels"},
    "fusing": {"networks", "blocks"},
    "verification": {"fusing", "networks", "blocks"},
    "export": {"verification", "fusing", "networks"},
    "quantization": {"networks", "blocks"},
    "models": {"blocks"},
    "sources": {"blocks", "branches", "kernels"},
    "architectures": {"sources", "models"},
    "official": {"networks", "architectures", "sources", "models", "blocks", "branches", "kernels"},
    "methods": {
        "parallel", "training", "models", "networks", "blocks", "branches", "kernels",
        "official", "narrowing",
    },
    # blocks and branches: what decays, by kind and place
    "training": {"parallel", "workers", "fusing", "blocks", "branches"},
    "transfer": {"training", "fusing", "networks", "blocks"},
    "checkpoint": {"training", "models", "blocks", "branches"},
    "analysis": {
        "methods", "training", "machine", "networks", "blocks", "branches", "kernels"
    },
    "experiments": {
        "analysis", "machine", "checkpoint", "training", "methods", "official", "models", "fusing",
        "blocks", "parallel", "narrowing", "transfer", "quantization",
        "workers",
    },
    "benchmark": {
        "analysis", "export", "verification", "training", "methods", "official", "models",
        "convert", "branches", "fusing", "networks", "blocks", "machine", "quantization",
        "workers",
    },
    "tools": {
        "experiments", "training", "checkpoint", "official", "export", "verification", "fusing",
        "models", "networks", "branches",
    },
    "report": {
        "benchmark", "experiments", "analysis", "training", "models", "fusing", "blocks",
        "branches", "kernels", "methods", "workers",
    },
    "__main__": {
        "report", "benchmark", "tools", "experiments", "training", "blocks", "parallel",
    },
    "__init__": {"blocks", "convert", "export", "fusing", "official", "verification"},
}  # fmt: skip
HEAVY = ("papermill", "nbconvert", "IPython", "matplotlib", "torchvision", "jupyter_client")


def part(path: Path) -> str:
    """The first name below replib."""
    inside = path.relative_to(ROOT / "replib").parts[0]
    return inside.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of replib that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "replib":
                names = [f"replib.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("replib.")}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = part(path)
    assert own in LOWER, "a new part: say in the table above what it may import"
    assert imported(path) <= LOWER[own] | {own, "errors", "foreign"}


def test_the_parts_themselves_are_in_order():
    """No circle in the table above, `__init__` apart: it only gathers names."""
    order: list[str] = []
    rest = dict(LOWER)
    while rest:
        free = [name for name, lower in rest.items() if lower <= set(order)]
        assert free, f"a circle among {sorted(rest)}"
        order += free
        rest = {name: lower for name, lower in rest.items() if name not in free}


def test_nothing_imports_notebooks():
    for path in SOURCES:
        assert not re.search(r"^\s*(from|import)\s+notebooks", path.read_text(), re.M), path


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import replib",
        "from replib.__main__ import main; main(['run', 'tiny9', '--profile', 'tiny'])",
    ],
    ids=["import", "run"],
)
def test_no_notebook_stack_is_imported(code, shared_project):
    """The GPU machine has no papermill; matplotlib and torchvision are slow to import."""
    script = f"{code}\nimport sys\nfor name in {HEAVY}: assert name not in sys.modules, name"
    environment, folder = shared_project.environment, shared_project.folder
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- notebooks -----------------------------------------------------------------------------------
@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebooks_are_committed_without_outputs(notebook):
    for cell in code_cells(notebook):
        assert cell["outputs"] == [] and cell["execution_count"] is None


def test_notebooks_have_one_cell_of_parameters(notebook, request):
    """Flat literals; for a table, with the names that papermill injects."""
    tagged = [c for c in code_cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    statements = ast.parse("".join(tagged[0]["source"])).body
    values = {s.targets[0].id: ast.literal_eval(s.value) for s in statements}
    tables, name = {path.name for path in (ROOT / "params").glob("*/")}, request.node.callspec.id
    if name == "table":  # the notebook of every table that has none of its own
        assert values.pop("table") in tables
    if name in {*tables, "table"}:
        assert values.keys() == {"profile", "settings"} and values["settings"] == []


def test_notebooks_are_thin(notebook):
    for cell in code_cells(notebook):
        source = "".join(cell["source"])
        assert len(source.splitlines()) <= 15
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 5


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_formulas_need_no_typesetting(notebook):
    """Pages run no script, so that nothing would turn TeX into a formula."""
    assert not re.search(r"\$\$|\\\\(frac|sum|text|partial)", notebook.read_text(encoding="utf-8"))


def test_every_table_has_its_profiles_and_words_of_its_own():
    """In a notebook of its name, or, where the notebook of all tables serves it, in `method`."""
    own = {path.stem for path in NOTEBOOKS}
    assert "table" in own
    for folder in (ROOT / "params").glob("*/"):
        assert {"quick", "smoke"} <= {path.stem for path in folder.iterdir()}
        stated = yaml.safe_load((folder / "quick.yaml").read_text(encoding="utf-8")).get("method")
        assert (folder.name in own) != bool(stated), folder.name


# -- packaging -----------------------------------------------------------------------------------
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_line_of_the_lock_is_pinned_once():
    for line in LOCK:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.+!-]*( ; sys_platform == \"linux\")?", line)
    names = [canonical(line.split("==")[0]) for line in LOCK]
    assert len(set(names)) == len(names)


def test_every_dependency_is_in_the_lock():
    from packaging.requirements import Requirement

    locked = {canonical(line.split("==")[0]): line.split()[0].split("==")[1] for line in LOCK}
    extras = PROJECT["optional-dependencies"].values()
    for text in (*PROJECT["dependencies"], *(one for extra in extras for one in extra)):
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[canonical(wanted.name)]), text
    assert (locked["torch"], locked["torchvision"]) == ("2.11.0", "0.26.0")


def test_conda_installs_from_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip["pip"][0] == "-r requirements.lock"
    assert all("==" not in line for line in pip["pip"]), "a second place for versions"


def test_make_setup_installs_from_the_lock():
    recipe = (ROOT / "Makefile").read_text()
    assert "install --quiet --disable-pip-version-check -r $(LOCK)" in recipe
    assert "LOCK ?= requirements.hashes" in recipe


def tracked() -> list[Path]:
    """The files of the repository; without git, the sources."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = filter(None, listed.stdout.split("\0"))
    return [p for p in map(ROOT.joinpath, names) if p.is_file()] or SOURCES


def test_no_path_of_a_machine_is_tracked():
    machine = re.compile(rb"/" + rb"(root|home|tmp|Users)/[A-Za-z0-9_]")
    assert [str(p) for p in tracked() if machine.search(p.read_bytes())] == []


def test_published_evidence_is_whole():
    from replib.experiments.store import read_evidence

    for path in (ROOT / "reports" / "evidence").glob("*.json"):
        evidence = read_evidence(path)
        assert evidence is not None and evidence["result"]["key"].startswith(path.stem)
