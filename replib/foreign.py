"""Files of strangers, read as data: none is run, none takes much more memory than it is long."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

MOST_TEXT = 64 * 2**20  # bytes of a JSON or YAML file; the longest of ours has 2 MiB
ALLOCATOR = "DefaultCPUAllocator"  # by which torch's RuntimeError tells that memory is short
FACTOR = 4  # by which an archive of tensors may be longer unpacked: ours are not packed at all


def regular(path: Path) -> io.BufferedReader:
    """A file, to be read. Raises: OSError; ValueError for a pipe, which may be waited for, or a
    device, which may have no end."""
    if not path.is_file() and path.exists() and not path.is_dir():
        raise ValueError("it is no regular file")
    return path.open("rb")


def text_of(path: Path, most: int = MOST_TEXT) -> str:
    """A file of text. Raises: OSError; ValueError where it is longer than `most` bytes, or not
    UTF-8."""
    with regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is longer than {most >> 20} MiB")
    return content.decode()


def json_of(path: Path, most: int = MOST_TEXT) -> object:
    """A file of JSON. Raises: OSError; ValueError for any other file, also one that is longer than
    `most` bytes, or nested too deep."""
    try:
        return json.loads(text_of(path, most))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def unpickled(source: Path | bytes, allowed: Sequence = ()) -> object:
    """What `torch.save` wrote, as tensors and plain values; no code of the file runs.

    allowed: classes beside torch's own, as `torch.serialization.safe_globals` takes them.
    Raises: OSError where the file cannot be read; MemoryError where there is too little of it, of
    which the file may be innocent; ValueError, in one line, for anything else.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else regular(source)
    with file:
        try:
            refuse_bomb(file)
            with torch.serialization.safe_globals(list(allowed)):
                return torch.load(file, weights_only=True, map_location="cpu")
        except UnpicklingError:  # torch's own words advise to load it all the same
            raise ValueError("it is damaged, or holds more than tensors and plain values") from None
        except Exception as error:  # whatever a foreign file provokes
            if isinstance(error, MemoryError) or ALLOCATOR in str(error):
                raise MemoryError("its values need more memory than there is") from None
            raise ValueError(in_one_line(error)) from None


def in_one_line(error: Exception) -> str:
    """What an error says of a foreign file, in its first line; its class where it says nothing."""
    said = next(iter(str(error).splitlines()), "")[:300]
    return "".join(c if c.isprintable() else "?" for c in said).strip() or type(error).__name__


def refuse_bomb(file: io.BufferedIOBase) -> None:
    """Raises: ValueError for an archive that is far longer unpacked than packed."""
    packed = file.read(4) == b"PK\x03\x04"  # by which torch tells the two formats that it has
    length = file.seek(0, io.SEEK_END)
    if packed:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(one.file_size for one in archive.infolist())
        if unpacked > FACTOR * length:
            raise ValueError(f"{length} bytes would be {unpacked} when unpacked")
    file.seek(0)


def refuse_claims(value: object, empty: bool = False) -> None:
    """Raises: ValueError for a tensor, however deep inside of `value`, without values of its own
    for all that its shape says; empty: whether one that says none is let be."""
    left, seen = [("", value)], set()
    while left:
        name, one = left.pop()
        if isinstance(one, dict | list | tuple | set):
            if id(one) not in seen:  # a pickle may hold itself
                seen.add(id(one))
                left += one.items() if isinstance(one, dict) else enumerate(one)
            continue
        if not isinstance(one, Tensor):
            continue
        if one.layout != torch.strided or one.device.type != "cpu" or one.is_quantized:
            raise ValueError(f"{name!r} is no plain tensor")
        held, claimed = one.untyped_storage().nbytes(), one.numel() * one.element_size()
        if claimed > held or not (claimed or empty):
            raise ValueError(
                f"{name!r} of shape {tuple(one.shape)} has values for {held} bytes only"
            )
