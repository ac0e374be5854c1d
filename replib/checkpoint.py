"""Networks as files that know their own structure: safetensors with a manifest, nothing unpickled.

The manifest is JSON in the file's metadata. It describes the tree of modules as data: the class of
each and what it was made from; for blocks their family, branches and rate. So a network whose
blocks are expanded, grown, cut, partly or wholly deployed is rebuilt without being told.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from replib.blocks import BLOCKS, RepBlock
from replib.blocks.block import Geometry
from replib.foreign import in_one_line
from replib.training.checkpoint import write_bytes

FORMAT = "replib-model-1"
PACKAGES = (  # modules of other packages are not made from a file
    "replib.blocks.",
    "replib.branches",
    "replib.models.",
    "torch.nn.modules.",
    "torchvision.models.",
    "torchvision.ops.",
)
RECORDS = ("conversion", "fusion")  # what was done to a network, noted on its root
TORCH = "torch.nn.modules."  # made by their constructors, the others from their attributes
ELSEWHERE = ("device", "dtype", "modules")  # arguments whose values are no part of a description
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


# -- writing ---------------------------------------------------------------------------------------
def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a network with its structure, modes and rates; whole or not at all.

    A class that is not of replib, torch.nn or torchvision is noted by name; `load_model` then
    needs a `body`. Tensors on any device; a module used twice stays one.
    Raises: ValueError for an attribute or a tensor that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = described(model, "", tensors, {})
    blocks = {
        path: {
            "family": class_name(type(block)).removeprefix("block "),
            "branches": list(block.branches),
            "rate": block.rate.item(),
        }
        for path, block in model.named_modules()
        if isinstance(block, RepBlock)
    }
    manifest = {"format": FORMAT, "blocks": blocks, "tree": tree}
    manifest["sha256"] = digest(manifest, tensors)
    # One entry of metadata: safetensors writes several in any order, and the same network must be
    # the same bytes.
    write_bytes(Path(path), save(tensors, {"manifest": json.dumps(manifest)}))


def digest(manifest: dict, tensors: dict[str, Tensor]) -> str:
    """A hash of everything in the file."""
    value = hashlib.sha256(json.dumps(manifest).encode())
    for key in sorted(tensors):
        value.update(key.encode())
        value.update(tensors[key].reshape(-1).view(torch.uint8).numpy())
    return value.hexdigest()


def class_name(kind: type) -> str:
    """How a class is written: "block FAMILY" for a family of blocks, "module:name" otherwise."""
    families = [name for name, family in BLOCKS.items() if family is kind]
    return f"block {families[0]}" if families else f"{kind.__module__}:{kind.__qualname__}"


def known(name: str) -> bool:
    """Whether a class of this name is made from a file."""
    return name.startswith(("block ", *PACKAGES))


def described(module: nn.Module, path: str, tensors: dict[str, Tensor], seen: dict) -> dict:
    """A module as data; its tensors are added to `tensors`, itself to `seen`."""
    if id(module) in seen:
        return {"same": seen[id(module)]}
    seen[id(module)] = path
    name = class_name(type(module))
    node: dict = {"class": name, "training": module.training}
    if known(name):
        own = {key: value for key, value in vars(module).items() if key not in OF_EVERY_MODULE}
        if name.startswith(TORCH):
            node["arguments"] = constructed_from(module)
            own = {key: value for key, value in own.items() if key in RECORDS}
        node["attributes"] = {key: as_data(v, at(path, key)) for key, v in own.items()}
    for kind, held in (("parameters", module._parameters), ("buffers", module._buffers)):
        node[kind] = {key: None if value is None else kept(value) for key, value in held.items()}
        for key, value in held.items():
            if value is not None:
                if value.is_meta:
                    raise ValueError(f"{at(path, key)} is on the meta device: it has no values.")
                tensors[at(path, key)] = value.detach().cpu().contiguous().clone()
    node["unsaved"] = sorted(module._non_persistent_buffers_set)
    node["children"] = {
        key: None if child is None else described(child, at(path, key), tensors, seen)
        for key, child in module._modules.items()
    }
    return node


def at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def kept(tensor: Tensor) -> dict:
    """What a tensor is beside its values."""
    return {"trains": tensor.requires_grad}


def constructed_from(module: nn.Module) -> dict:
    """The arguments of a layer of torch.nn, read from its attributes of the same names."""
    arguments = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        plain = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if plain and name not in ELSEWHERE and hasattr(module, name):
            value = getattr(module, name)
            if name == "bias":
                value = value is not None and value is not False
            arguments[name] = as_data(value, name)
    return arguments


def as_data(value: object, path: str) -> object:
    """A value as JSON that `from_data` understands."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [as_data(item, path) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [as_data(item, path) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: as_data(item, f"{path}.{key}") for key, item in value.items()}}
    if isinstance(value, Geometry):
        return {"geometry": {key: as_data(item, path) for key, item in asdict(value).items()}}
    if isinstance(value, type) and known(class_name(value)):
        return {"class": class_name(value)}
    raise ValueError(f"{path} is a {type(value).__name__}, which cannot be written as data.")


# -- reading ---------------------------------------------------------------------------------------
def load_model(path: str | Path, body: nn.Module | None = None) -> nn.Module:
    """The network of a file, on the CPU: structure, values, modes and rates as they were saved.

    body: a network with the classes that are not of replib, torch.nn or torchvision, at the same
    paths; it is filled in place, and what else it holds is replaced by what the file holds.
    Raises: ValueError, in one line, for a file that is damaged, or that needs a `body`.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} cannot be read as a network: no such file")
    try:
        with safe_open(Path(path), "pt") as file:
            metadata = file.metadata() or {}
            # Cloned, hence aligned: on a processor the rounding of a convolution depends on it.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a network: {in_one_line(error)}") from None
    try:
        manifest = json.loads(metadata.get("manifest", "{}"))
        known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{path} has no manifest of {FORMAT}: it was not written by save_model.")
    try:
        if manifest.pop("sha256", metadata.get("sha256")) != digest(manifest, tensors):
            raise ValueError("is damaged: its contents differ from their own hash")
        return rebuilt(manifest["tree"], "", tensors, body, {})
    except ValueError as error:
        raise ValueError(f"{path} {in_one_line(error).removesuffix('.')}.") from error
    except Exception as error:  # of any class: the file may hold any description
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        raise ValueError(f"{path} describes a network of another version ({reason}).") from error


def rebuilt(
    node: dict, path: str, tensors: dict[str, Tensor], body: nn.Module | None, made: dict
) -> nn.Module:
    """The module of a description."""
    if "same" in node:
        return made[node["same"]]
    module = bare(node, path, body, len(tensors))
    for kind, held in (("parameters", module._parameters), ("buffers", module._buffers)):
        held.clear()
        for key, value in node[kind].items():
            tensor = None if value is None else tensors[at(path, key)]
            if tensor is not None and kind == "parameters":
                tensor = nn.Parameter(tensor, requires_grad=value["trains"])
            held[key] = tensor
    module._non_persistent_buffers_set = set(node["unsaved"])
    module._modules.clear()
    for key, child in node["children"].items():
        found = None if child is None else rebuilt(child, at(path, key), tensors, body, made)
        module._modules[key] = found
    module.training = node["training"]
    made[path] = module  # now, not before: no module is inside itself
    return module


def bare(node: dict, path: str, body: nn.Module | None, tensors: int) -> nn.Module:
    """A module of the right class; its tensors and children are still to come.

    tensors: how many the file has, the bound of what it may ask to be repeated.
    """
    name = node["class"]
    if not known(name):
        found = None if body is None else dict(body.named_modules()).get(path)
        if found is None or class_name(type(found)) != name:
            where = path or "the network"
            said = "give load_model a `body` that has it there"
            raise ValueError(f"needs more: {where} is a {name}: {said}")
        return found
    kind = class_of(name)
    if "arguments" in node:
        arguments = {key: from_data(value) for key, value in node["arguments"].items()}
        for key, value in arguments.items():
            layers = key.endswith("layers") and isinstance(value, int) and value > tensors
            if layers or key in ELSEWHERE or not name.startswith(TORCH):
                raise ValueError(f"gives {name} the argument {key}, which files may not")
        with torch.device("meta"):
            module = kind(**arguments)
    else:
        module = kind.__new__(kind)
        nn.Module.__init__(module)
    own = node.get("attributes", {})  # torch's layers had none in older files
    for key in own:
        if (
            key in OF_EVERY_MODULE
            or key.startswith("__")
            or inspect.isroutine(inspect.getattr_static(kind, key, None))
        ):
            raise ValueError(f"sets {key} of {name}, which files may not")
    vars(module).update({key: from_data(value) for key, value in own.items()})
    return module


def class_of(name: str) -> type[nn.Module]:
    """The class of a name that `class_name` wrote, if it is one that files may name."""
    if name.startswith("block "):
        family = name.removeprefix("block ")
        if family not in BLOCKS:
            raise ValueError(
                f"has blocks of the family {family!r}, which is not known; one of your own is read "
                "from its file first: --blocks FILE.py."
            )
        return BLOCKS[family]
    module, _, attribute = name.partition(":")
    kind = getattr(importlib.import_module(module), attribute, None) if known(name) else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"names {name!r}, which is not a module that files may name.")
    return kind


READERS: dict[str, Callable] = {
    "tuple": lambda items: tuple(from_data(item) for item in items),
    "dict": lambda items: {key: from_data(item) for key, item in items.items()},
    "geometry": lambda items: Geometry(**{key: from_data(item) for key, item in items.items()}),
    "class": class_of,
}


def from_data(value: object) -> object:
    """What `as_data` was given."""
    if isinstance(value, list):
        return [from_data(item) for item in value]
    if isinstance(value, dict):
        ((kind, held),) = value.items()
        return READERS[kind](held)
    return value
