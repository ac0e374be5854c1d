"""The measurement of merging errors: rows against errors computed apart, its words, its file."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replib.analysis import precision
from replib.blocks import BLOCKS
from replib.errors import UserError

SMALL = {"families": ["convbn", "dbb"], "depths": (1, 3), "channels": 4, "space": 6}


@pytest.fixture(scope="module")
def measured():
    return precision.measure(**SMALL)


def errors_of(measurement, **wanted):
    rows = [r for r in measurement["rows"] if wanted.items() <= r.items()]
    assert len(rows) == 1
    return rows[0]["error"]


# -- the networks ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in precision.PRECISIONS.values()])
def test_the_input_is_exact_in_every_precision(dtype):
    x = precision.exact_input((2, 3, 9, 9), 0)
    assert torch.equal(x.to(dtype).double(), x) and len(x.unique()) > 100


@pytest.mark.parametrize("family", BLOCKS)
def test_networks_hide_nothing_and_stay_in_range(family):
    x = precision.exact_input((2, 8, 8, 8), 0)
    size = min(BLOCKS[family].default_kernel_size, precision.LARGEST_KERNEL)
    blocks = precision.stack(family, 12, size, x, 0)
    for y in precision.outputs(blocks, x, (1, 4, 12)):
        assert 0.1 < y.std() < 10
    for block in blocks:
        assert not block.training
        for value in block.state_dict().values():
            assert torch.equal(value, value.float().to(value.dtype)), (
                "parameters are float32 values"
            )
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean.abs().min() > 0 and module.running_var.std() > 0
                assert module.weight.std() > 0 and module.bias.std() > 0


def test_seeds_repeat_and_differ(measured):
    torch.rand(1)  # whatever was drawn before
    again = precision.measure(**SMALL)
    assert again["rows"] == measured["rows"]
    other = precision.measure(**SMALL, seeds=[1])
    ours, theirs = (
        errors_of(m, family="dbb", precision="float32", way="merged") for m in (measured, other)
    )
    assert ours != theirs
    state = torch.get_rng_state()
    precision.measure(**SMALL | {"families": ["convbn"]})
    assert torch.equal(torch.get_rng_state(), state)


# -- the errors -----------------------------------------------------------------------------------
def test_rows_are_complete(measured):
    ways = {"branches", "merged", "merged in its precision", "nudged input"}
    want = {
        (f, p, w)
        for f in SMALL["families"]
        for p in ("float64", "float32", "float16", "bfloat16")
        for w in ways
    }
    assert {(r["family"], r["precision"], r["way"]) for r in measured["rows"]} == want
    assert len(measured["rows"]) == len(want)
    assert all(
        len(r["error"]) == len(r["largest"]) == len(r["depth"]) == 2 for r in measured["rows"]
    )


def test_errors_have_the_size_of_the_roundoff(measured):
    for row in measured["rows"]:
        roundoff = precision.PRECISIONS[row["precision"]][1]
        if (row["way"], row["precision"]) == ("branches", "float64"):
            assert row["error"] == [0, 0], "the reference itself"
        else:
            assert 0.1 * roundoff < row["error"][0] < 10 * roundoff, row
            assert row["error"][1] > row["error"][0], row


@torch.no_grad()
def test_convbn_in_bfloat16_against_a_merge_written_out(measured):
    """gamma / sqrt(var + eps), once in float64 and rounded, once in bfloat16 all along."""
    x = precision.exact_input((2, 4, 6, 6), 0)
    (block,) = precision.stack("convbn", 1, 3, x, 0)
    conv, layer = block.branches["conv"][0], block.branches["conv"][1].norm
    reference = F.relu(layer(F.conv2d(x, conv.weight, padding=1)))

    def merged(fold_in):
        parts = (conv.weight, layer.weight, layer.bias, layer.running_mean, layer.running_var)
        weight, gamma, beta, mean, var = (part.detach().to(fold_in) for part in parts)
        factor = gamma * (var + layer.eps).rsqrt()
        kernel, bias = weight * factor.view(-1, 1, 1, 1), beta - mean * factor
        y = F.conv2d(x.bfloat16(), kernel.bfloat16(), bias.bfloat16(), padding=1)
        return ((F.relu(y).double() - reference).norm() / reference.norm()).item()

    for way, fold_in in (("merged", torch.float64), ("merged in its precision", torch.bfloat16)):
        (row, *_) = [
            r
            for r in measured["rows"]
            if (r["family"], r["precision"], r["way"]) == ("convbn", "bfloat16", way)
        ]
        assert row["error"][0] == pytest.approx(merged(fold_in), rel=0.02), way


@torch.no_grad()
def test_the_branches_run_in_the_precision(measured):
    x = precision.exact_input((2, 4, 6, 6), 0)
    (block,) = precision.stack("dbb", 1, 3, x, 0)
    reference = F.relu(block(x))
    y = F.relu(copy.deepcopy(block).half()(x.half())).double()
    found = errors_of(measured, family="dbb", precision="float16", way="branches")
    assert found[0] == pytest.approx(((y - reference).norm() / reference.norm()).item(), rel=1e-3)


def test_errors_by_hand():
    found, reference = [torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0], dtype=torch.float64)]
    assert precision.errors(found, reference) == {"error": [0.1], "largest": [0.125]}
    lost = precision.errors([torch.tensor([torch.inf, 0.0])], reference)
    assert lost == {"error": [None], "largest": [None]}


def test_bad_requests_are_told_in_one_line():
    for arguments, message in (
        ({"families": ["vgg"]}, r"families: 'vgg' must be one of repvgg, acb"),
        ({"precisions": ["int8"]}, r"precisions: 'int8' must be one of float64"),
        ({"depths": (0, 2)}, r"depths \(=\(0, 2\)\) must be numbers of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            precision.measure(**SMALL | arguments)


# -- flags ----------------------------------------------------------------------------------------
def modes():
    return {name: place.fp32_precision for name, place in precision.switches().items()}


@pytest.mark.parametrize("mode", ["ieee", "tf32"])
def test_tf32_is_on_where_it_is_asked_for_and_nowhere_else(mode):
    before = modes()
    with pytest.raises(RuntimeError, match="stop"), precision.float32_products(mode):
        inside = modes()
        raise RuntimeError("stop")
    assert modes() == before
    assert inside == {name: mode if name.startswith("gpu") else "ieee" for name in before}
    assert torch.backends.cudnn.allow_tf32 in (True, False), "the older flags can still be read"


def test_every_run_sets_the_flags(monkeypatch):
    seen = []
    original = precision.networks

    def spy(blocks, dtype, device):
        seen.append((dtype, modes()["gpu convolution"]))
        return original(blocks, dtype, device)

    monkeypatch.setattr(precision, "networks", spy)
    x = precision.exact_input((1, 4, 5, 5), 0)
    blocks = precision.stack("convbn", 1, 3, x, 0)
    for name in precision.PRECISIONS:
        precision.run(blocks, x, (1,), name, "cpu")
    want = {name: "tf32" if name == "tf32" else "ieee" for name in precision.PRECISIONS}
    assert seen == [(precision.PRECISIONS[name][0], mode) for name, mode in want.items()]


# -- what it says ---------------------------------------------------------------------------------
def invented(merged, nudged=(1.0, 4.0), name="float16", **ways):
    """A measurement of two families at depths 1 and 3, errors in units of the roundoff."""
    roundoff = precision.PRECISIONS[name][1]
    ways = {"merged": merged, "merged in its precision": merged, "nudged input": nudged} | ways
    rows = [
        {
            "family": family,
            "precision": name,
            "way": way,
            "depth": [1, 3],
            "error": [None if v is None else v * roundoff for v in values],
        }
        for family in ("a", "b", "c")
        for way, values in ways.items()
    ]
    return {"rows": rows}


def test_typical_is_the_median_over_networks():
    rows = invented((1.0, 2.0))["rows"]
    mine = [row for row in rows if row["way"] == "merged"]
    mine[0]["error"], mine[1]["error"] = [None, 2.0**-8], [None, 2.0**-9]
    # Two of three left the range at the first depth: so did the typical one.
    assert precision.typical(rows, "float16", "merged") == [float("inf"), 2.0**-9]
    assert precision.typical(rows, "float16", "merged", "c") == [2.0**-11, 2.0**-10]
    assert precision.typical(rows, "float16", "branches") == []


def test_by_family_by_hand():
    measurement = invented((0.5, 8.0))
    measurement["rows"][0]["error"] = [2.0**-10, 1.0]
    first, second, _ = precision.by_family(measurement)
    assert first == {"family": "a", "precision": "float16"} | {
        "merged": 2.0,
        "merged in its precision": 0.5,
        "nudged input": 1.0,
    }
    assert (second["family"], second["merged"]) == ("b", 0.5)


def test_summary_by_hand():
    (line,) = [r for r in precision.summary(invented((0.5, 8.0))) if r["way"] == "merged"]
    assert line == {
        "precision": "float16",
        "way": "merged",
        "first": 0.5,
        "last": 8.0,
        "growth": 4.0,
    }


def test_statements_are_computed():
    same, *_, end = precision.statements(
        invented((0.5, 2.0), **{"branches": (1.0, 4.0), "merged in its precision": (0.6, 2.0)})
    )
    assert same.startswith("float16 (u = 0.00049): one block merged, 0.5 u from the exact result")
    assert "0.50 times as far as its branches" in same and "1.20 times as far as that" in same
    assert "grows 2.00 times per block, a nudge of the input alone 2.00 times" in end
    assert end.endswith("merging adds nothing to that.")
    (_, faster) = precision.statements(invented((0.5, 4.5)))
    assert faster.endswith("add to what the network amplifies.")
    (share, *_) = precision.statements(invented((1.0, 102.4)))
    assert share.endswith("Behind 3 blocks the error is 5 % of the output.")
    lost = precision.statements(invented((1.0, 2.0), branches=(1.0, None)))
    assert lost[-1] == "3 runs left the range of their precision."


# -- the file -------------------------------------------------------------------------------------
def test_a_measurement_is_read_as_it_was_written(measured, tmp_path):
    path = tmp_path / "folder" / "precision.json"
    precision.write(path, measured)
    assert precision.read(path) == measured
    assert measured["context"]["device"] == "cpu" and measured["context"]["processor"]


@pytest.mark.parametrize("content", ["", "[1]", '{"rows": []}', '{"rows": [{"family": "a"}]}'])
def test_other_files_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is no measurement of precision"):
        precision.read(path)
    with pytest.raises(UserError, match="is no measurement of precision"):
        precision.read(tmp_path / "absent.json")


@pytest.mark.slow
def test_the_command_needs_torch_alone(tmp_path):
    """As on a bare GPU machine: nothing else that the project depends on is imported."""
    out = tmp_path / "out.json"
    script = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN}:
            raise ImportError(name + " is not on this machine")
sys.meta_path.insert(0, Absent())
from replib.analysis.precision import main
main(["--out", {str(out)!r}, "--families", "convbn", "--depths", "1", "--networks", "1",
      "--commit", "abc"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["context"]["commit"] == "abc"
    assert "float32 (u = 6e-08): one block merged" in done.stdout


FORBIDDEN = {
    "torchvision", "pandas", "scipy", "sklearn", "yaml", "pydantic", "tqdm", "safetensors",
    "matplotlib", "seaborn", "timm",
}  # fmt: skip
