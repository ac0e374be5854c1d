"""Notebooks that stand for themselves: found, listed, set, rendered with their code, and true."""

import json
import re
import sys

import pytest
from conftest import ROOT
from test_report import offline

from replib.__main__ import main
from replib.blocks import BLOCKS
from replib.report import notebooks, render

PROOFS = sorted(  # notebooks that belong to no table
    path.stem
    for path in ROOT.glob("notebooks/*-*.ipynb")
    if not (ROOT / "params" / path.stem).is_dir()
)


def shown(kind, content):
    """An output of a cell, as IPython's display objects leave it."""
    data = {kind: content, "text/plain": "<IPython object>"}
    return {"output_type": "display_data", "data": data, "metadata": {}}


SMALL = {
    "cells": [
        {"cell_type": "markdown", "id": "t", "metadata": {}, "source": ["# One <b>proof</b>\n"]},
        {
            "cell_type": "code",
            "id": "parameters",
            "execution_count": None,
            "metadata": {"tags": ["parameters"]},
            "outputs": [],
            "source": ["size = 3\n", "rate = 0.5\n", "names = ['a']"],
        },
        {
            "cell_type": "code",
            "id": "c",
            "execution_count": 1,
            "metadata": {},
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["nine 9\n"]},
                shown("image/svg+xml", "<svg id='drawn'></svg>"),
                shown("text/markdown", "*leaning*"),
            ],
            "source": ["print('nine', size**2)  # the code"],
        },
    ],
    "metadata": {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    },
    "nbformat": 4,
    "nbformat_minor": 5,
}


@pytest.fixture
def small(project):
    """A project with the notebook `why-small`, which belongs to no table."""
    for path in (project.folder / "notebooks").glob("*-*.ipynb"):
        path.unlink()
    for path in (project.folder / "params").glob("*/cifar*.yaml"):
        path.unlink()  # their bodies are built to be checked
    path = project.folder / "notebooks" / "why-small.ipynb"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    return project


@pytest.fixture
def unexecuted(small, monkeypatch):
    """Nothing is executed: the parameters that papermill would get are collected instead."""
    given = []

    def execute(name, parameters, copy, here=False):
        given.append(parameters)
        return small.folder / "notebooks" / f"{name}.ipynb"

    monkeypatch.setattr(render, "execute", execute)
    return given


def test_a_page_shows_the_code_before_what_it_made(small, unexecuted, capfd):
    assert main(["reproduce", "why-small"]) == 0
    page = small.folder / "reports" / "why-small.html"
    assert capfd.readouterr().out == f"The report: {page}\n" and unexecuted == [{}]
    words = "".join(offline(page).text)
    assert words.index("size = 3") < words.index("# the code") < words.index("nine 9")
    html = page.read_text(encoding="utf-8")
    assert '<svg id="drawn">' in html and "<em>leaning</em>" in html
    assert "IPython object" not in words
    assert page.name in offline(page.with_name("index.html")).all("href")


def test_the_index_and_the_list_name_what_belongs_to_no_table(small, capfd):
    assert main(["list"]) == 0
    listed = capfd.readouterr().out
    others = listed.partition("In no paper's catalogue\n")[2]
    assert others.split() == ["why-small", "make", "reproduce-why-small"]
    words = "".join(offline(render.index()).text)
    assert "One <b>proof</b>" in words and "make reproduce-why-small" in words


def test_parameters_of_its_own_are_set(small, unexecuted, monkeypatch):
    settings = ["--set", "size=5", "--set", "rate=1", "--set", "names=[b, c]"]
    assert main(["reproduce", "why-small", *settings]) == 0
    monkeypatch.setenv("REPLIB_SET", "size=7")
    assert main(["reproduce", "why-small"]) == 0
    assert unexecuted == [{"size": 5, "rate": 1.0, "names": ["b", "c"]}, {"size": 7}]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--set", "sise=5"], ["'sise'", "size, rate, names"]),
        (["--set", "size=x"], ["size (='x')", "int"]),
        (["--set", "size=1.5"], ["size (=1.5)", "int"]),
        (["--set", "size=true"], ["size (=True)", "int"]),
        (["--set", "size.deep=1"], ["size", "int"]),
        (["--set", "size"], ["expected key=value"]),
        (["--profile", "smoke"], ["profile (='smoke')", "why-small"]),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, named, small, unexecuted, capfd):
    assert main(["reproduce", "why-small", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith("replib: ") and error.count("\n") == 1, error
    assert all(text in error for text in named), error
    assert unexecuted == []


def test_several_are_made_in_one_process(small, capfd):
    """One shell for all, and none of them sees the names of another."""
    first = small.folder / "notebooks" / "why-small.ipynb"
    text = first.read_text().replace("'nine', size**2", "'seen' in globals(), size**2")
    shown = ["import matplotlib.pyplot as plt", "from IPython.display import HTML, display"]
    shown += ["display(plt.subplots()[0])", "HTML(f'<b id=\"bold{size}\">shown</b>')"]
    text = text.replace('  # the code"', f'\\n", {json.dumps(chr(10).join(shown))}')
    second = first.with_name("why-other.ipynb")
    second.write_text(text.replace('"rate = 0.5', '"seen = 1\\n", "rate = 0.5'))
    names = ["why-other", "why-small"]
    first.write_text(text)
    program = sys.modules["__main__"]  # a process that is spawned later starts from it
    assert main(["reproduce", *names, "--set", "size=4"]) == 0
    assert sys.modules["__main__"] is program
    pages = [small.folder / "reports" / f"{name}.html" for name in names]
    told = capfd.readouterr().out
    assert [told.index(f"The report: {page}") for page in pages] == sorted(
        told.index(f"The report: {page}") for page in pages
    )
    assert all('<b id="bold4">shown</b>' in page.read_text() for page in pages)
    assert all(page.read_text().count("data:image/png;base64,") == 1 for page in pages)
    assert "True 16" in pages[0].read_text() and "False 16" in pages[1].read_text()
    links = offline(pages[0].with_name("index.html")).all("href")
    assert {page.name for page in pages} <= set(links)
    first.write_text(text.replace("size**2", "size**2 / 0"))
    before = pages[1].read_bytes()
    assert main(["reproduce", *names]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "ZeroDivisionError" in error, error
    assert pages[1].read_bytes() == before


def test_an_unknown_name_is_told_what_there_is(small, capfd):
    assert main(["reproduce", "why-not"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "'why-not'" in error
    assert "table2" in error and "why-small" in error


def test_proofs_renders_proofs_and_explanations_alone(small, monkeypatch, capfd):
    for name in ("proof-two", "other"):
        (small.folder / "notebooks" / f"{name}.ipynb").write_text(json.dumps(SMALL))
    asked = []
    monkeypatch.setattr(render, "reproduce", lambda *what: asked.append(what) or what[0])
    assert main(["proofs"]) == 0
    assert asked == [("proof-two", "quick", []), ("why-small", "quick", [])]


def test_make_proofs_is_that_command():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^proofs: .*\n\t@\$\(BIN\)/python -m replib proofs$", makefile, re.M)


# -- the notebooks themselves, executed -----------------------------------------------------------
SHORTER = {  # training runs that are as long as a reader's needs to be
    "cycle-in-your-own-loop": ["epochs=3", "cycles=2", "warmup=1"],
    "dyrep-in-your-own-loop": ["epochs=7", "interval=2", "last_epoch=6", "stop=3"],
    "repopt-in-your-own-loop": ["search_epochs=2", "epochs=3", "stop=2"],
    "resrep-in-your-own-loop": ["epochs=2", "pruning_epochs=10", "stop=4"],
    "large-kernels-in-your-own-model": ["epochs=2"],
    "bring-your-own-model": ["per_class=6", "epochs=1", "timm_name=test_resnet", "body=digits"],
    "why-it-may-work": ["noisy_epochs=5", "base_epochs=3", "epochs=2", "warmup=1", "cycles=2"],
    "proof-precision": ["channels=8"],
    "network-sizes": ["items=[repmlp/table2]"],
    "training-costs": ["profile=smoke", "networks=[]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROOFS)
def test_a_notebook_runs_from_the_command_line(name, project, capfd):
    settings = [part for setting in SHORTER.get(name, ()) for part in ("--set", setting)]
    project.run_here("reproduce", name, *settings)
    page = project.folder / "reports" / f"{name}.html"
    assert capfd.readouterr().out.endswith(f"The report: {page}\n")
    words = "".join(offline(page).text)
    assert notebooks.title(name) in words
    if name == "proof-identities":
        text = page.read_text(encoding="utf-8")
        assert text.count("<td>True</td>") == len(BLOCKS) and "<td>False</td>" not in text


@pytest.mark.slow
def test_a_notebook_that_fails_leaves_no_page(small):
    path = small.folder / "notebooks" / "why-small.ipynb"
    path.write_text(path.read_text().replace("size**2", "size**2 / 0"))
    status, _, error = small.run("reproduce", "why-small", "--set", "size=4")
    assert status == 2 and error.count("\n") == 1 and "ZeroDivisionError" in error, error
    assert not (small.folder / "reports" / "why-small.html").exists()


@pytest.mark.slow
def test_what_is_set_arrives(small):
    status, out, error = small.run("reproduce", "why-small", "--set", "size=4")
    assert (status, error) == (0, "") and "nine 16" in out
    assert "nine 16" in (small.folder / "reports" / "why-small.html").read_text()
