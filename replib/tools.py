"""One network from the command line: train, test, deploy, export (`replib train --help`).

`train` is one cell of a table: the same checkpoints, evidence and resumption. The others take what
it writes, and the released files of `replib.official`.
"""

from __future__ import annotations

import copy
import inspect
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from replib import official
from replib.branches import Convolution
from replib.checkpoint import load_model, save_model
from replib.errors import UserError
from replib.experiments import teachers
from replib.experiments.cells import (
    Plan,
    Planned,
    check_scales_of,
    dataset,
    key_of,
    opened,
    outside,
    split_of,
    trained_model,
    with_teacher,
)
from replib.experiments.executor import device_here, run_plan
from replib.experiments.params import KEY, Cell, apply_settings, built, in_one_line
from replib.experiments.store import Store
from replib.export import OPSET, PROGRAMS, Export, Format, check_packages, export
from replib.fusing import deployed_copy, fold_norms
from replib.models import BODIES
from replib.models.repvgg import RepVGGPlus
from replib.networks import CONVOLUTIONS, TRANSPOSED
from replib.training.data import DATA, Dataset
from replib.training.loader import batches
from replib.verification import relative_error, verify

DEFAULTS = {
    "epochs": 20,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "crop_padding": 4,
    "flip": True,
}
DEFAULTS_OF = {"digits": {"crop_padding": 1, "flip": False}}  # a flipped digit is no digit
BATCH = 256
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
VERIFIED = 32  # test images that `verify` sees, in float64


# -- what the arguments name -----------------------------------------------------------------------
def named_data(data: str, folder: str | None) -> dict:
    """`--data` and `--data-dir` as the keys of a cell; paths are meant from where we are."""
    if data not in DATA:
        if not Path(data).is_dir():
            names = ", ".join(name for name in DATA if name != "imagefolder")
            raise UserError(f"--data (={data!r}) must be {names} or the path of an image folder.")
        data, folder = "imagefolder", data
    return {"data": data} | ({"data_dir": str(Path(folder).absolute())} if folder else {})


def open_data(
    data: str, folder: str | None, image_size: int | None, image_resize: int | None = None
) -> Dataset:
    """The data set that the arguments name. Raises: UserError where it cannot be read."""
    for name, value in (("size", image_size), ("resize", image_resize)):
        if value is not None and value < 1:
            raise UserError(f"--image-{name} (={value}) must be at least 1.")
    named = named_data(data, folder)
    sizes = {"image_size": image_size, "image_resize": image_resize}
    return opened(named["data"], named.get("data_dir"), **sizes)


def is_ours(path: Path) -> bool:
    """Whether a file is safetensors: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def open_network(path: Path, arch: str | None) -> nn.Module:
    """A network of ours, or a released one of the architecture `arch`, in eval mode.

    Raises: UserError for a file that holds none; OSError where it cannot be read.
    """
    ours = is_ours(path)
    if ours and arch is not None:
        raise UserError(f"{path} holds its own structure: leave --arch (={arch}) out.")
    if not ours and arch is None:
        raise UserError(
            f"{path} is no network of replib; for a checkpoint of an original repository, say "
            f"which network it is with --arch ({', '.join(list(official.ARCHITECTURES)[:3])}, ...)."
        )
    try:
        return (load_model(path) if ours else official.load_model(path, arch)).eval()
    except OSError:
        raise
    except Exception as error:  # whatever a foreign file provokes; weights_only runs no code of its
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(said if str(path) in said else f"{path}: {said}") from None


@torch.no_grad()
def check_fit(model: nn.Module, data: Dataset) -> None:
    """Raises: UserError where images or classes of the data are not those of the network."""
    x = batch_of(model, data, 1)
    try:
        out = model(x)
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, x.shape[1:]))
        said = " ".join(str(error).split())
        raise UserError(f"the network takes no images of {data.name} ({shape}): {said}") from None
    classes = out.shape[-1] if isinstance(out, Tensor) and out.dim() == 2 else "no"
    if classes != len(data.classes):
        raise UserError(
            f"the network has {classes} classes, {data.name} has {len(data.classes)}: "
            f"{shortened(data.classes)}."
        )


def shortened(classes: tuple[str, ...]) -> str:
    """Class names in the order of their numbers."""
    return ", ".join(classes if len(classes) <= 10 else (*classes[:3], "...", classes[-1]))


def batch_of(model: nn.Module, data: Dataset, images: int) -> Tensor:
    """Test images from all over the split, normalised, in the dtype of the network."""
    step = max(1, len(data.test_labels) // images)
    x = data.normalised(data.test_images[::step][:images])
    return x.to(next(model.parameters()).dtype)


def check_out(out: Path, source: Path | None = None) -> None:
    """Raises: UserError or OSError, before any work, where a file cannot be written."""
    if out.is_dir():
        raise UserError(f"--out (={str(out)!r}) is a folder: name a file.")
    if source is not None and out.exists() and out.samefile(source):
        raise UserError(f"--out (={str(out)!r}) is the network itself: name another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent):
        pass


# -- train -----------------------------------------------------------------------------------------
def train(
    given: dict,
    settings: list[str],
    out: Path,
    *,
    device: str | None = None,
    compile: str = "auto",
) -> None:
    """Train one cell, or go on with it, and write the selected network to a safetensors file.

    given: keys of `Cell`, over `DEFAULTS`; settings: "key=value" over these; compile: of
    replib.training.step.MODES.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out (={str(out)!r}) must end in .safetensors.")
    values = DEFAULTS | DEFAULTS_OF.get(given["data"], {}) | given
    store = Store()
    plan = plan_of(apply_settings(values, settings), store)
    check_out(out)
    planned = list(plan.cells.values())[-1]
    options = {"workers": 1, "device": device, "compile": compile, "title": "train:"}
    trained = run_plan(plan, store, **options).trained
    model, result = trained_model(planned, store), store.read(planned.key)["result"]
    save_model(model, out)
    final, deployed, epochs = result["final"], result["deployed"], planned.epochs
    epoch = final["selected_epoch"]
    validation = result["history"]["validation_accuracy"][epoch]
    selected = f"epoch {epoch + 1} of {epochs}, selected by {final['selected_by']}"
    print(f"cell         {planned.key[:16]}{'' if trained else ' (was trained before)'}")
    print(f"network      {selected}")
    if validation is not None:
        images = result["images"]["held_out"]
        print(f"validation   {percent(validation)} of {images:,} images held out of training")
    images = result["data"]["test_images"]
    print(f"test         {percent(final['selected'])} of {images:,} images")
    print(
        f"deployed     {deployed['parameters']:,} parameters, {deployed['flops']:,} FLOPs an image"
    )
    print(f"written      {out}")


def plan_of(values: dict, store: Store) -> Plan:
    """The plan of one cell, and of the cells that it starts from or learns from.

    Raises: UserError for keys, names and sizes that cannot be.
    """
    plan, paths, teacher = Plan(), {}, values.get("teacher")
    for role in ("start", "scales"):
        if isinstance(text := values.get(role), str):
            text = text if KEY.fullmatch(text) else str(Path(text).absolute())
            said, paths[f"{role}_path"] = outside(plan, store, role, text, values.get("data_dir"))
            values = values | {role: said}
    if isinstance(teacher, str):
        values = values | {"teacher": teachers.absolute(teacher)}
    try:
        cell = Cell.model_validate(values)
        with torch.device("meta"):  # shapes only: nothing is drawn or stored
            built(cell.network, classes=10, in_channels=3)
        if "block" in values and "block" not in inspect.signature(BODIES[cell.body]).parameters:
            raise ValueError("this body has plain layers only, leave --block out")
    except ValidationError as error:
        raise in_one_line(error, "train") from None
    except ValueError as error:
        raise UserError(f"body={cell.body}, block={cell.block}: {error}") from None
    data = dataset(cell)
    if cell.protocol == "clean" and not cell.held_out:
        images = cell.train_images or len(data.train_labels)
        cell = cell.model_copy(update={"held_out": max(1, images // 10)})
    split_of(cell)  # finds impossible sizes before anything is trained
    cell, taught = with_teacher(cell, plan, store)
    if cell.repopt is not None:
        check_scales_of(cell, plan.cells.get(cell.scales), "train")
    key = key_of(cell, data.digest)
    plan.cells[key] = Planned(key, cell, rows=("train",), **paths, **taught)
    plan.weights.add(key)
    return plan


# -- test ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Form:
    """A network in one of its forms, on the test split."""

    name: str
    logits: Tensor  # (N, classes), on the CPU
    ranks: Tensor  # (N,): how many classes come before the right one; all, where that is not known
    parameters: int
    convolutions: int
    norms: int
    bytes: int
    images_per_second: float

    def top(self, k: int) -> float:
        """The fraction of images whose class is among the k largest logits."""
        return (self.ranks < k).double().mean().item()

    @property
    def columns(self) -> dict[str, str]:
        """What is shown."""
        top5 = {"top-5": percent(self.top(5))} if self.logits.shape[1] > 5 else {}
        return {
            "form": self.name,
            "top-1": percent(self.top(1)),
            **top5,
            "parameters": f"{self.parameters:,}",
            "convolutions": f"{self.convolutions:,}",
            "norms": f"{self.norms:,}",
            "bytes": f"{self.bytes:,}",
            "images/s": f"{self.images_per_second:,.0f}",
        }


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def measured(name: str, model: nn.Module, data: Dataset, device: str, batch: int) -> Form:
    """Run a network, which stays where it is, over the test split."""
    started = time.perf_counter()
    logits = outputs(model, data, device, batch)
    seconds = time.perf_counter() - started
    # As argmax and topk break ties: of equal logits the first comes first.
    order = logits.argsort(dim=1, descending=True, stable=True)
    ranks = (order == data.test_labels[:, None]).int().argmax(1)
    ranks[~logits.isfinite().all(1)] = logits.shape[1]
    modules = list(model.modules())
    tensors = model.state_dict().values()
    return Form(
        name,
        logits,
        ranks,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(isinstance(m, (*CONVOLUTIONS, *TRANSPOSED, Convolution)) for m in modules),
        sum(isinstance(m, NORMS) for m in modules),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        len(logits) / seconds,
    )


@torch.no_grad()
def outputs(model: nn.Module, data: Dataset, device: str, batch: int) -> Tensor:
    """The logits of all test images, computed as in training, without TF32."""
    dtype, found = next(model.parameters()).dtype, []
    layout = torch.channels_last
    model = copy.deepcopy(model).to(device, memory_format=layout)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        chunks = torch.arange(len(data.test_labels)).split(batch)
        images = batches(data.test_images, chunks, device)
        for x in tqdm(images, "test images", len(chunks), leave=False, disable=None):
            x = data.normalised(x, device).to(dtype).contiguous(memory_format=layout)
            found.append(model(x).cpu())
    return torch.cat(found)


def show(forms: list[Form]) -> None:
    """A table of plain text."""
    rows = [list(forms[0].columns), *(list(form.columns.values()) for form in forms)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *rest in rows:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    for form in forms:
        if lost := (~form.logits.isfinite().all(1)).sum().item():
            print(f"{form.name}: {lost:,} images have outputs that are not finite")


def describe(data: Dataset) -> None:
    """The data that accuracies are of."""
    order = "sorted folder names" if data.name.startswith("imagefolder") else "as published"
    print(f"data: {data.name}, test split, {len(data.test_labels):,} images")
    print(f"classes, {order}: {shortened(data.classes)}")


def test(
    path: Path,
    data: Dataset,
    *,
    arch: str | None = None,
    form: str | None = None,
    device: str | None = None,
    batch: int = BATCH,
) -> list[Form]:
    """Print, and return, the accuracy of a network on the test split.

    form: "training", "deployed" or "both"; None: all that the file has.
    """
    device = device_here(device)
    model = open_network(path, arch)
    check_fit(model, data)
    blocks = official.deployable(model)
    if not blocks and form in ("training", "both"):
        raise UserError(f"--form (={form}): {path} has no block, only its deployed form.")
    models = {"training": model} if blocks and form != "deployed" else {}
    if form != "training":
        models["deployed"] = deployed_form(model)
    forms = [measured(name, model, data, device, batch) for name, model in models.items()]
    describe(data)
    show(forms)
    return forms


# -- deploy ----------------------------------------------------------------------------------------
def deployed_form(model: nn.Module, layout: str = "replib") -> nn.Module:
    """A copy with its blocks merged and its norms folded, of the classes that `save_model` knows.

    The deployed networks of the original codes keep the norms that no block holds; they lose, as
    ours do, RepVGGplus's classifiers beside, which only training runs.
    """
    deployed = deployed_copy(model)
    if isinstance(deployed, RepVGGPlus):
        deployed.auxiliary.clear()
    if layout != "official":
        deployed = fold_norms(deployed, [])
    return deployed


FORMATS = {
    ".safetensors": Format(lambda model, path, inputs: save_model(model, path), load_model),
    **PROGRAMS,
}


def official_format(arch: str) -> Format:
    """What the deployed script of an original repository loads."""
    return Format(
        lambda model, path, inputs: torch.save(official.export(model, arch), path),
        lambda path: official.load_model(path, arch).eval(),
    )


def format_of(out: Path, layout: str, arch: str | None) -> Format:
    """The format that the arguments name."""
    if layout == "official":
        if arch not in official.ARCHITECTURES:
            known = ", ".join(official.ARCHITECTURES)
            raise UserError(f"--layout official needs --arch (={arch}), one of {known}.")
        if out.suffix in FORMATS:
            raise UserError(f"--out (={str(out)!r}): --layout official is written as .pth.")
        return official_format(arch)
    if out.suffix not in FORMATS:
        raise UserError(
            f"--out (={str(out)!r}) must end in {', '.join(FORMATS)}; another suffix is for "
            "--layout official."
        )
    if out.suffix == ".onnx":
        check_packages()
    return FORMATS[out.suffix]


def deploy(
    path: Path,
    data: Dataset,
    out: Path,
    *,
    arch: str | None = None,
    layout: str = "replib",
    device: str | None = None,
    batch: int = BATCH,
) -> bool:
    """Deploy a network, prove on real images that its function stays, and only then write it.

    Three bounds: of `verify`, per block and end to end, on `VERIFIED` images; twice its bound of
    the end, as both forms round, between the outputs of all test images; and once more for what
    is read back from the file. Returns whether they hold; where one does not nothing is written.
    """
    device, form = device_here(device), format_of(out, layout, arch)
    model = open_network(path, None if layout == "official" and is_ours(path) else arch)
    check_out(out, path)
    check_fit(model, data)
    deployed = deployed_form(model, layout)
    before = measured("before", model, data, device, batch)
    after = measured("after", deployed, data, device, batch)
    x = batch_of(model, data, VERIFIED)
    verification = verify(model, deployed, x)
    bound = 2 * verification.network.allowed
    difference = relative_error(after.logits, before.logits.double())
    moved = (before.logits.argmax(1) != after.logits.argmax(1)).sum().item()
    describe(data)
    show([before, after])
    print(f"{len(x)} images, in float64: {verification}")
    print(
        f"all images: outputs differ by {difference:.2e}, allowed {bound:.2e}; {moved} images are "
        "classified otherwise"
    )
    if not (verification.ok and difference <= bound):
        print(f"replib: {out} is not written: the function changed.", file=sys.stderr)
        return False
    return written(deployed, x, out, form, bound)


@torch.no_grad()
def written(model: nn.Module, x: Tensor, out: Path, form: Format, bound: float) -> bool:
    """Write a file whole or not at all, and only if what is read back computes the same."""
    wanted = model(x).double()
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        draft = Path(folder) / out.name
        try:
            form.write(model, draft, (x,))
        except ValueError as error:
            raise UserError(f"{out} cannot be written: {' '.join(str(error).split())}") from None
        again = form.read(draft)
        errors = [relative_error(again(x[:n]), wanted[:n]) for n in (1, 3, len(x))]
        if not all(error <= bound for error in errors):
            print(f"replib: {out} is not written: read back, it differs.", file=sys.stderr)
            return False
        draft.replace(out)
    print(f"{out}: {out.stat().st_size:,} bytes")
    return True


# -- export ----------------------------------------------------------------------------------------
def export_file(
    path: Path,
    out: Path,
    *,
    data: Dataset | None = None,
    shape: tuple[int, ...] | None = None,
    arch: str | None = None,
    form: str = "deployed",
    opset: int = OPSET,
) -> Export:
    """`replib.export.export` of a network in a file, on test images or on noise of a shape
    (channels, height, width); prints, and returns, the report."""
    if out.suffix not in PROGRAMS:
        raise UserError(f"--out (={str(out)!r}) must end in {' or '.join(PROGRAMS)}.")
    model = open_network(path, arch)
    check_out(out, path)
    if data is not None:
        check_fit(model, data)
        x = batch_of(model, data, VERIFIED)
        print(f"seen: {len(x)} test images of {data.name}")
    else:
        x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
        x = x.to(next(model.parameters()).dtype)
        print(f"seen: {len(x)} images of noise (--data proves it on your own)")
    try:
        report = export(model, out, x, form=form, opset=opset)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    print(report)
    return report
