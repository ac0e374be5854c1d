"""Running the cases: each in a process of its own, finished ones kept in the file at once.

The file is {"context", "settings", "cases": {id: entry}}; an entry is {"status", "reason",
"result", "seconds", "code", "commit", "finished", "elsewhere"}. status: "done"; "failed", with
what went wrong in one line; "left out", where something is not on this machine; "out of time".
`elsewhere`: processor cores that other work on the machine kept busy meanwhile.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from replib import machine
from replib.benchmark.agreement import Unequal
from replib.benchmark.cases import CASES, Case
from replib.benchmark.latency import LATENCY
from replib.benchmark.packing import follow_parent
from replib.benchmark.setting import TIERS, Setting
from replib.benchmark.subjects import LeftOut
from replib.benchmark.targets import TARGETS, judged, profiled
from replib.benchmark.timing import busy_seconds, own_seconds, rounded
from replib.errors import UserError
from replib.foreign import json_of
from replib.training.checkpoint import write_bytes

DONE, FAILED, LEFT_OUT, OUT_OF_TIME = "done", "failed", "left out", "out of time"
CAP, LEAST = 3, 10  # a case is stopped after so many times what it should take, and seconds
PACKAGE = Path(__file__).parents[1]
Say = Callable[[str], None]


@cache
def code() -> str:
    """A digest of the library's sources without the report: what decides a measurement."""
    files = sorted(p for p in PACKAGE.rglob("*.py") if "report" not in p.parts)
    h = hashlib.sha256()
    for path in files:
        h.update(path.relative_to(PACKAGE).as_posix().encode())
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def measure(
    out: Path,
    *,
    device: str = "cpu",
    tier: str | None = None,
    cases: Sequence[str] | None = None,
    budget_seconds: float | None = None,
    threads: int | None = None,
    profile: bool = False,
    fresh: bool = False,
    verbose: bool = False,
    vectors: Path | None = None,
    say: Say = print,
) -> dict:
    """Run the cases that the file has not, the most valuable first; returns the measurement.

    It can be killed at any moment: finished cases are in the file, the same call goes on. A case
    counts as finished where tier, device, threads and code are those of now; fresh: none does.
    A failing case is recorded and does not stop the others.
    Raises: UserError for a case that is not known.
    """
    tier = tier or ("cuda" if device.startswith("cuda") else "cpu")
    wanted = chosen(cases, tier)
    threads = threads or (torch.get_num_threads() if device == "cpu" else 1)
    where = {"device": device, "tier": tier, "threads": threads}
    found = started(out, where)
    if fresh:
        for name in wanted:
            found["cases"].pop(name, None)
    missing = [case for name, case in wanted.items() if not finished(found["cases"].get(name))]
    begin, expected, taken = time.monotonic(), 0.0, 0.0
    for index, case in enumerate(missing):
        left = math.inf if budget_seconds is None else begin + budget_seconds - time.monotonic()
        rest = sum(c.seconds[tier] for c in missing[index:])
        pace = taken / expected if expected else 1.0
        about, all_left = case.seconds[tier] * pace, minutes(min(rest * pace, left))
        place = f"[{index + 1:>2} of {len(missing)}]"
        say(f"{place} {case.id:<22} about {about:.0f} s; all: {all_left} left")
        if left < LEAST or left < 0.7 * case.seconds[tier] * min(pace, 1):
            entry = {"status": OUT_OF_TIME, "reason": "the time given was over"}
        else:
            entry = one(case, where, profile, vectors, left, verbose)
            expected, taken = expected + case.seconds[tier], taken + entry["seconds"]
        entry |= {"code": code(), "commit": machine.commit(PACKAGE), "finished": now()}
        said = f"{entry['status']}: {entry['reason']}".rstrip(": ")
        say(f"{'':>{len(place)}} {case.id:<22} {said}")
        found["cases"][case.id] = entry
        write(out, found)
    write(out, found)
    for target in TARGETS if wanted.keys() - LATENCY.keys() else ():
        verdict = judged(target, found)
        say(f"{verdict.text:<8} {target.text}" + number(verdict))
    return found


def number(verdict) -> str:
    found, target = verdict.found, verdict.target
    if found is None:
        return ""
    return f": {found.value:g}, wanted {target.sign} {target.bound:g} {target.unit} ({found.by})"


def minutes(seconds: float) -> str:
    return "?" if math.isinf(seconds) else f"{seconds / 60:.1f} minutes"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def kind(device: str) -> str:
    return device.split(":")[0]


def chosen(cases: Sequence[str] | None, tier: str) -> dict[str, Case]:
    """Cases by id; a name that ends in / stands for all that begin with it. None: all of `CASES`,
    those of latency being a page of their own."""
    if not cases:
        return {name: case for name, case in CASES.items() if tier in case.seconds}
    here = {name: case for name, case in (CASES | LATENCY).items() if tier in case.seconds}
    for name in cases:
        if not any(matches(case, name) for case in here):
            raise UserError(
                f"cases: {name!r} is none of the {tier} tier; `bench --list` shows them."
            )
    return {case: here[case] for case in here if any(matches(case, name) for name in cases)}


def matches(case: str, name: str) -> bool:
    return case == name or (name.endswith("/") and case.startswith(name))


def finished(entry: dict | None) -> bool:
    """Whether an entry need not be measured again."""
    return entry is not None and entry["code"] == code() and entry["status"] in (DONE, LEFT_OUT)


def started(out: Path, where: dict) -> dict:
    """The measurement in a file, where it was made in the same way; else a new one."""
    fresh = {"context": context(where["device"]), "settings": where, "cases": {}}
    try:
        old = read(out)
    except UserError:
        return fresh
    names = ("processor", "device", "libraries", "cores")
    same = all(old["context"].get(name) == fresh["context"][name] for name in names)
    return fresh | {"cases": old["cases"]} if same and old["settings"] == where else fresh


def context(device: str) -> dict:
    from importlib.util import find_spec

    names = "torch", "torchvision", "timm", "onnxruntime"
    libraries = [name for name in names if find_spec(name)]
    gpu, cpu = torch.backends.cudnn.conv, torch.backends.mkldnn.conv
    products = (gpu if device.startswith("cuda") else cpu).fp32_precision
    return machine.context(device, PACKAGE, libraries) | {"float32 convolutions": products}


# -- one case -------------------------------------------------------------------------------------
def one(
    case: Case,
    where: dict,
    profile: bool = False,
    vectors: Path | None = None,
    left: float = math.inf,
    verbose: bool = False,
) -> dict:
    """Run a case in a process of its own; whatever happens there is an entry."""
    tier = where["tier"]
    soft = min(case.seconds[tier] * CAP / 2 + LEAST, 0.8 * left)
    hard = min(case.seconds[tier] * CAP + 3 * LEAST, left)
    names = profiled(case.id, kind(where["device"])) if profile else frozenset()
    # A server that has imported everything, and forks: no state of a case reaches the next.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["replib.benchmark.cases", "torchvision"])
    ours, theirs = processes.Pipe(duplex=False)
    arguments = (theirs, case.id, where, names, vectors, soft, verbose)
    process = processes.Process(target=child, args=arguments)
    begin, busy = time.monotonic(), busy_seconds()
    process.start()
    theirs.close()
    entry = {"status": OUT_OF_TIME, "reason": f"stopped after {hard:.0f} s"}
    own = 0.0
    try:
        if ours.poll(hard):
            entry, own = ours.recv()
    except EOFError:
        process.join()
        entry = {"status": FAILED, "reason": f"its process ended with status {process.exitcode}"}
    finally:
        process.join(0 if entry["status"] == OUT_OF_TIME else 10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with processes of its own
        process.kill()  # one that hangs before it leads a group
        process.join()
    seconds = time.monotonic() - begin
    after = busy_seconds()
    elsewhere = None
    if busy is not None and own:
        elsewhere = rounded(max(0.0, after - busy - own) / seconds)
    return {"reason": "", "result": None} | entry | {
        "seconds": rounded(seconds), "elsewhere": elsewhere
    }  # fmt: skip


def child(
    pipe: Connection,
    name: str,
    where: dict,
    names: frozenset[str],
    vectors: Path | None,
    seconds: float,
    verbose: bool,
) -> None:
    """In the process of a case: measure, and send (entry, processor seconds)."""
    os.setpgid(0, 0)
    follow_parent()
    if not verbose:  # what compilers say is not for our user
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    multiprocessing.set_start_method("fork", force=True)  # DataLoader's own, as in any script
    torch.set_num_threads(where["threads"])
    torch.manual_seed(0)
    tier, device = TIERS[where["tier"]], where["device"]
    setting = Setting(tier, device, time.monotonic() + seconds, names, vectors)
    entry = entry_of((CASES | LATENCY)[name], setting, verbose)
    gc.collect()  # a DataLoader waits for its workers, whose seconds then count as ours
    pipe.send((entry, own_seconds()))
    pipe.close()


def entry_of(case: Case, setting: Setting, verbose: bool = False) -> dict:
    """What became of a case: its result, or why there is none."""
    try:
        if ":" in setting.device:
            torch.cuda.set_device(setting.device)
        return {"status": DONE, "reason": "", "result": checked(case.run(setting))}
    except LeftOut as reason:
        return {"status": LEFT_OUT, "reason": in_one_line(str(reason))}
    except Unequal as error:
        return {"status": FAILED, "reason": in_one_line(f"not equal: {error}")}
    except Exception as error:
        if verbose:
            traceback.print_exc()
        return {"status": FAILED, "reason": in_one_line(f"{type(error).__name__}: {error}")}


def in_one_line(text: str) -> str:
    """The beginning of a text, without the paths of this machine."""
    return re.sub(r"(?<![\w.])/[\w.@+-]+(/[\w.@+-]*)+", "...", " ".join(text.split()))[:300]


def checked(result: dict) -> dict:
    """The result. Raises: ValueError where it holds a number that JSON has no word for."""
    json.dumps(result, allow_nan=False)
    for line in result.get("ways", []):
        if line.get("milliseconds", {"median": 1})["median"] is None:
            raise ValueError(f"{line['way']}: its time is no number")
    return result


# -- the file -------------------------------------------------------------------------------------
def write(path: Path, measurement: dict) -> None:
    """Write a measurement as one JSON file, whole or not at all."""
    text = json.dumps(measurement, sort_keys=True, separators=(",", ":"), allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def read(path: Path) -> dict:
    """What `write` wrote. Raises: UserError, in one line, for any other file."""
    try:
        measurement = json_of(path)
        entries = measurement["cases"].values()
        if {"context", "settings"} <= measurement.keys() and all("code" in e for e in entries):
            return measurement
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is no measurement of speed: `bench --out` writes one.")


def file_name(device: str, stem: str = "bench") -> str:
    """bench-PROCESSOR.json, or of a GPU."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else machine.processor()
    return f"{stem}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def listing(tier: str, cases: Sequence[str] | None = None) -> list[str]:
    """A line for every case of a tier, or for those that are named."""
    here = chosen(cases, tier).values()
    lines = [f"{case.id:<24} {case.seconds[tier]:>4.0f} s  {case.title}" for case in here]
    total = sum(case.seconds[tier] for case in here)
    return [*lines, f"{len(here)} cases of the {tier} tier, about {minutes(total)}"]


def main(
    device: str,
    out: Path,
    *,
    quick: bool = False,
    show: bool = False,
    **options,
) -> int:
    """The command `bench`; 1 where a case failed."""
    tier = "quick" if quick else kind(device)
    if show:
        print("\n".join(listing(tier, options["cases"])))
        return 0
    found = measure(out, device=device, tier=tier, say=flushed, **options)
    print(out)
    return int(any(entry["status"] == FAILED for entry in found["cases"].values()))


def flushed(text: str) -> None:
    print(text, flush=True)
    sys.stdout.flush()
