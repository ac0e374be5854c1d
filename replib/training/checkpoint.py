"""Checkpoints that are whole or refused: a digest in front, written beside and then renamed."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import secrets
from pathlib import Path

import torch

from replib import parallel
from replib.foreign import in_one_line, refuse_claims, regular, unpickled

MAGIC = b"replib-checkpoint-1\n"


class BadCheckpoint(ValueError):
    """The file is truncated, damaged, or belongs to something else."""


class Foreign(BadCheckpoint):
    """The file is not one of ours at all."""


def draft_of(path: Path) -> Path:
    """A name beside a file, for what is renamed to it once it is whole: nobody else's, also where
    several machines share the folder and their processes have the same numbers."""
    own = f"{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{own}.part")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a reader never sees half of it. Of several processes that
    train together the first one writes."""
    if parallel.place():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def save(path: Path, key: str, state: dict) -> None:
    """Store tensors, numbers, strings, lists and dicts under the key of their cell."""
    buffer = io.BytesIO()
    torch.save({"key": key, "state": state}, buffer)
    payload = buffer.getvalue()
    write_bytes(path, MAGIC + hashlib.sha256(payload).digest() + payload)


def load(path: Path, key: str | None = None) -> dict | None:
    """What `save` stored under `key` (None: any key); None where there is no file.

    Raises: BadCheckpoint, in one line, for a file that is cut short, damaged or of another cell;
    MemoryError for one that does not fit into memory: nothing is wrong with it.
    """
    try:
        owner, state = opened(path)
    except FileNotFoundError:
        return None
    if key not in (None, owner):
        raise BadCheckpoint(f"{path} belongs to {owner}, not to {key}")
    return state


def opened(path: Path) -> tuple[str, dict]:
    """(key, state) as they were given to `save`. Raises: OSError; the errors of `load`."""
    try:
        with regular(path) as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise Foreign(f"{path} is not a checkpoint of replib")
            digest, payload = file.read(32), file.read()
        if hashlib.sha256(payload).digest() != digest:
            raise BadCheckpoint(f"{path} is truncated or damaged")
        stored = unpickled(payload)
        refuse_claims(stored, empty=True)
        return str(stored["key"]), dict(stored["state"])
    except (OSError, BadCheckpoint):
        raise
    except MemoryError:
        raise MemoryError(f"{path} needs more memory than there is") from None
    except Exception as error:  # another value than ours, of any kind
        said = in_one_line(error)
        raise BadCheckpoint(f"{path} is not a checkpoint of replib ({said})") from None
