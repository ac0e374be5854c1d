"""What a number was made with and on: the commit, the libraries, the processor, the device."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from replib import parallel


@functools.lru_cache
def commit(folder: Path) -> str:
    """The commit of the code in a folder, with "-dirty" where files differ from it; not those of
    reports/, which the command before this one may have written."""

    def git(*command: str) -> str:
        options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(["git", *command], cwd=folder, **options).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":(exclude)reports")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def context(device: str, folder: Path, libraries: Sequence[str] = ("torch",)) -> dict:
    """Where something was computed, as plain data; device is "cpu", "cuda" or "cuda:1"."""
    on_gpu = device.startswith("cuda")
    several = {"processes": parallel.processes()} if parallel.processes() > 1 else {}
    return several | {
        "commit": commit(folder),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in libraries},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
