"""The evidence store: one folder per cell on this machine, one published JSON file per cell.

    reports/runs/KEY/result.json      this machine's own evidence
    reports/runs/KEY/weights.ckpt     the selected weights, for cells that start from it
    reports/runs/KEY/checkpoint.ckpt  a run that was stopped, to go on from
    reports/runs/KEY/*.ckpt.refused   one of these that was damaged, or of another cell
    reports/runs/KEY/claim.N          who trains the cell (replib.experiments.claims)
    reports/evidence/KEY.json         published evidence, committed

Evidence is {"result", "result_sha256", "context"}: the result is bit-equal on the same CPU, the
context says where and how it was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

from replib import parallel
from replib.foreign import json_of
from replib.training import checkpoint
from replib.training.checkpoint import BadCheckpoint, write_bytes

KEY_LENGTH = 16  # hexadecimal digits of SHA-256 in names of files and folders


def home() -> Path:
    """The project's folder: REPLIB_HOME, or the nearest one upwards that holds params/."""
    if chosen := os.environ.get("REPLIB_HOME"):
        return Path(chosen)
    here = Path.cwd()
    package = Path(__file__).resolve().parents[2]
    candidates = [here, *here.parents, package]
    return next((c for c in candidates if (c / "params").is_dir()), here)


def canonical(value: object) -> bytes:
    """JSON with sorted keys and no spaces: the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def finite(value: object) -> object:
    """A JSON value with null for what JSON has no word for: the loss of a diverged run."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Store:
    """Where cells leave what they found; see the module."""

    def __init__(self, root: Path | None = None):
        root = root or home()
        self.runs, self.published = root / "reports" / "runs", root / "reports" / "evidence"

    def folder(self, key: str) -> Path:
        """The folder of a cell on this machine."""
        return self.runs / key[:KEY_LENGTH]

    def published_path(self, key: str) -> Path:
        """The published file of a cell."""
        return self.published / f"{key[:KEY_LENGTH]}.json"

    def own_path(self, key: str) -> Path:
        """This machine's evidence file of a cell."""
        return self.folder(key) / "result.json"

    def read(self, key: str, published: bool = False) -> dict | None:
        """The evidence of a cell, or None where it is absent, damaged or of another cell."""
        return read_evidence(self.published_path(key) if published else self.own_path(key), key)

    def read_any(self, key: str) -> dict | None:
        """Evidence of this machine, else published, by a whole key or its first 16 digits."""
        for path in (self.own_path(key), self.published_path(key)):
            evidence = read_evidence(path)
            if evidence is not None and str(evidence["result"]["key"]).startswith(key):
                return evidence
        return None

    def data_seen(self) -> set[str]:
        """The names of the data sets of all evidence that is here."""
        paths = [*self.runs.glob("*/result.json"), *self.published.glob("*.json")]
        found = [evidence for path in paths if (evidence := read_evidence(path)) is not None]
        return {evidence["result"].get("parameters", {}).get("data") for evidence in found}

    def write(self, key: str, result: dict, context: dict) -> None:
        """Store the evidence of a finished cell; its checkpoint is no longer needed."""
        result = finite(result)
        evidence = {"result": result, "result_sha256": sha256(result), "context": context}
        write_bytes(self.own_path(key), compact(evidence))
        if parallel.place() == 0:
            (self.folder(key) / "checkpoint.ckpt").unlink(missing_ok=True)

    def publish(self, key: str) -> Path:
        """Copy this machine's evidence to the published folder."""
        write_bytes(self.published_path(key), self.own_path(key).read_bytes())
        return self.published_path(key)

    def save(self, key: str, name: str, state: dict) -> None:
        """Store "weights" or "checkpoint" of a cell."""
        checkpoint.save(self.folder(key) / f"{name}.ckpt", f"{name} {key}", state)

    def load(self, key: str, name: str) -> tuple[dict | None, str | None]:
        """(state, None), (None, None) where there is none, or (None, why it was refused)."""
        path = self.folder(key) / f"{name}.ckpt"
        try:
            return checkpoint.load(path, f"{name} {key}"), None
        except BadCheckpoint as error:
            refused = path.with_name(f"{path.name}.refused")
            with contextlib.suppress(FileNotFoundError):  # another process has just moved it
                path.replace(refused)
            said = f"not used but kept as {refused.name}, this cell starts again"
            return None, f"{error}: {said}"

    def has_weights(self, key: str) -> bool:
        """Whether the selected weights of a cell are at hand and whole."""
        weights, problem = self.load(key, "weights")
        if problem:
            print(problem, file=sys.stderr, flush=True)
        return weights is not None

    def clean(self) -> None:
        """Forget this machine's runs; published evidence is never touched."""
        shutil.rmtree(self.runs, ignore_errors=True)


def read_evidence(path: Path, key: str | None = None) -> dict | None:
    """An evidence file, checked: whole, its hash right, of the cell `key`; else None."""
    try:
        evidence = json_of(path)
        result = evidence["result"]
        right = sha256(result) == evidence["result_sha256"] and "context" in evidence
        return evidence if right and key in (None, result["key"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def compact(evidence: dict) -> bytes:
    """JSON that a person can read and that stays small: one line per key or history column."""
    text = json.dumps(evidence, indent=1, sort_keys=True, allow_nan=False)
    lines, depth, out = text.split("\n"), 0, []
    for line in lines:
        stripped = line.strip()
        inside = depth > 0
        depth += stripped.endswith("[") - (stripped in ("]", "],"))
        if inside:
            out[-1] += stripped + (" " if stripped.endswith(",") and depth else "")
        else:
            out.append(line)
    return ("\n".join(out) + "\n").encode()
