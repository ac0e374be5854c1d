"""What several files of tests use: a project folder of their own, a small training run."""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replib.__main__ import main
from replib.experiments import executor
from replib.models import build
from replib.report.results import Results
from replib.training.data import load, split
from replib.training.loop import Progress, Recipe, Task, fit

ROOT = Path(__file__).resolve().parents[1]
TINY = (ROOT / "tests" / "tiny.yaml").read_text(encoding="utf-8")  # every kind of cell, in seconds


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a seed of its own does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """The same for what several tests share."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


class Project:
    """A copy of params/, notebooks/ and catalogue/ in which commands run, instead of our own."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("params", "notebooks", "catalogue"):
            shutil.copytree(ROOT / name, folder / name)
        self.environment = os.environ | {
            "REPLIB_HOME": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }

    def table(self, name: str, text: str, profile: str = "tiny") -> None:
        """Add params/NAME/PROFILE.yaml; the notebook of all tables serves it."""
        path = self.folder / "params" / name / f"{profile}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """`python -m replib ARGUMENTS` in a process group of its own, which Ctrl-C reaches also
        where the tests themselves run in the background and ignore it."""
        options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        return subprocess.Popen(
            [sys.executable, "-m", "replib", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit status, standard output, standard error) of `python -m replib ARGUMENTS`."""
        process = self.start(*arguments)
        out, error = process.communicate()
        return process.returncode, out, error

    def run_here(self, *arguments: str) -> None:
        """`python -m replib ARGUMENTS` in this process, which has imported everything already."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)  # of the kernels that it starts
            alone(patch)
            assert main(list(arguments)) == 0


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    """A fresh project, which is also this process's own REPLIB_HOME."""
    made = Project(tmp_path)
    for name in ("REPLIB_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, made.environment[name])
    return made


class Inline:
    """A pool of one worker that is this very process: quick to start, and it can be patched."""

    def __init__(self, most, method, initializer, arguments):
        executor._ticks = arguments[0]

    def submit(self, function, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def end(self) -> None:
        """Nothing to end."""


def alone(patch: pytest.MonkeyPatch) -> None:
    """Cells are trained in this process, one after the other, by one thread."""
    torch.set_num_threads(1)
    patch.setattr(executor, "Workers", Inline)
    patch.setattr(executor, "cores", lambda: 1)


@pytest.fixture
def in_process(monkeypatch) -> None:
    """Cells are trained in this process."""
    alone(monkeypatch)


@contextmanager
def at_home(folder: Path, tables: Mapping[str, str]) -> Iterator[Project]:
    """A project with these tables that is this process's own, and trains in it by one thread."""
    made = Project(folder)
    for name, text in tables.items():
        made.table(name, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLIB_HOME", str(made.folder))
        alone(patch)
        yield made


@pytest.fixture(scope="session")
def shared_project(tmp_path_factory) -> Project:
    """One project for a whole session, in which the table `tiny9` has been run."""
    with at_home(tmp_path_factory.mktemp("project"), {"tiny9": TINY}) as made:
        assert Results("tiny9", "tiny").train(device="cpu").trained == 6
    return made


CONTEXT = {"commit": "", "device": "", "processor": "", "python": "", "libraries": {"torch": ""},
           "wall_seconds": 1.0}  # fmt: skip


def whole(result: dict) -> dict:
    """A result with all that evidence must hold; what is given stands in it."""
    made = {
        "parameters": {}, "versions": {}, "images": {"train": 1, "held_out": 1},
        "history": {"train_loss": [0.5], "test_accuracy": [0.5]}, "restarts": {}, "kept_blocks": {},
        "data": {"name": "digits", "digest": "", "test_images": 1},
        "final": {"last": 0.5, "selected": 0.5, "selected_by": "last", "selected_epoch": 0},
        "deployed": {"test_accuracy": 0.5, "parameters": 1, "flops": 1},
        "compute": {"epochs": 1, "training_flops": 1, "teacher_flops": 0},
    }  # fmt: skip
    both = made.keys() & result.keys()
    return made | result | {name: made[name] | result[name] for name in both}


@pytest.fixture
def one_thread():
    """Sums in one order, so that runs are equal to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_checkpoints(task: Task) -> tuple[Progress, list[dict]]:
    """Train; what the run says, and the checkpoint of every step, as it is read from a file."""
    kept = []

    def keep(state: dict) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        kept.append(buffer.getvalue())

    whole = fit(task, checkpoint=keep, checkpoint_seconds=-1)
    return whole, [torch.load(io.BytesIO(state), weights_only=True) for state in kept]


def small_task(
    recipe: dict,
    groups: Callable[[nn.Module], list[dict]],
    method: Callable[[nn.Module], object] = lambda model: None,
    *,
    block: str = "repvgg",
    images: int = 80,
    protocol: str = "clean",
) -> Task:
    """A small run on digits: so many images, 20 of which are held out."""
    digits = load("digits")
    splits = split(digits, images=images, held_out=20, protocol=protocol, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("digits", block, classes=10, in_channels=1)
    return Task(
        model=model,
        data=digits,
        train=splits.train,
        validation=splits.validation,
        recipe=Recipe(**recipe),
        groups=lambda: groups(model),
        loss=lambda logits, labels, inputs: F.cross_entropy(logits, labels),
        seed=0,
        method=method(model),
    )
