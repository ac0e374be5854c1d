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
FACTOR = 4  # by which an archive of tensors may be longer unpacked: ours are not packed at all


def text_of(path: Path) -> str:
    """A file of text. Raises: OSError; ValueError where it is too long, or not UTF-8."""
    if not path.is_file() and path.exists() and not path.is_dir():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise ValueError(f"it is longer than {MOST_TEXT >> 20} MiB")
    return content.decode()


def json_of(path: Path) -> object:
    """A file of JSON. Raises: OSError; ValueError for any other file, also one nested too deep."""
    try:
        return json.loads(text_of(path))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def unpickled(source: Path | bytes, allowed: Sequence = ()) -> object:
    """What `torch.save` wrote, as tensors and plain values; no code of the file runs.

    allowed: classes beside torch's own, as `torch.serialization.safe_globals` takes them.
    Raises: OSError where the file cannot be read; ValueError, in one line, for anything else.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with file:
        try:
            refuse_bomb(file)
            with torch.serialization.safe_globals(list(allowed)):
                return torch.load(file, weights_only=True, map_location="cpu")
        except UnpicklingError:  # torch's own words advise to load it all the same
            raise ValueError("it is damaged, or holds more than tensors and plain values") from None
        except Exception as error:  # whatever a foreign file provokes
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


def refuse_claims(tensors: dict[str, Tensor]) -> None:
    """Raises: ValueError for a tensor without values of its own for all that its shape says."""
    for name, tensor in tensors.items():
        whole = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not whole or tensor.is_quantized:
            raise ValueError(f"{name!r} is no plain tensor")
        held = tensor.untyped_storage().nbytes()
        if not tensor.numel() or tensor.numel() * tensor.element_size() > held:
            raise ValueError(
                f"{name!r} of shape {tuple(tensor.shape)} has values for {held} bytes only"
            )
