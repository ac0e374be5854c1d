"""A mistake gets exit status 2 and one line on standard error: in this process and in a shell."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image
from test_params import BAD_SETTINGS

from replib.__main__ import COMMANDS, main
from replib.experiments import executor
from replib.training import checkpoint

# the arguments, and what the line must name
BAD_COMMANDS = {
    "no such table": (["run", "table0"], ["'table0'", "table2"]),
    "a path as a table": (["run", "../params/table2"], ["'../params/table2'", "table2"]),
    "no such profile": (["run", "table2", "--profile", "quik"], ["'quik'", "quick", "smoke"]),
    "no such profile, page": (["reproduce", "table2", "--profile", "x"], ["'x'", "quick", "smoke"]),
    "no such profile, publish": (["publish", "table2", "--profile", "x"], ["'x'", "quick"]),
    "a newline": (["run", "table2", "--profile", "a\nb"], ["'a\\nb'"]),
    "no workers": (["run", "table2", "--workers", "0"], ["--workers (=0)", "above 0"]),
    "no time": (["run", "table2", "--budget-seconds", "-1"], ["--budget-seconds (=-1.0)"]),
    "no time, page": (["reproduce", "table2", "--budget-seconds", "nan"], ["(=nan)"]),
    "half a worker": (["run", "table2", "--workers", "0.5"], ["--workers", "0.5"]),
    "an unknown option": (["run", "table2", "--foo"], ["--foo", "--help"]),
    "an unknown command": (["fly"], ["fly", "run"]),
    "no command": ([], ["COMMAND"]),
    "no bundle": (["evidence", "add", "absent.json"], ["absent.json"]),
    "a wrong type, page": (["reproduce", "table2", "--set", "seeds=x"], ["seeds (='x')"]),
    "no digits there": (["run", "table2", "--set", "cell.train_images=2000"], ["2000", "1000"]),
    "no folder": (["run", "table2", "--set", "cell.data=imagefolder"], ["data_dir"]),
    "no start": (
        ["run", "table2", "--set", "rows.repvgg.start=absent.pth"],
        ["start (='absent.pth')", "file"],
    ),
    "another body's start": (
        ["run", "table2", "--set", "rows.plain.start=repvgg"],
        ["block (='convbn')", "repvgg"],
    ),
}


def one_line(error: str, named: list[str]) -> None:
    """Exactly one line on standard error that names all that."""
    assert error.startswith("replib: ") and error.endswith("\n") and error.count("\n") == 1, error
    assert "Traceback" not in error
    for text in named:
        assert text in error, error


def refused(capfd, arguments: list[str], named: list[str]) -> None:
    """`main` says so in one line, with status 2."""
    assert main(arguments) == 2
    one_line(capfd.readouterr().err, named)


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_command(case, project, capfd):
    refused(capfd, *BAD_COMMANDS[case])
    assert not (project.folder / "reports" / "runs").exists()


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting(case, project, capfd):
    setting, named = BAD_SETTINGS[case]
    refused(capfd, ["run", "table2", "--set", setting], named)


@pytest.mark.slow
def test_in_a_shell(shared_project):
    """The same through a real process: status, and nothing else on standard error."""
    status, out, error = shared_project.run("run", "table2", "--set", "cell.batchsize=3")
    assert (status, out) == (2, "")
    one_line(error, ["batchsize", "batch_size"])


# -- data ----------------------------------------------------------------------------------------
def tree(root: Path, images: int = 2, parts: tuple[str, ...] = ("train", "test")) -> Path:
    """A folder of two classes of small pictures."""
    for part in parts:
        for name, grey in (("cat", 20), ("dog", 200)):
            (root / part / name).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (8, 8), (grey, i, 0)).save(root / part / name / f"{i}.png")
    return root


def spoil(root: Path, what: str) -> None:
    """Make a data folder wrong in one way."""
    if what == "empty":
        root.mkdir()
        return
    if what == "missing":
        return
    tree(root, parts=("train",) if what == "no test part" else ("train", "test"))
    first = root / "train" / "cat" / "0.png"
    if what == "one image":
        first.unlink()
    elif what == "no image":
        first.write_bytes(b"")
    elif what == "not an image":
        (root / "train" / "dog" / "1.png").write_text("no picture")
    elif what == "half an image":
        Image.effect_noise((64, 64), 99).save(first)
        first.write_bytes(first.read_bytes()[:2000])
    elif what == "a strange class":
        tree(root / "more", parts=("test",))
        (root / "more" / "test" / "cat").rename(root / "test" / "emu")
    elif what == "one class":
        for part in ("train", "test"):
            for file in (root / part / "dog").iterdir():
                file.unlink()
            (root / part / "dog").rmdir()


BAD_FOLDERS = {
    "missing": ["'train'", "data_dir"],
    "empty": ["'train'", "data_dir"],
    "no test part": ["'test'", "data_dir"],
    "one image": ["cat has 1 image", "at least 2"],
    "one class": ["1 class folders", "at least 2"],
    "no image": ["0.png", "image"],
    "not an image": ["1.png", "not a readable image"],
    "half an image": ["0.png", "image"],
    "a strange class": ["emu", "class"],
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_bad_data_folder(what, project, capfd):
    folder = project.folder / "pictures"
    spoil(folder, what)
    settings = ["cell.data=imagefolder", f"cell.data_dir={folder}", "cell.image_size=8"]
    settings += ["cell.train_images=4", "cell.held_out=2"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    refused(capfd, ["run", "table2", *arguments], [str(folder), *BAD_FOLDERS[what]])


# -- where results go ----------------------------------------------------------------------------
def test_results_that_cannot_be_written(project, capfd):
    (project.folder / "reports").write_text("a file, where a folder should be")
    refused(capfd, ["run", "table2", "--profile", "smoke"], ["reports/runs", "Not a directory"])


def no_permission(*arguments, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "reports/runs")


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "reports/runs/abc")


def test_no_permission(project, capfd, monkeypatch):
    monkeypatch.setattr(Path, "touch", no_permission)
    refused(capfd, ["run", "table2"], ["reports/runs", "Permission denied", "permissions"])


@pytest.mark.parametrize("moment", ["checkpoint", "weights", "result"])
def test_no_space(moment, project, in_process, capfd, monkeypatch):
    """Full at whatever moment: one line; and with room again, the run goes on to the end."""
    from replib.experiments import store

    project.table("table9", TINY)
    real = checkpoint.write_bytes

    def failing(path, content):
        if path.name.startswith(moment):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    command = ["run", "table9", "--profile", "tiny", "--checkpoint-seconds", "1e-9"]
    for row in ("official", "preserving", "distilled", "teacher", "control"):
        command += ["--set", f"rows.{row}="]
    command += ["--set", "control=base"]
    with monkeypatch.context() as full:
        full.setattr(checkpoint, "write_bytes", failing)
        full.setattr(store, "write_bytes", failing)
        refused(capfd, command, ["No space left on device", "make room", moment])
    assert main(command) == 0
    assert "1 cells trained, 0 were there" in capfd.readouterr().out


def test_a_half_written_file_is_never_seen(tmp_path, monkeypatch):
    """Out of space while writing: the old content stays, nothing lies beside it."""
    path = tmp_path / "result.json"
    checkpoint.write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_two_machines_write_a_file_at_once(tmp_path, monkeypatch):
    """Their processes have the same number; each renames what it wrote itself."""
    path, fsync = tmp_path / "weights.ckpt", os.fsync
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        checkpoint.write_bytes(path, b"theirs")
        assert path.read_bytes() == b"theirs"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    checkpoint.write_bytes(path, b"ours")
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]


def test_too_little_memory_is_told_in_one_line(capfd, monkeypatch):
    def lacking(arguments):
        raise MemoryError(*said)

    monkeypatch.setitem(COMMANDS, "proofs", lacking)
    for said in ((), ("weights.ckpt needs more memory than there is",)):
        refused(capfd, ["proofs"], [*said, "memory", "where there is more"])


def test_list_names_every_profile(project, capfd):
    assert main(["list"]) == 0
    listed = capfd.readouterr().out
    profiles = listed.partition("make reproduce-TABLE PROFILE=PROFILE\n")[2]
    for path in (project.folder / "params").glob("*/*.yaml"):
        assert re.search(rf"^  {path.parent.name} .*\b{path.stem}(,|$)", profiles, re.M), path


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capfd):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and "usage" in capfd.readouterr().out


def test_a_bundle_is_written_also_where_a_cell_failed(project, capfd, monkeypatch):
    """Of a rented machine, say, which is gone soon."""
    project.table("tiny9", TINY)
    out = project.folder / "results.json"

    def fails(*arguments, **options):
        raise executor.NotTrained({"a" * 64: "cell a: it failed."}, of=2)

    monkeypatch.setattr(executor, "run_plan", fails)
    arguments = ["run", "tiny9", "--profile", "tiny", "--out", str(out)]
    refused(capfd, arguments, ["1 of 2 cells were not trained", "cell a: it failed"])
    assert json.loads(out.read_text()) == {"evidence": []}
