"""Weights: files that a user names, into a network of ours; those of cells, as files for a user."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from replib import official
from replib.checkpoint import load_model
from replib.errors import UserError
from replib.experiments.store import home
from replib.foreign import regular
from replib.training import checkpoint

State = dict[str, Tensor]


def located(path: str | None) -> str | None:
    """A path of a parameter: relative ones are meant from the project's folder."""
    return None if path is None else str(home() / Path(path).expanduser())


def file_digest(path: str, role: str = "start", text: str | None = None) -> str:
    """SHA-256 of a file, which is part of the key of cells that need it.

    role, text: the parameter that named the file, and its whole value, for the message.
    """
    try:
        with regular(Path(located(path))) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{role} (={text or path!r}) is neither a row of this table, nor the key of a cell, "
            f"nor a file that can be read ({getattr(error, 'strerror', error)})."
        ) from None


def weights_digest(state: State) -> str:
    """SHA-256 of named tensors: names, types, shapes and values, in the order of the names.

    It stands in the evidence of a cell. Unlike a hash of a file it stays when the format of the
    file, or the code around the network, changes.
    """
    value = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        value.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        value.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return value.hexdigest()


def state_of(path: str | Path, body: str, model: nn.Module) -> State:
    """The tensors of a file, named as those of `model`, which has this body of ours.

    Read are what `replib train` or a cell left, a state dict in our own names, whatever it is
    wrapped in, and RepAn's layout of its CIFAR bodies and teachers. Nothing is unpickled but data.
    Raises: ValueError, OSError, KeyError or RuntimeError for a file that is none of these.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_model(path).state_dict()
    try:
        if (own := checkpoint.load(path)) is not None:
            return own["model"]
    except checkpoint.Foreign:
        pass
    state = official.read_state(path)
    name = body.removeprefix("cifar_")
    layouts = {f"repan_{name}", f"repan_teacher_{name}"} & official.ARCHITECTURES.keys()
    if state.keys() <= model.state_dict().keys() or not layouts:
        return state
    return official.load_model(state, layouts.pop()).state_dict()


def fill(model: nn.Module, state: State, classes: int) -> None:
    """Give a network for so many classes these values, all of them.

    Raises: ValueError where it is of another number of classes; RuntimeError where it does not fit.
    """
    heads = {
        len(state[name])
        for name, own in model.state_dict().items()
        if own.dim() and len(own) == classes and name in state and state[name].dim() == own.dim()
        if len(state[name]) != classes and state[name].shape[1:] == own.shape[1:]
    }
    if len(heads) == 1:
        raise ValueError(f"it has {heads.pop()} classes, the data have {classes}")
    model.load_state_dict(state)
