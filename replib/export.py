"""A network as a file that other programs run: fused, verified, written, run there and compared.

    print(export(model, "net.onnx", images))

ONNX (run in ONNX Runtime) by the suffix .onnx, a torch.export program by .pt2. Both take any number
of images. Nothing is left on disk unless what the file computes is the network's own function.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from replib.errors import UserError
from replib.fusing import fuse, units
from replib.networks import in_train_mode
from replib.verification import (
    Check,
    Verification,
    allowed,
    end_to_end,
    in_double,
    tensors,
    verify,
)

OPSET = 18  # of ONNX: what torch's exporter writes by itself, and what runtimes know
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FORMS = ("deployed", "training")
SLACK = 16  # times a network's own error: what a runtime with other algorithms may be off
LARGEST = 2**31 - 2**20  # bytes of one ONNX file: of a protocol buffer, less room for the graph
Inputs = tuple[Tensor, ...]


# -- formats ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Format:
    """How a network is written (model, path, inputs), and read back as a function of inputs."""

    write: Callable[[nn.Module, Path, Inputs], None]
    read: Callable[[Path], Callable[..., object]]


def check_packages() -> None:
    """Raises: UserError where ONNX cannot be written or run here."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"ONNX needs {', '.join(missing)}, which is not installed: "
            'pip install "replib[export]" (or, in a checkout, pip install ".[export]").'
        )


def several(inputs: Inputs) -> Inputs:
    """Inputs of more than one image: of one, torch.export would take the number to be fixed."""
    return tuple(torch.cat([x, x]) if len(x) == 1 else x for x in inputs)


def write_program(model: nn.Module, path: Path, inputs: Inputs) -> None:
    """A torch.export program with any number of images."""
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in inputs)
    with torch.no_grad(), quiet():
        program = torch.export.export(model, several(inputs), dynamic_shapes=shapes)
        for node in program.graph.nodes:  # folders of this machine, in every one
            node.meta.pop("stack_trace", None)
        torch.export.save(program, path)


def read_program(path: Path) -> nn.Module:
    """What `torch.export.load` gives; that it maps the file into memory needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.export.load(path).module()


def write_onnx(model: nn.Module, path: Path, inputs: Inputs, opset: int = OPSET) -> None:
    """An ONNX model with any number of images, in one file.

    Its inputs are called "images", or "images_0", "images_1", ..., its outputs "outputs" likewise.
    Raises: UserError where a package is missing, and where the file would be too large.
    """
    check_packages()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > LARGEST:
        raise UserError(
            f"an ONNX file holds at most {LARGEST:,} bytes, the network has {size:,}: write a .pt2."
        )
    with torch.no_grad(), quiet():
        results = len(tensors(model(*inputs)))
        program = torch.onnx.export(
            model,
            several(inputs),
            dynamo=True,
            opset_version=opset,
            input_names=names("images", len(inputs)),
            output_names=names("outputs", results),
            dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in inputs),
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # folders of this machine
    program.save(path, external_data=False)
    if (written := opset_of(path)) != opset:
        raise UserError(f"opset (={opset}) cannot be had: the exporter writes {written} here.")


def names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{i}" for i in range(count)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter says to those who maintain it; what fails still raises."""
    levels = {log: log.level for log in map(logging.getLogger, ("torch.onnx", "onnxscript"))}
    for log in levels:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            for said in ("# The axis name", "No complete tensor found"):
                warnings.filterwarnings("ignore", said)
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)


class OnnxModel:
    """An ONNX file in ONNX Runtime, on the processor: tensors in, tensors out.

    threads: of one operator; None: as ONNX Runtime chooses. bytes: of the file.
    """

    def __init__(self, path: Path, threads: int | None = None):
        check_packages()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.bytes = Path(path).stat().st_size

    def __call__(self, *inputs: Tensor) -> Tensor | list[Tensor]:
        given = {
            node.name: x.detach().cpu().numpy()
            for node, x in zip(self.session.get_inputs(), inputs, strict=True)
        }
        found = [torch.from_numpy(array) for array in self.session.run(None, given)]
        return found[0] if len(found) == 1 else found

    def shapes(self) -> dict[str, str]:
        """name -> type and shape of every input and output."""
        nodes = (*self.session.get_inputs(), *self.session.get_outputs())
        return {n.name: f"{n.type} ({', '.join(map(str, n.shape))})" for n in nodes}


def opset_of(path: Path) -> int:
    """The version of ONNX's operators that a file uses."""
    import onnx

    found = onnx.load(str(path), load_external_data=False)
    return next(o.version for o in found.opset_import if o.domain in ("", "ai.onnx"))


PROGRAMS = {
    ".onnx": Format(write_onnx, OnnxModel),
    ".pt2": Format(write_program, read_program),
}


# -- one call --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Export:
    """What was written, and how far what the file computes is from the network in float64.

    checks: one for each number of images; opset, shapes: of ONNX, else None and empty.
    bytes: of the file; 0: it was not written.
    """

    path: str
    form: str  # of FORMS
    runtime: str
    opset: int | None
    shapes: dict[str, str]
    bytes: int
    verification: Verification | None  # of the fused network; None in the training form
    checks: list[Check]
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the fused network and what is read back both are the network, within rounding."""
        verified = self.verification is None or self.verification.ok
        return verified and bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def record(self) -> dict:
        """All of it as plain data."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        head = f"{self.path}: {self.bytes:,} bytes" if self.bytes else f"{self.path}: NOT WRITTEN"
        opset = [] if self.opset is None else [f"opset {self.opset}"]
        lines = ["; ".join([head, f"{self.form} form", *opset])]
        lines += [f"  {name}: {shape}" for name, shape in self.shapes.items()]
        if self.verification is not None:
            lines.append(f"fused, in float64: {self.verification}")
        if self.checks:
            worst = max(self.checks, key=lambda check: check.error / check.allowed)
            failed = [check for check in self.checks if not check.ok]
            worst = failed[0] if failed else worst
            said = "NOT EQUAL" if failed else "equal"
            counts = ", ".join(check.name for check in self.checks)
            lines.append(
                f"{self.runtime}: {said}; batches of {counts}: {worst.error:.2e}, allowed "
                f"{worst.allowed:.2e}"
            )
        return "\n".join(lines + self.notes)


def export(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor | Inputs,
    *,
    form: str = "deployed",
    opset: int = OPSET,
) -> Export:
    """Fuse a network, verify it, write it as a program, run that, compare; returns the report.

    path: ends in .onnx or .pt2, and is written only where the report is `ok`; what was there before
    stays otherwise. example_input: images (N, ...), or several such inputs; the more they are like
    real ones, the more is proved. Any number of images can be given to the program.
    form: "training" writes the branches as they are, with a warning: only to compare.
    opset: of ONNX.
    The program is run on 1, 3 and all of the images, and compared with the unfused network in
    float64 within the bound of `replib.verify`, or, where rounding grows in the network, within
    sixteen times its own error in its dtype: another runtime multiplies by other algorithms.
    Raises: ValueError in train mode; UserError for a suffix that is not known, where a package is
    missing, for a network that torch.export cannot follow, and for one in 8 bits.
    """
    path, inputs = Path(path), example_input
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if path.suffix not in PROGRAMS:
        raise UserError(f"path (={str(path)!r}) must end in {' or '.join(PROGRAMS)}.")
    if form not in FORMS:
        raise UserError(f"form (={form!r}) must be {' or '.join(FORMS)}.")
    if path.suffix == ".onnx":
        check_packages()
    if training := in_train_mode(model):
        raise ValueError(f"{training[0]} is in train mode: call .eval() before exporting.")
    if any(tensor.dtype == torch.int8 for tensor in model.state_dict().values()):
        raise UserError(
            "a network in 8 bits cannot be proved equal to one in float64, as export does: "
            "write it by replib.export.write_onnx(network, path, (images,)) and compare accuracies."
        )
    found, verification = units(model), None
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    program, bound = model, allowed(dtype, len(found))
    if form == "deployed":
        program = fuse(model)
        verification = verify(model, program, inputs)
        bound = verification.network.allowed
    elif found:
        warnings.warn(
            f"{len(found)} blocks are exported with their branches, which costs time and memory "
            "wherever it runs: leave form='training' out, and they are fused.",
            stacklevel=2,
        )
    runtime = f"torch.export {version('torch')}"
    if path.suffix == ".onnx":
        runtime = f"ONNX Runtime {version('onnxruntime')}"
    report = {"path": str(path), "form": form, "runtime": runtime, "verification": verification}
    nothing = {"opset": None, "shapes": {}, "bytes": 0, "checks": []}
    if verification is not None and not verification.ok:
        return Export(**report, **nothing)
    here = several(tuple(x.cpu() for x in inputs))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        with told(model, path.suffix):
            written(copy.deepcopy(program).cpu(), draft, here, opset)
            again = PROGRAMS[path.suffix].read(draft)
        checks, notes = compared(again, copy.deepcopy(model).cpu(), here, bound)
        about = {"opset": None, "shapes": {}}
        if isinstance(again, OnnxModel):
            about = {"opset": opset_of(draft), "shapes": again.shapes()}
        done = Export(**report, **about, bytes=draft.stat().st_size, checks=checks, notes=notes)
        if not done.ok:
            return Export(**report, **about, bytes=0, checks=checks, notes=notes)
        draft.replace(path)
    return done


def written(model: nn.Module, path: Path, inputs: Inputs, opset: int) -> None:
    """Write a program in the format of its suffix."""
    more = {"opset": opset} if path.suffix == ".onnx" else {}
    PROGRAMS[path.suffix].write(model, path, inputs, **more)


@contextlib.contextmanager
def told(model: nn.Module, suffix: str) -> Iterator[None]:
    """Raises: UserError, in one line, for a network that cannot be written so, or not run."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever exporters and runtimes meet in a network that is not ours
        said = next((line for line in str(error).splitlines() if line.strip()), "no message")
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        remedy = "torch.export must be able to follow its forward()"
        if dtype != torch.float32:
            remedy = f"its numbers are {dtype}: export model.float()"
        raise UserError(
            f"{type(model).__name__} cannot be written as {suffix} ({remedy}): "
            f"{type(error).__name__}: {said.strip()[:200]}"
        ) from None


@torch.no_grad()
def compared(
    program: Callable[..., object], model: nn.Module, inputs: Inputs, bound: float
) -> tuple[list[Check], list[str]]:
    """What a program computes of 1, 3 and all images, against the network in float64."""
    exact, checks, notes = copy.deepcopy(model).double(), [], []
    for images in sorted({min(n, len(inputs[0])) for n in (1, 3, len(inputs[0]))}):
        some = tuple(x[:images] for x in inputs)
        try:
            wanted = tensors(exact(*in_double(some)))
        except RuntimeError as error:  # casts of its own, as in `verify`
            notes.append(f"it cannot be run in float64 ({str(error).splitlines()[0][:80]})")
            exact = copy.deepcopy(model)
            wanted = tensors(exact(*some))
        got, itself = tensors(program(*some)), tensors(model(*some))
        check, said = end_to_end(got, itself, wanted, bound, slack=SLACK)
        checks.append(Check(f"{images}", None, check.error, check.allowed))
        notes += [note for note in said if note not in notes]
    return checks, notes
