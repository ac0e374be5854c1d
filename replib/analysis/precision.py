"""How far a merged network is from the branched one: by precision, family of blocks and depth.

    python -m replib.analysis.precision --device cuda --out FILE.json

needs torch and nothing else. The reference is the branched network in float64. Its parameters are
float32 values and its input is exact in every precision, so that in float32 nothing but the
arithmetic makes a difference; in the smaller ones the parameters are rounded too.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib import kernels, machine
from replib.blocks import BLOCKS
from replib.blocks.block import Geometry, RepBlock
from replib.branches import Convolution, Norm
from replib.errors import UserError
from replib.foreign import json_of
from replib.kernels import Kernel
from replib.training.checkpoint import write_bytes

DEPTHS = (1, 2, 4, 8, 16, 32)
LARGEST_KERNEL = 7  # RepLKNet's 31 pixels would take most of the time
PRECISIONS = {  # the type of the tensors, and the largest relative error of rounding one number
    "float64": (torch.float64, 2.0**-53),
    "float32": (torch.float32, 2.0**-24),
    "tf32": (torch.float32, 2.0**-11),  # a GPU rounds what it multiplies to 11 significant bits
    "float16": (torch.float16, 2.0**-11),
    "bfloat16": (torch.bfloat16, 2.0**-8),
}
WAYS = {
    "branches": "nothing is merged; the branches run in the precision",
    "merged": "merged in float64 on the processor, rounded once",
    "merged on the device": "merged in float64 on the device, rounded once",
    "merged in its precision": "parameters rounded first, merged in the precision itself",
    "nudged input": "the reference itself, with the input off by one rounding: a control",
}
Layer = Callable[[Tensor], Tensor]


def measure(
    device: str = "cpu",
    *,
    families: Sequence[str] = tuple(BLOCKS),
    depths: Sequence[int] = DEPTHS,
    precisions: Sequence[str] = tuple(PRECISIONS),
    seeds: Sequence[int] = (0,),
    channels: int = 16,
    space: int = 10,
    images: int = 2,
) -> dict:
    """{"context", "settings", "rows"}: plain data, repeatable from its settings.

    A row is one network run in one way: {family, kernel_size, seed, precision, way, depth, error,
    largest}, the last three being lists over depths. error = |y - reference| / |reference| in
    Euclidean norm, largest = max |y - reference| / max |reference|; None where y is not finite.
    Networks are stacks of blocks with a ReLU behind each, on (images, channels, space, space);
    kernels have the size of their family, at most `LARGEST_KERNEL`. "tf32" is left out on a
    processor, and so is "merged on the device", which is the same there.
    Raises: ValueError for names that are not known, and depths below 1.
    """
    names = (("families", families, BLOCKS), ("precisions", precisions, PRECISIONS))
    for name, values, known in names:
        for value in values:
            if value not in known:
                raise ValueError(f"{name}: {value!r} must be one of {', '.join(known)}.")
    if not depths or min(depths) < 1:
        raise ValueError(f"depths (={tuple(depths)}) must be numbers of at least 1.")
    on_gpu, rows = torch.device(device).type == "cuda", []
    precisions = [name for name in precisions if on_gpu or name != "tf32"]
    for family in families:
        size = min(BLOCKS[family].default_kernel_size, LARGEST_KERNEL)
        for seed in seeds:
            x = exact_input((images, channels, space, space), seed)
            blocks = stack(family, max(depths), size, x, seed)
            reference = outputs(blocks, x, depths)
            for precision in precisions:
                for way, found in run(blocks, x, depths, precision, device).items():
                    row = {"family": family, "kernel_size": size, "seed": seed}
                    row |= {"precision": precision, "way": way, "depth": list(depths)}
                    rows.append(row | errors(found, reference))
    settings = {"device": device, "seeds": list(seeds), "input": [images, channels, space, space]}
    where = machine.context(device, Path()) | {"flags": flags()}
    return {"context": where, "settings": settings, "rows": rows}


# -- the networks ---------------------------------------------------------------------------------
@torch.no_grad()
def stack(family: str, depth: int, kernel_size: int, x: Tensor, seed: int) -> list[RepBlock]:
    """`depth` blocks in eval mode, float64 with float32 values, for x (N, C, H, W).

    Slopes, shifts and weights are random. Running statistics are those of what the norm sees when
    x goes through the blocks with a ReLU after each, up to a random factor, as in training: so
    outputs stay in range at any depth.
    """
    channels, blocks = x.shape[1], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(depth):
            block = BLOCKS[family](channels, channels, kernel_size)
            scramble(block.double().eval(), x)
            x = F.relu(block.float().double()(x))
            blocks.append(block)
    return blocks


def scramble(block: RepBlock, x: Tensor) -> None:
    """Leave nothing in a block special: a fresh norm is the identity, and hides its errors."""

    def measure_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        axes = (0, *range(2, inputs[0].dim()))
        mean, deviation = inputs[0].mean(axes), inputs[0].std(axes, correction=0)
        norm.running_mean.copy_(mean + deviation * torch.empty_like(mean).uniform_(-0.3, 0.3))
        norm.running_var.copy_(deviation.square() * torch.empty_like(mean).uniform_(0.5, 2))

    hooks = []
    for piece in block.modules():
        if isinstance(piece, Convolution):
            piece.weight.add_(torch.randn_like(piece.weight) * 0.1)  # an offset starts at 0
        elif isinstance(piece, Norm):
            sign = torch.randint(0, 2, piece.norm.weight.shape) * 2 - 1
            piece.norm.weight.uniform_(0.2, 1.5).mul_(sign)
            piece.norm.bias.uniform_(-0.3, 0.3)
            hooks.append(piece.norm.register_forward_pre_hook(measure_statistics))
    block(x)
    for hook in hooks:
        hook.remove()


def exact_input(shape: Sequence[int], seed: int) -> Tensor:
    """Normal numbers in steps of 1/32 between -4 and 4, exact in every precision; float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (drawn * 32).round().clamp(-128, 128) / 32


# -- running them ---------------------------------------------------------------------------------
def run(
    blocks: Sequence[RepBlock], x: Tensor, depths: Sequence[int], precision: str, device: str
) -> dict[str, list[Tensor]]:
    """{way: the outputs after so many blocks} for all of `WAYS` that there are; on the device."""
    dtype, roundoff = PRECISIONS[precision]
    with float32_products("tf32" if precision == "tf32" else "ieee"), torch.no_grad():
        ways = networks(blocks, dtype, device).items()
        found = {way: outputs(layers, x.to(device, dtype), depths) for way, layers in ways}
    generator = torch.Generator().manual_seed(0)
    nudge = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
    return found | {"nudged input": outputs(blocks, x * (1 + roundoff * nudge), depths)}


def networks(blocks: Sequence[RepBlock], dtype: torch.dtype, device: str) -> dict[str, list[Layer]]:
    """{way: the layers in place of the blocks}, to be run in a type on a device."""

    def merged(blocks: Sequence[RepBlock], fold_in: torch.dtype = torch.float64) -> list[Layer]:
        folded = ((block, block.in_own_form(block.kernel(fold_in))) for block in blocks)
        return [convolution(block.geometry, kernel.to(device, dtype)) for block, kernel in folded]

    cast = [copy.deepcopy(block).to(device, dtype) for block in blocks]
    made = {"branches": list(cast), "merged": merged(blocks)}
    if torch.device(device).type != "cpu":
        moved = [copy.deepcopy(block).to(device) for block in blocks]
        made["merged on the device"] = merged(moved)
    return made | {"merged in its precision": merged(cast, dtype)}


def convolution(geometry: Geometry, kernel: Kernel) -> Layer:
    """A kernel with the stride and the padding of its block."""
    return lambda x: kernels.convolve(x, kernel, geometry.padding, geometry.stride)


@torch.no_grad()
def outputs(layers: Sequence[Layer], x: Tensor, depths: Sequence[int]) -> list[Tensor]:
    """What has become of x after so many layers, a ReLU behind each."""
    found = {}
    for depth, layer in enumerate(layers, start=1):
        found[depth] = x = F.relu(layer(x))
    return [found[depth] for depth in depths]


def errors(found: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, list[float | None]]:
    """Relative errors of outputs, in Euclidean and in maximum norm."""
    pairs = [(y.to(exact), exact) for y, exact in zip(found, reference, strict=True)]
    return {
        "error": [rounded((y - exact).norm() / exact.norm()) for y, exact in pairs],
        "largest": [rounded((y - exact).abs().max() / exact.abs().max()) for y, exact in pairs],
    }


def rounded(value: Tensor) -> float | None:
    """Four significant digits; None for what JSON has no word for."""
    return float(f"{value.item():.4g}") if value.isfinite() else None


# -- the flags of torch ---------------------------------------------------------------------------
def switches() -> dict[str, object]:
    """Where torch keeps how float32 numbers are multiplied, for a GPU and for a processor."""
    gpu = {"matmul": torch.backends.cuda.matmul, "convolution": torch.backends.cudnn.conv}
    cpu = {"matmul": torch.backends.mkldnn.matmul, "convolution": torch.backends.mkldnn.conv}
    return {f"gpu {k}": v for k, v in gpu.items()} | {f"cpu {k}": v for k, v in cpu.items()}


@contextmanager
def float32_products(mode: str) -> Iterator[None]:
    """Multiply float32 numbers as "ieee" or, on a GPU, as "tf32"; afterwards all is as it was.

    By its own defaults torch lets convolutions on a GPU use TF32, and matrix products not.
    """
    before = {name: place.fp32_precision for name, place in switches().items()}
    try:
        for name, place in switches().items():
            place.fp32_precision = mode if name.startswith("gpu") else "ieee"
        yield
    finally:
        for name, place in switches().items():
            place.fp32_precision = before[name]


def flags() -> dict[str, bool]:
    """What else may change last digits on a GPU: left as it is, and recorded."""
    matmul = torch.backends.cuda.matmul
    return {
        "float16 sums may be reduced in float16": bool(
            matmul.allow_fp16_reduced_precision_reduction
        ),
        "bfloat16 sums may be reduced in bfloat16": bool(
            matmul.allow_bf16_reduced_precision_reduction
        ),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
    }


# -- what the rows say ----------------------------------------------------------------------------
def typical(rows: Sequence[dict], precision: str, way: str, family: str | None = None) -> list:
    """The median error, over networks, after each of the depths; [] where nothing was measured."""
    lines = [
        [math.inf if error is None else error for error in row["error"]]
        for row in rows
        if (row["precision"], row["way"]) == (precision, way) and family in (None, row["family"])
    ]
    return [statistics.median(at_depth) for at_depth in zip(*lines, strict=True)]


def summary(measurement: dict) -> list[dict]:
    """{precision, way, first, last, growth}: medians over all networks.

    first and last: the error at the smallest and the largest depth, in units of the precision's
    roundoff; growth: the factor per block between them.
    """
    rows, out = measurement["rows"], []
    depths = rows[0]["depth"]
    blocks = max(depths[-1] - depths[0], 1)
    for precision, (_, roundoff) in PRECISIONS.items():
        for way in WAYS:
            found = typical(rows, precision, way)
            if found and found[0] > 0:  # the reference is at no distance from itself
                line = {"precision": precision, "way": way}
                line |= {"first": found[0] / roundoff, "last": found[-1] / roundoff}
                out.append(line | {"growth": (found[-1] / found[0]) ** (1 / blocks)})
    return out


def by_family(measurement: dict) -> list[dict]:
    """{family, precision, and every way}: the median error at the smallest depth, in roundoffs."""
    rows, out = measurement["rows"], []
    for family in dict.fromkeys(row["family"] for row in rows):
        for precision, (_, roundoff) in PRECISIONS.items():
            found = {way: typical(rows, precision, way, family) for way in WAYS}
            ways = {way: errors[0] / roundoff for way, errors in found.items() if errors}
            if ways:
                out.append({"family": family, "precision": precision} | ways)
    return out


def statements(measurement: dict) -> list[str]:
    """What a measurement says; every number and every verdict is computed from it."""
    found = {(line["precision"], line["way"]): line for line in summary(measurement)}
    depths = measurement["rows"][0]["depth"]
    measured = [name for name in PRECISIONS if (name, "merged") in found]
    said = [of_precision(name, found, depths) for name in measured]
    # The reference is no better than float64 itself, so growth cannot be seen there.
    judged = [name for name in measured if name != "float64"]
    if len(depths) > 1 and judged:
        grown = [found[name, "merged"]["growth"] for name in judged]
        nudged = [found[name, "nudged input"]["growth"] for name in judged]
        own = max(g / n for g, n in zip(grown, nudged, strict=True)) < 1.1
        verdict = (
            "the network amplifies any error that it is given, and merging adds nothing to that"
            if own
            else "the errors of later blocks add to what the network amplifies"
        )
        said.append(
            f"From {depths[0]} to {depths[-1]} blocks the error of the merged network grows "
            f"{span(grown)} times per block, a nudge of the input alone {span(nudged)} times: "
            f"{verdict}."
        )
    lost = sum(None in row["error"] for row in measurement["rows"])
    return said + [f"{lost} runs left the range of their precision."] * (lost > 0)


def of_precision(name: str, found: dict[tuple[str, str], dict], depths: Sequence[int]) -> str:
    """The sentence about one precision."""
    once, roundoff = found[name, "merged"], PRECISIONS[name][1]
    parts = [f"{once['first']:.2g} u from the exact result"]
    if (name, "branches") in found:
        parts.append(times(once["first"] / found[name, "branches"]["first"]) + " its branches")
    if name != "float64":
        own = found[name, "merged in its precision"]["first"] / once["first"]
        parts.append(f"merged in {name} itself, {times(own)} that")
    if (name, "merged on the device") in found:
        there = found[name, "merged on the device"]["first"] / once["first"]
        parts.append(f"merged in float64 on the device, {times(there)} that")
    text = f"{name} (u = {roundoff:.2g}): {block_count(depths[0])} merged, " + "; ".join(parts)
    if once["last"] * roundoff > 0.01:
        share = 100 * once["last"] * roundoff
        text += f". Behind {block_count(depths[-1])} the error is {share:.0f} % of the output"
    return text + "."


def block_count(depth: int) -> str:
    return "one block" if depth == 1 else f"{depth} blocks"


def times(ratio: float) -> str:
    """How far, as compared with something else."""
    return "as far as" if abs(ratio - 1) < 0.05 else f"{ratio:.2f} times as far as"


def span(values: Sequence[float]) -> str:
    """The smallest and the largest, or one number where they are the same to two places."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


# -- the file -------------------------------------------------------------------------------------
def write(path: Path, measurement: dict) -> None:
    """Write a measurement as one JSON file, whole or not at all."""
    text = json.dumps(measurement, sort_keys=True, separators=(",", ":"), allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def read(path: Path) -> dict:
    """What `write` wrote. Raises: UserError, in one line, for any other file."""
    try:
        measurement = json_of(path)
        keys = {"family", "kernel_size", "seed", "precision", "way", "depth", "error", "largest"}
        if measurement["rows"] and all(row.keys() == keys for row in measurement["rows"]):
            return measurement
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is no measurement of precision: write one with --out.")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write one file, and say what it says."""
    parser = argparse.ArgumentParser("python -m replib.analysis.precision", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--families", nargs="+", default=list(BLOCKS), help="of blocks; all")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="blocks in a row")
    parser.add_argument("--networks", type=int, default=3, help="random networks per family")
    parser.add_argument("--commit", help="of this code, where it is a copy without git")
    arguments = parser.parse_args(argv)
    measurement = measure(
        arguments.device,
        families=arguments.families,
        depths=arguments.depths,
        seeds=range(arguments.networks),
    )
    if arguments.commit:
        measurement["context"]["commit"] = arguments.commit
    write(arguments.out, measurement)
    print(*statements(measurement), arguments.out, sep="\n")


if __name__ == "__main__":
    main()
