"""Our blocks against numbers that the official implementations computed.

The files are data, not part of this repository: they are looked for in ../shared beside it, or in
$REPLIB_SHARED. An official output may contain the activation that our blocks leave out.
"""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from replib import kernels, official

torch.set_num_threads(1)  # blocks this small lose by more
SHARED = Path(os.environ.get("REPLIB_SHARED", Path(__file__).resolve().parents[2] / "shared"))
VECTORS, FIXTURES = SHARED / "vectors", SHARED / "spec" / "fixtures"
pytestmark = pytest.mark.skipif(not VECTORS.is_dir(), reason=f"no official numbers in {SHARED}")

# Float32 sums of some hundred terms in another order: 2e-6 of the largest number (or of 1).
# Gradients pass two norms; weights under a norm have gradients that nearly cancel, so a
# gradient is measured against the largest one in its block.
OUTPUT, GRADIENT = 2e-6, 1e-4
VECTOR_SOURCES = {
    "repvgg": "repvgg",
    "acb": "acb",
    "dbb": "dbb",
    "orepa": "orepa",
    "orepa1x1": "orepa_1x1",
    "orepa-largeconv": "orepa_stem",
    "orepa-largeconvbase": "orepa_stem_base",
    "orepavgg": "orepa_repvgg",
    "mobileone": "mobileone",
    "replk": "replk",
    "dyrep": "dyrep",
    "repmlp": "repmlp",
    "cycle-repvgg": "repan_repvgg",
    "cycle-dbb": "repan_dbb",
    "cycle-acb": "repan_acb",
}
FIXTURE_SOURCES = {
    "repvgg": "repvgg",
    "acb": "acb",
    "dbb": "dbb",
    "orepa": "orepa",
    "orepa_1x1": "orepa_1x1",
    "orepa_large7": "orepa_stem",
    "orepa_vgg": "orepa_repvgg",
    "mobileone": "mobileone",
    "replk": "replk",
    "repvggplus": "repvgg",
    "repmlp": "repmlp",
    "dyrep": "dyrep",
    "repan_repvgg_cifar": "repan_repvgg",
    "repan_repvgg_img": "repan_repvgg",
    "repan_dbb": "repan_dbb",
    "repan_acb": "repan_acb",
    "repan_rep": "repan_rep",
}
NO_BLOCK = ("model-", "repopt", "sgd", "adamw", "kd_", "repvgg_custom_L2")  # tested elsewhere
WITH_RELU = {"repvgg", "mobileone", "orepa_repvgg", "repan_repvgg", "repan_dbb", "repan_acb"}
WITHOUT_RELU = ("cycle-dbb", "cycle-acb")  # an option of the released block
NORM_AT_RESTORE = {"repan_repvgg_img": "unit"}  # elsewhere the default of the family


def source_of(name: str, sources: dict[str, str]) -> str | None:
    """The longest known prefix of a file's or an entry's name."""
    known = [p for p in sources if name == p or name.startswith((p + "-", p + "_"))]
    return sources[max(known, key=len)] if known else None


def vectors(cycles: bool):
    for path in sorted(VECTORS.glob("*.npz")):
        source = source_of(path.stem, VECTOR_SOURCES)
        if source and path.stem.startswith("cycle-") == cycles:
            yield pytest.param(path.stem, source, id=path.stem)


@cache
def fixture_file(name: str) -> dict:
    return torch.load(FIXTURES / name, weights_only=True)


def fixtures(cycles: bool):
    for path in sorted(FIXTURES.glob("*.pt")):
        for name, entry in fixture_file(path.name).items():
            source = source_of(name, FIXTURE_SOURCES)
            wanted = "state_after_cycle_step" if cycles else "y_train"
            if source and wanted in entry and ("config" in entry) != cycles:
                yield pytest.param(f"{path.stem}.pt/{name}", source, id=name)


def under(values: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def read(name: str) -> dict:
    """A case from either kind of file, with the names of the fixtures."""
    if ".pt/" in name:
        file, entry = name.split("/")
        return {**fixture_file(file)[entry], "relu": True}
    with np.load(VECTORS / f"{name}.npz") as file:
        info = json.loads(str(file["info"]))
        values = {k: torch.from_numpy(file[k]) for k in file.files if k != "info"}
    case = {
        "relu": not name.startswith(WITHOUT_RELU),
        "config": info.get("args"),
        "state_before": under(values, "state/"),
        "probe": values.get("grad_output"),
        "grads": under(values, "grad/"),
        "buffers_after": under(values, "state_after/"),
        "kernel": values.get("merged/weight"),
        "bias": values.get("merged/bias"),
        "state_after_cycle_step": under(values, "restored/"),
        "outputs": {float(k): v for k, v in under(values, "y_restored/attach_").items()},
        "y_eval_before_lambda1": values.get("y_eval"),
        **values,
    }
    case["grad_x"] = case["grads"].pop("input", None)
    return case


def load(case: dict, source: str):
    return official.load_block(source, case.get("config") or inferred(case), case["state_before"])


def inferred(case: dict) -> dict:
    """The arguments of a block whose case does not say them."""
    main = next(v for k, v in case["state_before"].items() if v.dim() == 4 and v.shape[-1] > 1)
    x, y = case["x"], case["y_train"]
    return {
        "in_channels": x.shape[1],
        "out_channels": y.shape[1],
        "kernel_size": main.shape[-1],
        "stride": round(x.shape[-1] / y.shape[-1]),
        "groups": x.shape[1] // main.shape[1],
    }


def agree(ours, theirs, bound, scale=1.0, what=""):
    error = (ours - theirs).abs().max().item() / max(scale, theirs.abs().max().item())
    assert error <= bound, f"{what}: {error:.1e}"


def output(module, source, case, x=None):
    y = module(case["x"] if x is None else x)
    relu = case["relu"] and source in WITH_RELU and not hasattr(module, "post_se")
    return y.relu() if relu else y


def test_every_file_has_a_source():
    """No number of the official implementations is passed over."""
    for path in VECTORS.glob("*.npz"):
        assert source_of(path.stem, VECTOR_SOURCES) or path.stem.startswith(NO_BLOCK), path
    for path in FIXTURES.glob("*.pt"):
        for name in fixture_file(path.name):
            assert source_of(name, FIXTURE_SOURCES) or name.startswith(NO_BLOCK), name
    tested = {*VECTOR_SOURCES.values(), *FIXTURE_SOURCES.values()}
    parts = {"convbn", "repan_convbn", "repopt_csla", "repopt_repvgg", "timm_repvgg"}
    assert set(official.SOURCES) - tested == parts  # of networks


BLOCK_CASES = [*vectors(False), *fixtures(False)]
CYCLE_CASES = [*vectors(True), *fixtures(True)]


@pytest.mark.parametrize("name, source", BLOCK_CASES)
def test_a_block_computes_what_the_official_one_computes(name, source):
    case = read(name)
    module = load(case, source)
    block = getattr(module, "block", module)
    with torch.no_grad():
        agree(output(module.eval(), source, case), case["y_eval"], OUTPUT, what="eval")
    merged = block.merged()
    agree(merged.weight, case["kernel"], OUTPUT, what="merged weight")
    agree(merged.bias, case["bias"], OUTPUT, what="merged bias")


@pytest.mark.parametrize("name, source", BLOCK_CASES)
def test_a_block_learns_what_the_official_one_learns(name, source):
    case = read(name)
    module = load(case, source)
    check_one_step(module, source, case)
    if "y_eval_after" in case:
        with torch.no_grad():
            y = output(module.eval(), source, case)
        agree(y, case["y_eval_after"], OUTPUT, what="eval after the step")


def check_one_step(module, source, case):
    """Output, gradients and running statistics of one pass in train mode."""
    x = case["x"].clone().requires_grad_()
    y = output(module.train(), source, case, x)
    agree(y.detach(), case["y_train"], OUTPUT, what="train")
    (y * case["probe"]).sum().backward()
    agree(x.grad, case["grad_x"], GRADIENT, what="gradient of the input")
    table = official.block_table(module, source)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in case["grads"].values())
    for key, theirs in case["grads"].items():
        ours = table[key].write(*(gradients[name] for name in table[key].ours))
        agree(ours, theirs, GRADIENT, scale=largest, what=f"gradient of {key}")
    state = official.export_block(module, source)
    for key, theirs in case["buffers_after"].items():
        agree(state[key].double(), theirs.double(), OUTPUT, what=key)


@pytest.mark.parametrize("name, source", BLOCK_CASES)
def test_what_is_no_parameter_is_made_as_released(name, source):
    """Fixed filters and identities of a new block are those in the file."""
    case = read(name)
    new = official.SOURCES[source].build(
        {k: v for k, v in case["config"].items() if "se" not in k.split("_")}, case["state_before"]
    )
    table, state = official.block_table(new, source), official.export_block(new, source)
    fixed = [key for key, entry in table.items() if not entry.ours or key.endswith("_prior")]
    for key in fixed:
        if key.endswith("_prior") and key.startswith(("weight1", "weight2")):
            continue  # released stems mirror the later ones; a new stem of ours has no reason to
        # Released cosines are doubles rounded once; so are ours.
        agree(state[key], case["state_before"][key], 2e-7, what=key)
    assert bool(fixed) == ("orepa" in source and source not in ("orepa_1x1", "orepa_stem_base"))


@pytest.mark.parametrize("name, source", [*BLOCK_CASES, *CYCLE_CASES])
def test_a_block_comes_out_as_it_came_in(name, source):
    case = read(name)
    module = load(case, source)
    state = official.export_block(module, source)
    assert list(state) == list(case["state_before"])  # the official order too
    table = official.block_table(module, source)
    for key, tensor in case["state_before"].items():
        # What the block does not hold follows from it; a spare row of OREPA's `vector` is unread.
        held = table[key].read
        for ours, theirs in zip(held(state[key]), held(tensor), strict=True):
            assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name, source", CYCLE_CASES)
def test_a_turn_of_the_cycle(name, source):
    """Merge at rate 1, the file's redrawn side branches, official restoration, any rate."""
    case = read(name)
    block = load(case, source).eval()
    with torch.no_grad():
        before = output(block, source, case)
    agree(before, case["y_eval_before_lambda1"], OUTPUT, what="before")
    block.set_rate(0.3)  # the official merge does not look at it
    merged = block.merged(rate=1.0)
    if case.get("kernel") is not None:
        agree(merged.weight, case["kernel"], OUTPUT, what="merged weight")
        agree(merged.bias, case["bias"], OUTPUT, what="merged bias")

    after = case["state_after_cycle_step"]
    table = official.block_table(block, source)
    sides = [k for k, e in table.items() if any(f".{block.main}." not in o for o in e.ours)]
    mixed = official.export_block(block, source) | {key: after[key] for key in sides}
    official.fill(block, table, mixed)
    entry = name.split("/")[-1]
    block.restore(merged, "official", norm=NORM_AT_RESTORE.get(entry))
    restored = official.export_block(block, source)
    for key in set(table) - set(sides):
        if table[key].ours:
            agree(restored[key].double(), after[key].double(), OUTPUT, what=key)

    outputs = case.get("outputs") or {
        float(key): value for key, value in under(case, "y_eval_after_lambda_").items()
    }
    assert len(outputs) == 3
    for rate, theirs in outputs.items():
        block.set_rate(rate)
        with torch.no_grad():
            agree(output(block, source, case), theirs, OUTPUT, what=f"output at rate {rate}")
    if "y_train" in case:
        official.fill(block, table, after)
        block.set_rate(case["lambda"])
        check_one_step(block, source, case)


# DyRep's released cut and growth leave eval mode off by sqrt(1 + 1e-5), the epsilon of the norm
# that they reset; ours does not.
EPSILON = (1 + 1e-5) ** 0.5


@pytest.mark.parametrize("name", ["dyrep_full", "dyrep_s2_g2", "dyrep_depthwise"])
@torch.no_grad()
def test_cutting_branches_of_dyrep(name):
    config, case = read(f"dyrep.pt/{name}")["config"], read(f"dyrep.pt/{name}_cut")
    block = official.load_block("dyrep", config, case["state_before"]).eval()
    agree(block(case["x"]), case["y_before"], OUTPUT, what="before")
    whole = block.merged()
    kept = {k: v for k, v in case["state_before"].items() if k in case["state_after"]}
    block = official.load_block("dyrep", config | {"branches": case["keep"]}, kept).eval()
    block.restore(whole, "preserving")
    agree(block(case["x"]), case["y_before"], OUTPUT, what="after")
    agree(block(case["x"]), case["y_after"], 1e-5, what="after, released")
    check_dyrep_state(block, case["state_after"])


@torch.no_grad()
def test_growing_a_convolution_into_dyrep():
    case = read("dyrep.pt/dyrep_grow_no_recal")
    config = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    block = official.load_block("dyrep", config, case["state_after"]).eval()
    weight = case["conv_weight"]
    block.restore(kernels.Kernel(weight, weight.new_zeros(6)), "preserving")
    agree(block.merged().weight, weight, OUTPUT, what="merged weight")
    check_dyrep_state(block, case["state_after"])


def check_dyrep_state(block, released):
    for key, ours in official.export_block(block, "dyrep").items():
        ours = ours / EPSILON if key.startswith("dbb_kxk.conv") else ours
        agree(ours.double(), released[key].double(), OUTPUT, what=key)


@torch.no_grad()
def test_the_linear_addition_blocks_of_repoptimizers():
    """The released network of the hyper-search, block by block."""
    case = read("repopt-vgg-1-2-1-1")
    state, x = under(case, "hs/"), case["x"]
    paths = [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]
    channels = x.shape[1]
    for path in paths:
        own = under(state, f"{path}.")
        config = {"in_channels": channels, "out_channels": len(own["conv.weight"])}
        config["stride"] = 1 if "scale_identity.weight" in own else 2
        x = official.load_block("repopt_csla", config, own).eval()(x).relu()
        channels = x.shape[1]
    logits = torch.nn.functional.linear(
        x.mean((2, 3)), state["linear.weight"], state["linear.bias"]
    )
    agree(logits, case["hs_y_eval"], OUTPUT)


def test_a_released_network(tmp_path):
    """As a file, wrapped and renamed as published; out again to the bit, in the same order."""
    case = read("model-repan-repvgg-a0-cifar10")
    state = case["state_before"]
    stripped = {f"module.{k}": v for k, v in state.items() if "num_batches" not in k}
    path = tmp_path / "cycle_0.pyth"
    torch.save({"epoch": 3, "model_state": stripped}, path)
    model = official.load_model(path, "repan_repvgg_a0").eval()
    with torch.no_grad():
        agree(model(case["x"]), case["y_eval"], OUTPUT)

    out = official.export(official.load_model(state, "repan_repvgg_a0"), "repan_repvgg_a0")
    assert list(out) == ["epoch", "model_state"]
    assert list(out["model_state"]) == list(state)
    assert len(state) == 395
    for key, tensor in state.items():
        if "rep_conv" not in key:  # stale in the file, current in the export
            assert torch.equal(out["model_state"][key], tensor), key
    merged = model.stages[1][1].block.merged()
    assert torch.equal(out["model_state"]["stages.1.sequential.1.rep_conv.weight"], merged.weight)


def test_a_wrong_file_is_told_in_one_message(tmp_path):
    state = dict(read("model-repan-repvgg-a0-cifar10")["state_before"])
    state["surprise"] = state.pop("stages.0.sequential.0.conv_3.weight")
    state["fc.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        official.load_model({"state_dict": state}, "repan_repvgg_a0")
    for part in (
        "missing: stages.0.sequential.0.conv_3.weight",
        "unexpected: surprise",
        "fc.bias (3,) instead of (10,)",
    ):
        assert part in str(error.value)
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"damaged\.pth cannot be read"):
        official.load_model(damaged, "repan_repvgg_a0")
    with pytest.raises(ValueError, match="must be one of repan_repvgg_a0"):
        official.load_model(state, "resnet")
