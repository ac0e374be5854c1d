"""A file of one's own that registers families: run by its user's word alone, a part of the key."""

import pytest
import torch
from conftest import Project
from test_blocks import close, scrambled
from test_cli import refused

from replib import fuse, verify
from replib.__main__ import main
from replib.blocks import BLOCKS, own
from replib.checkpoint import load_model, save_model
from replib.errors import UserError
from replib.experiments.cells import key_of, versions_of
from replib.experiments.params import Cell
from replib.experiments.store import Store
from replib.models import build

FILE = """
from replib.blocks import BLOCKS, RepBlock
from replib.branches import Chain

class Twice(RepBlock):
    main_name = "first"

    def declare(self, g):
        return {name: Chain(g.conv(), g.norm()) for name in ("first", "second")}

BLOCKS["twice"] = Twice
"""
TABLE = """
title: "Mine"
question: "Does it run?"
proxy: "Digits."
control: plain
seeds: [0, 1]
cell:
  {data: digits, train_images: 40, held_out: 10, body: digits, epochs: 2, learning_rate: 0.1,
   batch_size: 20}
recipes: {}
rows:
  plain: {label: "Plain", set: {block: convbn}}
  twice: {label: "Twice", set: {block: twice}}
"""


@pytest.fixture(autouse=True)
def forgotten():
    """No test leaves a family behind."""
    before = dict(BLOCKS), dict(own.OWN)
    yield
    for registry, kept in zip((BLOCKS, own.OWN), before, strict=True):
        registry.clear()
        registry.update(kept)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_blocks.py"
    path.write_text(FILE)
    return path


def cell(block: str, **more) -> Cell:
    values = {"data": "digits", "body": "digits", "seed": 0, "epochs": 1, "learning_rate": 0.1}
    return Cell.model_validate(values | {"block": block} | more)


@torch.no_grad()
def test_a_family_of_one_s_own_does_what_others_do(file, tmp_path):
    assert own.read(file) == ["twice"] == own.read(file)  # a second time changes nothing
    assert [source.path for source in own.sources()] == [str(file)]
    model = scrambled(build("digits", "twice", classes=10, in_channels=1)).eval()
    x = torch.randn(2, 1, 8, 8)
    assert verify(model, fuse(model), x).ok
    save_model(model, tmp_path / "net.safetensors")
    close(load_model(tmp_path / "net.safetensors")(x), model(x), 0)
    del BLOCKS["twice"]
    with pytest.raises(ValueError, match=r"'twice', which is not known; .* --blocks FILE.py"):
        load_model(tmp_path / "net.safetensors")


BAD = {
    "no Python": ("class", [", line 1: SyntaxError"]),
    "it fails": ("import torch\n\n1 / 0", [", line 3: ZeroDivisionError"]),
    "it fails elsewhere": (
        "from replib.blocks import BLOCKS\nBLOCKS['convbn']('a')",
        [", line 2: TypeError"],
    ),
    "nothing": ("x = 1", ["registers no family", "BLOCKS['NAME'] = CLASS"]),
    "taken": (FILE.replace('["twice"]', '["dbb"]'), ["'dbb' is a family already"]),
    "no name": (FILE.replace('["twice"]', '["Twice one"]'), ["'Twice one' must be letters"]),
    "no block": (FILE.replace("= Twice", "= 3"), ["BLOCKS['twice'] must be a subclass"]),
    "removed": (f"{FILE}\ndel BLOCKS['acb']", ["'acb' is a family already"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_none_changes_nothing(case, file, capfd):
    text, named = BAD[case]
    file.write_text(text)
    before = dict(BLOCKS)
    refused(capfd, ["run", "table2", "--blocks", str(file)], [str(file), *named])
    assert before == BLOCKS and list(before) == list(BLOCKS) and not own.OWN


def test_a_file_that_is_absent(tmp_path, capfd):
    refused(capfd, ["run", "table2", "--blocks", str(tmp_path / "no.py")], ["No such file"])


def test_its_digest_is_a_part_of_the_key_of_its_cells_alone(file):
    plain = key_of(cell("convbn"), "data"), versions_of(cell("convbn"))
    own.read(file)
    (source,) = own.sources()
    assert versions_of(cell("twice"))["file:twice"] == source.digest
    drawn = cell("convbn", block_options={"drawn_as": "twice"})
    assert versions_of(drawn)["file:twice"] == source.digest
    assert (key_of(cell("convbn"), "data"), versions_of(cell("convbn"))) == plain
    first = key_of(cell("twice"), "data")
    own.OWN.clear()
    del BLOCKS["twice"]
    with pytest.raises(ValueError, match=r"must be one of .*--blocks FILE.py"):
        cell("twice")
    file.write_text(FILE + "# another\n")
    own.read(file)
    assert key_of(cell("twice"), "data") != first


def test_a_worker_runs_what_was_read_and_not_what_the_file_is_by_then(file):
    own.read(file)
    (source,) = own.sources()
    file.write_text("1 / 0")
    own.OWN.clear()
    del BLOCKS["twice"]
    assert own.run(source) == ["twice"]


def test_a_table_of_one_s_own_is_run(file, project: Project, in_process, capfd):
    table = project.folder / "mine.yaml"
    table.write_text(TABLE)
    refused(capfd, ["run", str(table)], ["rows.twice.set.block (='twice')", "--blocks FILE.py"])
    assert main(["run", str(table), "--blocks", str(file), "--device", "cpu"]) == 0
    said = capfd.readouterr().out
    assert "4 cells trained" in said and "over plain, in points: " in said
    rows = [line.split()[0] for line in said.splitlines() if "seeds: 2" in line]
    assert rows == ["plain", "twice"]
    keys = {path.parent.name for path in Store().runs.glob("*/result.json")}
    assert len(keys) == 4
    assert main(["run", str(table), "--blocks", str(file), "--device", "cpu"]) == 0
    assert "0 cells trained, 4 were there" in capfd.readouterr().out


def test_no_table_names_a_file_that_is_run(file, project: Project, capfd):
    table = project.folder / "mine.yaml"
    texts = f"{TABLE}\nblocks: {file}", TABLE.replace("{data", f"{{blocks: {file}, data")
    for text in (*texts, TABLE.replace("block: twice", f"block: {file}")):
        table.write_text(text)
        refused(capfd, ["run", str(table)], ["mine.yaml", "block"])
    assert not own.OWN


def test_what_is_made_of_it_needs_it_again(file, project: Project, in_process, capfd):
    out = project.folder / "net.safetensors"
    train = ["train", "--body", "digits", "--block", "twice", "--data", "digits", "--epochs", "1",
             "--train-images", "40", "--device", "cpu", "--out", str(out)]  # fmt: skip
    assert main([*train, "--blocks", str(file)]) == 0
    (folder,) = Store().runs.iterdir()
    assert main(["test", str(out), "--data", "digits", "--blocks", str(file)]) == 0
    del BLOCKS["twice"]
    own.OWN.clear()
    capfd.readouterr()
    refused(capfd, ["test", str(out), "--data", "digits"], ["'twice'", "--blocks FILE.py"])
    again = [*train, "--start", folder.name]
    again[again.index("twice")] = "convbn"
    refused(capfd, again, [f"start (='{folder.name}')", "'twice'", "--blocks FILE.py"])


@pytest.mark.slow
def test_worker_processes_know_it(file, project: Project):
    table = project.folder / "mine.yaml"
    table.write_text(TABLE)
    arguments = ["run", str(table), "--blocks", str(file), "--workers", "2", "--device", "cpu"]
    status, out, error = project.run(*arguments)
    assert (status, error) == (0, "") and "4 cells trained" in out


def test_an_error_of_several_lines_is_told_in_one(file):
    file.write_text("raise ValueError('two\\nlines')")
    with pytest.raises(UserError, match=r"line 1: ValueError: two lines$"):
        own.read(file)
