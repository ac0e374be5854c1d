"""Files of strangers: none is run, each is read or refused in one line, soon and in little memory.

Every kind of file is fuzzed: a good one is changed in bytes or in values, and sealed again where it
carries a hash, so that what lies behind the hash is reached. `make fuzz` makes 10,000 of each kind.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import torchvision  # noqa: F401 - its libraries are loaded before anything is watched
import yaml
from conftest import CONTEXT, ROOT, TINY, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from test_start import CELL
from torch import nn

from replib import official
from replib.__main__ import main
from replib.blocks import BLOCKS
from replib.checkpoint import described, digest, load_model, save_model
from replib.errors import UserError
from replib.experiments.cells import plan
from replib.experiments.evidence import problem
from replib.experiments.params import load_table
from replib.experiments.store import Store, read_evidence, sha256
from replib.foreign import text_of, unpickled
from replib.report import notebooks
from replib.report.overview import shell
from replib.training import checkpoint, data, loader
from replib.training.checkpoint import MAGIC, BadCheckpoint
from replib.transfer.data import load_coco

INPUTS = int(os.environ.get("REPLIB_FUZZ", "200"))  # of each kind
SECONDS, BYTES = 30, 1 << 30  # after which one input hangs; by which all of a kind may grow
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
             "socket.connect", "pickle.find_class", "ctypes.dlopen")  # fmt: skip
many = settings(
    max_examples=INPUTS,
    deadline=None,
    database=None,
    derandomize=INPUTS < 1000,  # the same in every run of the tests
    suppress_health_check=list(HealthCheck),
)
seeds = st.integers(0, 2**63)
watched: list[str] | None = None  # audit events of what is read now


def watch(event: str, arguments: tuple) -> None:
    """An audit hook; it cannot be taken out again, so that it asks whether it is wanted."""
    if watched is not None and event in RUNS_CODE:
        watched.append(f"{event} {arguments}")


@pytest.fixture(scope="module", autouse=True)
def watching():
    """Hook, and the memory that a kind may take."""
    sys.addaudithook(watch)


class Hangs(BaseException):
    """What no reader may take for an error of the file."""


@contextlib.contextmanager
def cleanly(*refusals: type[Exception]):
    """Ends, in time, without an error but these, in one printable line, and runs no code."""
    global watched

    def hangs(number, frame):
        raise Hangs

    before, watched = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    old = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    except refusals as error:
        assert str(error).isprintable() and str(error), repr(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        seen, watched = watched, None
    assert seen == [], seen
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < BYTES, f"{grown} KiB for one input"


# -- changes -------------------------------------------------------------------------------------
ODD = [
    None, True, 0, -1, 1, 3, 2**31, 2**63, -(2**70), 10**400, 1e308, -0.0, 0.5, 1e-320, "", "a",
    "<script>alert(1)</script>", "../../../etc/passwd", "a" * 5000, "\u2028", "\ud800", "\x00",
    "$(touch made)", "{{7*7}}", "__class__", "nan", [], {}, [[]], [None] * 50, {"a": {}}, {"": 1},
    "torch.nn.modules.linear:Linear", "os:system", "block dbb", "block nothing",
]  # fmt: skip


ODD_BYTES = [b"\n", b"[" * 2000, b"{", b"9" * 400, b"\xef\xbb\xbf", b"!!", b"&a [*a, *a]"]


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut, flipped, doubled, spliced; of a few bytes up to all."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5, 40])):
        i = draw.randrange(len(content) + 1)
        j = min(len(content), i + draw.choice([1, 2, 4, 8, 100]))
        how = draw.randrange(6)
        if how == 0:
            del content[i : len(content) if draw.random() < 0.2 else j]
        elif how == 1:
            content[i:i] = content[j : j + draw.choice([1, 8, 1000])]
        elif how == 2:
            content[i:j] = draw.randbytes(j - i)
        elif how == 3:
            content[i:j] = draw.choice([b"\xff", b"\x00", b"\x7f"]) * (j - i)
        elif how == 4 and i < len(content):
            content[i] ^= 1 << draw.randrange(8)
        else:
            content[i:i] = draw.choice(ODD_BYTES)
    return bytes(content)


def places(value: object) -> list[tuple]:
    """(container, key) of every value inside a value."""
    found, left = [], [value]
    while left:
        one = left.pop()
        items = one.items() if isinstance(one, dict) else enumerate(one)
        for key, inner in items:
            found.append((one, key))
            if isinstance(inner, dict | list):
                left.append(inner)
    return found


NAMES = ["x", "start", "same", "forward", "_forward_hooks", "set", "<b>"]


def changed_values(value: object, draw: random.Random) -> object:
    """Values replaced, moved, taken out, keys added."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        there = places(value)
        if not there:
            return value
        inside, key = draw.choice(there)
        how = draw.randrange(5)
        if how == 0:
            del inside[key]
        elif how == 1:
            other, other_key = draw.choice(there)
            with contextlib.suppress(KeyError, IndexError):  # taken out just before
                inside[key] = copy.deepcopy(other[other_key])
        elif how == 2 and isinstance(inside, dict):
            inside[draw.choice(NAMES)] = draw.choice(ODD)
        elif how == 3 and isinstance(inside[key], int | float):
            inside[key] = draw.choice([-inside[key], inside[key] * 10**6, str(inside[key])])
        else:
            inside[key] = copy.deepcopy(draw.choice(ODD))
    return value


# -- params --------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.fuzz
@many
@given(seeds)
def test_params(tmp_path_factory, seed):
    draw, folder = random.Random(seed), tmp_path_factory.getbasetemp()
    path = folder / "fuzzed.yaml"
    if draw.random() < 0.5:
        content = changed_bytes(TINY.encode(), draw)
    else:
        table = yaml.safe_load(TINY)
        if named := draw.random() < 0.5:
            row, role = draw.choice(list(table["rows"].values())), draw.choice([*ROLES])
            row |= {role: draw.choice(no_files(folder)), "set": ROLES[role]}
        if not named or draw.random() < 0.5:
            table = changed_values(table, draw)
        content = yaml.safe_dump(table).encode(errors="surrogatepass")
    path.write_bytes(content)
    with cleanly(UserError):
        plan(load_table(path), Store(folder))


ROLES = {  # of a row, which may name any path; and what else the row needs to be one
    "start": {},
    "teacher": {"distill": {"alpha": 0.9, "temperature": 10.0}},
    "scales": {"repopt": {}, "block": "convbn"},
}


def no_files(folder: Path) -> list[str]:
    """A pipe, a device, a folder: none ends where a file would."""
    pipe = folder / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)
    return [str(pipe), "/dev/null", str(folder)]


@pytest.mark.parametrize("kind", range(3), ids=["pipe", "device", "folder"])
@pytest.mark.parametrize("role", ROLES)
def test_a_path_that_is_no_file(role, kind, tmp_path):
    path = no_files(tmp_path)[kind]
    rows = {"row": {"label": "x", role: path, "set": ROLES[role]}}
    table = dict(title="t", question="q", control="row", seeds=[0], cell=CELL, rows=rows)
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    said = rf"{role} \(='{path}'\) is neither .* \((it is no regular file|Is a directory)\)"
    with cleanly(), pytest.raises(UserError, match=said):
        plan(load_table(tmp_path / "table.yaml"), Store(tmp_path))


def test_rows_that_need_one_another_many_times_over(tmp_path):
    """2^60 ways lead from the last row to the first."""
    rows = "".join(
        f"  r{i}: {{label: x, use: [base], start: r{i - 1}, against: base, as_long_as: r{i - 1}}}\n"
        for i in range(1, 60)
    )
    text = TINY.replace("rows:\n", f"rows:\n  r0: {{label: x, use: [base]}}\n{rows}")
    (tmp_path / "many.yaml").write_text(text)
    with cleanly(UserError):
        load_table(tmp_path / "many.yaml", networks=False)


@pytest.mark.parametrize("depth", ["{depths: [100000, 1]}", "{depths: [" + "1, " * 99 + "1]}"])
def test_a_network_that_would_never_be_built(tmp_path, depth):
    text = TINY.replace("body: digits\n", f"body: replknet_31b\n  body_options: {depth}\n")
    (tmp_path / "deep.yaml").write_text(text)
    with pytest.raises(UserError, match=r"body_options.depths .* must be at most 1024"):
        load_table(tmp_path / "deep.yaml")


def test_a_text_is_bounded_and_a_pipe_not_waited_for(tmp_path):
    with (tmp_path / "long").open("wb") as file:
        file.truncate(1 << 40)
    with cleanly(), pytest.raises(ValueError, match="longer than 64 MiB"):
        text_of(tmp_path / "long")
    os.mkfifo(tmp_path / "pipe")
    with cleanly(), pytest.raises(ValueError, match="no regular file"):
        text_of(tmp_path / "pipe")


# -- notebooks -----------------------------------------------------------------------------------
CODE = ["x = __import__('os').mkdir('made')", "x = " + "(" * 500, "x = \x00", "x = 10**10**10",
        "import os", "x.y = 1", "x = y = 2", "x = 'a' * 10**10", "x = " + "-" * 5000 + "1",
        ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.fuzz
@many
@given(seeds)
def test_notebooks(tmp_path_factory, seed):
    draw, home = random.Random(seed), tmp_path_factory.getbasetemp() / "home"
    (home / "notebooks").mkdir(parents=True, exist_ok=True)
    (home / "params").mkdir(exist_ok=True)
    content = (ROOT / "notebooks" / "table.ipynb").read_bytes()
    if draw.random() < 0.5:
        content = changed_bytes(content, draw)
    else:
        book = json.loads(content)
        for cell in book["cells"]:
            if draw.random() < 0.3:
                cell["source"] = draw.choice(CODE)
        content = json.dumps(changed_values(book, draw)).encode()
    (home / "notebooks" / "fuzzed.ipynb").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLIB_HOME", str(home))
        for read in (
            notebooks.title,
            notebooks.parameters,
            lambda name: notebooks.changed(name, ["profile=smoke", "x=1"]),
        ):
            with cleanly(UserError):
                read("fuzzed")
    assert not Path("made").exists()


# -- checkpoints ---------------------------------------------------------------------------------
MODEL = {"w": torch.arange(6.0).view(2, 3)}
STATE = {"key": "checkpoint " + "a" * 64, "state": {"model": MODEL, "list": [1, 0.5, "x"]}}


def saved(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


class Code:
    """Calls what it says when it is unpickled."""

    def __init__(self, name: str, *arguments):
        self.name, self.arguments = name, arguments

    def __reduce__(self):
        module, _, name = self.name.rpartition(".")
        return getattr(sys.modules.get(module) or __import__(module), name), self.arguments


CODES = [
    Code("os.mkdir", "made"), Code("os.system", "touch made"), Code("builtins.eval", "1"),
    Code("builtins.bytearray", 10**12), Code("torch.zeros", 10**6), Code("os.getcwd"),
]  # fmt: skip


def with_code(draw: random.Random) -> object:
    value = copy.deepcopy(STATE)
    inside, key = draw.choice([p for p in places(value) if not torch.is_tensor(p[0])])
    inside[key] = draw.choice(CODES)
    return value


@pytest.mark.slow
@pytest.mark.fuzz
@many
@given(seeds)
def test_checkpoints(tmp_path_factory, seed):
    """Pickles in both of torch's formats, plain ones, with code, changed; sealed with our hash."""
    draw, path = random.Random(seed), tmp_path_factory.getbasetemp() / "fuzzed.ckpt"
    value = with_code(draw) if draw.random() < 0.3 else STATE
    kind = draw.choice(["zip", "legacy", "pickle"])
    if kind == "pickle":
        content = pickle.dumps(value, draw.randrange(6))
    else:
        content = saved(value, kind == "zip")
    if value is STATE or draw.random() < 0.5:
        content = changed_bytes(content, draw)
    path.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)
    with cleanly(BadCheckpoint, MemoryError):
        checkpoint.load(path)
    path.write_bytes(content)
    with cleanly(ValueError, MemoryError):
        official.read_state(path)
    assert not Path("made").exists()


def test_an_archive_that_is_a_bomb(tmp_path):
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"w": torch.zeros(1 << 24)}))) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    assert len(packed.getvalue()) < 1 << 20
    with cleanly(), pytest.raises(ValueError, match="when unpacked"):
        unpickled(packed.getvalue())


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**9, 512), torch.zeros(10**9, 0), torch.zeros(3).to_sparse(),
     torch.empty(10**9, 512, device="meta")],
    ids=["one value for all", "no value", "sparse", "no memory"],
)  # fmt: skip
def test_a_tensor_that_claims_more_than_the_file_has(tensor, tmp_path):
    torch.save({"linear.weight": tensor}, tmp_path / "claims.pth")
    with cleanly(), pytest.raises(ValueError, match=r"weight.* (values for|no plain tensor)"):
        official.read_state(tmp_path / "claims.pth")


@pytest.mark.parametrize("kind", range(2), ids=["pipe", "device"])
def test_a_checkpoint_that_is_no_file(kind, tmp_path):
    path = no_files(tmp_path)[kind]
    with cleanly(), pytest.raises(ValueError, match="it is no regular file"):
        official.read_state(path)
    with cleanly(), pytest.raises(BadCheckpoint, match="it is no regular file"):
        checkpoint.load(Path(path))


def manifest_of(model: nn.Module) -> tuple[dict, dict]:
    """(manifest without its hash, tensors) of a network."""
    tensors: dict = {}
    tree = described(model, "", tensors, {})
    return {"format": "replib-model-1", "blocks": {}, "tree": tree}, tensors


SMALL = nn.Sequential(
    BLOCKS["repvgg"](2, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.Linear(2, 2)
)
MANIFEST, TENSORS = manifest_of(SMALL)


def sealed_network(path: Path, manifest: dict) -> None:
    text = json.dumps(manifest | {"sha256": digest(manifest, TENSORS)})
    path.write_bytes(save(TENSORS, {"manifest": text}))


@pytest.mark.slow
@pytest.mark.fuzz
@many
@given(seeds)
def test_networks(tmp_path_factory, seed):
    """Descriptions of networks with another content and the right hash, and changed bytes."""
    draw, path = random.Random(seed), tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    if draw.random() < 0.2:
        save_model(SMALL, path)
        path.write_bytes(changed_bytes(path.read_bytes(), draw))
    else:
        manifest = changed_values(MANIFEST, draw)
        with contextlib.suppress(TypeError):  # a description that is no mapping has no hash
            sealed_network(path, manifest)
    with cleanly(ValueError):
        load_model(path)


def test_a_network_of_unchanged_values_is_read(tmp_path):
    """Otherwise the test above would stop at the hash."""
    sealed_network(tmp_path / "good.safetensors", MANIFEST)
    assert isinstance(load_model(tmp_path / "good.safetensors"), nn.Sequential)


BAD_NODES = {  # path of a node -> what is set in it
    "a circle": ("3", {"same": ""}),
    "a hook": ("3", {"attributes": {"_forward_hooks": {"dict": {"1": {"class": "block dbb"}}}}}),
    "another forward": ("3", {"attributes": {"forward": {"class": "block dbb"}}}),
    "a layer without end": ("2", {"class": "torch.nn.modules.rnn:LSTM",
                                  "arguments": {"input_size": 2, "hidden_size": 2,
                                                "num_layers": 10**8}}),
    "another device": ("3", {"arguments": {"in_features": 2, "out_features": 2, "device": "cpu"}}),
    "arguments of others": ("3", {"class": "torchvision.models.densenet:DenseNet",
                                  "arguments": {"block_config": {"tuple": [10**8]}}}),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD_NODES)
def test_a_description_that_asks_for_too_much(how, tmp_path):
    manifest, (path, change) = copy.deepcopy(MANIFEST), BAD_NODES[how]
    if "same" in change:
        manifest["tree"]["children"][path] = change
    else:
        manifest["tree"]["children"][path] |= change
    sealed_network(tmp_path / "bad.safetensors", manifest)
    with cleanly(), pytest.raises(ValueError, match=r"files may not|another version"):
        load_model(tmp_path / "bad.safetensors")


# -- evidence ------------------------------------------------------------------------------------
EVIDENCE = json.loads(min((ROOT / "reports" / "evidence").glob("*.json")).read_bytes())


def resealed(result: object, context: object) -> dict:
    """With the key of its own parameters and a right hash, where it has what these are made of."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        made = {name: result[name] for name in ("parameters", "versions")}
        result["key"] = sha256(made | {"data": result["data"]["digest"]})
    with contextlib.suppress(ValueError):
        return {"result": result, "result_sha256": sha256(result), "context": context}
    return {"result": result, "result_sha256": "0", "context": context}


@pytest.mark.slow
@pytest.mark.fuzz
@many
@given(seeds)
def test_evidence(tmp_path_factory, seed):
    draw, home = random.Random(seed), tmp_path_factory.getbasetemp() / "evidence"
    home.mkdir(exist_ok=True)
    path = home / "bundle.json"
    found = changed_values({k: EVIDENCE[k] for k in ("result", "context")}, draw)
    evidence = resealed(found.get("result"), found.get("context"))
    content = json.dumps({"evidence": [evidence]}).encode()
    path.write_bytes(changed_bytes(content, draw) if draw.random() < 0.2 else content)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setenv("REPLIB_HOME", str(home))
        with cleanly(), contextlib.redirect_stdout(io.StringIO()):
            status = main(["evidence", "add", str(path)])
    assert said.getvalue().count("\n") == (status == 2), said.getvalue()
    assert {p.parent for p in home.rglob("*") if p.is_file()} <= {home, home / "reports/evidence"}
    for file in (home / "reports").rglob("*.json"):
        assert problem(read_evidence(file)) is None
        file.unlink()


def scored(metric: str | None, value: object = 0.5) -> dict:
    """The evidence with other scores of the test split, or with none."""
    found = copy.deepcopy(EVIDENCE)
    result = found["result"]
    for part, content in (("deployed", value), ("history", result["history"]["test_accuracy"])):
        del result[part]["test_accuracy"]
        if metric is not None:
            result[part][f"test_{metric}"] = content
    result["versions"]["file:own"] = "0" * 64  # a file of one's own blocks
    return found


def test_evidence_is_scored_by_any_metric_and_by_one_at_least():
    assert problem(scored("mIoU")) is None
    assert "no test_accuracy" in problem(scored(None))
    for value in (1.5, -0.1, "0.5", None, [0.5]):
        assert "no number between 0 and 1" in problem(scored("mIoU", value))
    found = scored("mIoU")
    del found["result"]["history"]["test_mIoU"]
    assert "no score of the test split" in problem(found)


@pytest.mark.parametrize("name", ["deployed", "context", "history", "final"])
def test_evidence_without_what_pages_show_is_shown_by_none(name, shared_project, tmp_path):
    """As if it were not there: no page fails on it."""
    from replib.report.results import Results

    key = "a" * 64
    result, context = whole({"key": key}), dict(CONTEXT)
    if name == "context":
        del context["libraries"]
    else:
        del result[name]
    store = Store(tmp_path)
    store.write(key, result, context)
    assert store.read(key) is not None
    shown = Results.__new__(Results)
    shown.store, shown.plan = store, type("Plan", (), {"cells": {key: None}})
    assert shown.own == {}
    store.write(key, whole({"key": key}), CONTEXT)
    del shown.own
    assert list(shown.own) == [key]


# -- images --------------------------------------------------------------------------------------
def image_bytes(kind: str, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [image_bytes(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")] + [
    image_bytes("PNG", mode="P"), image_bytes("PNG", mode="RGBA"), image_bytes("JPEG", mode="CMYK"),
]  # fmt: skip


def png(width: int, height: int) -> bytes:
    """A PNG that says that it is so large; its pixels are all there, packed a thousandfold."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + (width + 7) // 8) * height, 9) if width * height < 2**31 else b""
    parts = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


BOXES = {  # a file of annotations
    "images": [{"id": i, "file_name": f"{i}.png", "height": 6, "width": 8} for i in range(2)],
    "annotations": [
        {"id": i, "image_id": i % 2, "bbox": [1, 1, 2.5, 3], "category_id": 1 + i % 2, "iscrowd": 0}
        for i in range(3)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}


def looked_at(file: Path) -> None:
    """All that is done to an image of a folder."""
    for look in (
        loader.decode,
        lambda file, size: loader.decode_box(file, size, (0.1, 0.1, 0.5, 0.5)),
        lambda file, size: data.natural_size(str(file)),
        lambda file, size: data.inspected(str(file)),
    ):
        with cleanly(UserError):
            look(file, 8)


@pytest.mark.slow
@pytest.mark.fuzz
@many
@given(seeds)
def test_images(tmp_path_factory, seed):
    draw, path = random.Random(seed), tmp_path_factory.getbasetemp() / "fuzzed.png"
    path.write_bytes(changed_bytes(draw.choice(IMAGES), draw))
    looked_at(path)


@pytest.mark.slow
@pytest.mark.fuzz
@many
@given(seeds)
def test_annotations(tmp_path_factory, seed):
    """Of a set in COCO's format."""
    draw, home = random.Random(seed), tmp_path_factory.getbasetemp() / "annotations"
    (home / "annotations").mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        (home / part).mkdir(exist_ok=True)
        for i in range(2):
            (home / part / f"{i}.png").write_bytes(png(8, 6))
        found = changed_values(BOXES, draw) if draw.random() < 0.6 else BOXES
        content = json.dumps(found).encode()
        content = changed_bytes(content, draw) if draw.random() < 0.2 else content
        (home / "annotations" / f"instances_{part}.json").write_bytes(content)
    with cleanly(UserError):
        load_coco("coco", home, 16, 8)


@pytest.mark.parametrize(
    "size, said",
    [((2**31 - 1, 2**31 - 1), "not a readable image"), ((9000, 9000), "pixels are more than"),
     ((1, 10**7), "pixels are more than")],
    ids=["absurd", "large", "a line"],
)  # fmt: skip
def test_an_image_that_is_a_bomb(size, said, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with cleanly(), pytest.raises(UserError, match=said):
        loader.decode(tmp_path / "bomb.png", 8)


def test_an_image_starts_no_program_and_a_pipe_is_not_waited_for(tmp_path):
    """PostScript by another name would be given to an interpreter of it."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "eps.png").write_bytes(eps)
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("eps.png", "pipe.png"):
        with cleanly(), pytest.raises(UserError, match="is not a readable image"):
            loader.decode(tmp_path / name, 8)
        with cleanly(), pytest.raises(UserError, match="is not a readable image"):
            data.inspected(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\udcff"], ids=["line", "colour", "bytes"])
def test_names_that_cannot_be_printed_are_refused(name, tmp_path):
    for place in ("class", "file"):
        root = tmp_path / place
        for label in ("cat", name if place == "class" else "dog"):
            (root / label).mkdir(parents=True)
            for i in range(2):
                file = f"{name}{i}.png" if place == "file" else f"{i}.png"
                (root / label / file).write_bytes(IMAGES[0])
        with cleanly(), pytest.raises(UserError, match="cannot be printed") as error:
            data.listing(root)
        assert str(error.value).isprintable()


# -- pages ---------------------------------------------------------------------------------------
def test_a_page_forbids_scripts_and_other_hosts():
    """Whatever stands in it: a browser runs nothing of it and asks nobody."""
    page = shell("base.html.j2", title="<script>alert(1)</script>", body="", made="")
    head = page.partition("</head>")[0]
    assert "<script" not in page and 'http-equiv="Content-Security-Policy"' in head
    rules = head.partition('content="')[2].partition('"')[0]
    assert rules.startswith("default-src 'none'") and "script-src" not in rules
