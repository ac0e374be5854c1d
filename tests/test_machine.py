"""What is written down of the machine beside a result."""

import subprocess

import pytest

from replib import machine

commit = machine.commit.__wrapped__  # which asks every time


@pytest.fixture
def folder(tmp_path):
    """A repository of one commit, of code and of a report."""
    for name in ("code.py", "reports/evidence/one.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_a_commit_is_dirty_by_its_code_and_not_by_what_commands_write(folder):
    clean = commit(folder)
    assert len(clean) == 12 and int(clean, 16)
    (folder / "reports/evidence/one.json").write_text("2")
    (folder / "untracked.txt").write_text("2")
    assert commit(folder) == clean
    (folder / "code.py").write_text("2")
    assert commit(folder) == f"{clean}-dirty"


def test_where_there_is_none_it_is_unknown(tmp_path, monkeypatch):
    assert commit(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert commit(tmp_path) == "unknown"
