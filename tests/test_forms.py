"""What users do to any module survives in every form that ours take.

Copies, files, compilation, lower precision, memory formats, SyncBatchNorm, the meta device, export:
of a training-form block of every family, a block in the middle of a cycle, deployed layers, bodies,
and networks that `convert` and `fuse` made. One test per promise, over all forms.
"""

import contextlib
import copy
import io
import itertools
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from test_blocks import DEFAULTS, GEOMETRIES, close, plain, scrambled
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import models as vision

from replib import convert, fuse, kernels
from replib.blocks import BLOCKS, RepBlock
from replib.blocks.repmlp import RepMLP
from replib.branches import Chain, Sum
from replib.models.cifar_repvgg import digits_net
from replib.models.layers import layer, pooled, sequence
from replib.models.mobile import mobileone
from replib.models.replknet import feed_forward, large_kernel_block
from replib.models.repmlpnet import unit
from replib.models.resnet import resnet
from replib.networks import branch_by_branch, outermost_blocks

torch.set_num_threads(1)
RATE = 0.3
# Of the largest number, sums in another order: float64, float32. The norms of a network divide by
# the deviation of as few as three pixels, layer after layer.
CLOSE, NETWORK, SINGLE = 1e-9, 1e-7, 1e-4


# -- the forms ------------------------------------------------------------------------------------
class Shifting(RepBlock):
    """What no family of ours has before a padding: a bias, a scale, a whole block, a sum."""

    main_name = "wide"

    def declare(self, g):
        pointwise = {"kernel_size": 1, "dims": g.dims}
        inner = BLOCKS["csla"](g.in_channels, g.in_channels, **pointwise)
        summed = Sum({"conv": g.conv(1), "itself": g.identity()}, "conv")
        return {
            "wide": Chain(g.conv(), g.norm()),
            "biased": Chain(g.conv(1, bias=True), g.scale(0.5), g.conv(), g.norm()),
            "nested": Chain(inner, g.conv(), g.norm()),
            "summed": Chain(summed, g.conv(), g.norm()),
        }


def block(family, **arguments):
    """A scrambled block whose side branches count 0.3."""
    if family == "shifting":
        made = Shifting(**DEFAULTS | arguments)
    else:
        made = BLOCKS[family](**DEFAULTS | GEOMETRIES[plain(family)] | arguments)
    made.set_rate(RATE)
    return scrambled(made)


def in_cycle(family):
    """A block in the middle of a cycle: merged, redrawn, restored."""
    made = block(family)
    kernel = made.merged()
    made.redraw("repan", torch.Generator().manual_seed(3))
    made.restore(kernel, "preserving")
    return made


def network(*layers):
    """A small classifier around layers of 8 channels."""
    return nn.Sequential(layer("convbn", 3, 8, 3, 2), *layers, sequence(**pooled(8, 5)))


def large_kernel_layers():
    return large_kernel_block("replk", 8, 8, 13, 5, 0.5), feed_forward(8, 0.5)


def converted(name, family):
    return convert(scrambled(getattr(vision, name)(num_classes=5)).eval(), family)


def at_rate(model):
    """A scrambled network of blocks whose side branches count 0.3."""
    for made in outermost_blocks(model).values():
        made.set_rate(RATE)
    return scrambled(model)


MAP, IMAGE = (3, 6, 9, 10), (3, 3, 32, 32)
BLOCK_FORMS = {  # what makes it, and the shape of its input
    **{name: (lambda name=name: block(name), MAP) for name in BLOCKS},
    "shifting": (lambda: block("shifting"), MAP),
    "dbb, depthwise": (lambda: block("dbb", groups=6, stride=2), MAP),
    "dbb, reflect": (lambda: block("dbb", padding_mode="reflect"), MAP),
    "dbb, 1-D": (lambda: block("dbb", dims=1), (3, 6, 9)),
    "dbb, 3-D": (lambda: block("dbb", dims=3), (3, 6, 5, 4, 6)),
    "orepa, 3-D": (lambda: block("orepa", dims=3), (3, 6, 5, 4, 6)),
    **{
        f"{name} in a cycle": (lambda name=name: in_cycle(name), MAP)
        for name in ("repvgg", "dbb", "orepa", "dyrep", "csla")
    },
    "repmlp": (lambda: scrambled(RepMLP(6, 3, 5, sets=2)), MAP),
    "repmlp, official order": (lambda: scrambled(RepMLP(6, 3, 5, 2, (3,), True)), MAP),
}
NETWORK_FORMS = {
    "pair of dbb": (lambda: nn.Sequential(block("dbb"), nn.ReLU(), block("dbb")), MAP),
    "pair of orepa": (lambda: nn.Sequential(block("orepa"), nn.ReLU(), block("orepa")), MAP),
    "digits net": (lambda: at_rate(digits_net(8, classes=5)), (3, 1, 8, 8)),
    "resnet": (lambda: at_rate(resnet("resnet18", classes=5, block="dbb", width=0.125)), IMAGE),
    "mobileone net": (lambda: at_rate(mobileone("s0", classes=5)), IMAGE),
    "replknet": (lambda: at_rate(network(*large_kernel_layers())), IMAGE),
    "repmlpnet": (lambda: at_rate(network(unit(8, 4, 2))), IMAGE),
    "converted mobilenet": (lambda: converted("mobilenet_v3_small", "dbb"), IMAGE),
}
FORMS = BLOCK_FORMS | NETWORK_FORMS
DEPLOYED = ("dbb", "dbb, depthwise", "dbb, 1-D", "orepa, 3-D", "repmlp", "repmlp, official order")
DEPLOYED = [f"deployed {name}" for name in DEPLOYED]
FUSED = [f"fused {name}" for name in NETWORK_FORMS if name not in ("pair of dbb", "replknet")]
NETWORKS = [*NETWORK_FORMS, *FUSED]
ALL = [*BLOCK_FORMS, *DEPLOYED, *NETWORKS]
QUICK = [name for name in BLOCK_FORMS if "cycle" not in name] + DEPLOYED
QUICK += ["dbb in a cycle", "orepa in a cycle", "pair of orepa", "digits net", "replknet"]
QUICK += ["repmlpnet", "fused digits net"]  # the others are slow tests
over = pytest.mark.parametrize


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


TURNS = itertools.count()


def over_forms(names, quick=QUICK):
    """A test for each of these forms; a slow one where it is not among the quick. Whole networks,
    which take longest and are made of the blocks, take turns: each is in every other test."""
    turn = next(TURNS)
    mine = [n for i, n in enumerate(names) if n not in NETWORKS or n in quick or (i + turn) % 2]
    return over("form", [name if name in quick else slow(name) for name in mine])


def made(form):
    """(module in train mode, input) of a form by its name, the same at every call."""
    torch.manual_seed(0)
    if form.startswith("deployed "):
        module, x = made(form.removeprefix("deployed "))
        return module.eval().deploy().train(), x
    if form.startswith("fused "):
        module, x = made(form.removeprefix("fused "))
        return fuse(module.eval()).train(), x
    make, shape = FORMS[form]
    return make().train(), torch.randn(shape, generator=torch.Generator().manual_seed(1))


def step(module, x, call=None):
    """Everything that one step computes: the output, and the gradients by name."""
    module.zero_grad()
    torch.manual_seed(7)  # dropout and stochastic depth
    x = x.detach().clone().requires_grad_()
    y = (module if call is None else call)(x)
    y.double().square().mean().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **gradients}


def same(ours, theirs, bound=None):
    """Two steps are equal to the bit, or to a share of the largest number of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if bound is None:
            assert torch.equal(ours[name], value), name
        else:
            close(ours[name], value, bound, name)


def same_state_nearly(a, b):
    one, other = a.state_dict(), b.state_dict()  # once: it walks the whole network
    for name, value in other.items():
        close(one[name], value, CLOSE, name)


def same_state(a, b):
    one, other = a.state_dict(), b.state_dict()
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def kernels_of(module):
    """The merged kernel of every block, as plain tensors."""
    merged = [b.merged() for b in module.modules() if isinstance(b, RepBlock | RepMLP)]
    return [tensor.detach() for kernel in merged for tensor in (kernel.weight, kernel.bias)]


def same_kernels(a, b):
    assert all(torch.equal(p, q) for p, q in zip(kernels_of(a), kernels_of(b), strict=True))


# -- copies and files -----------------------------------------------------------------------------
def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "file": through_a_file,
}


@over_forms(ALL)
def test_a_copy_is_equal_and_independent(form):
    module, x = made(form)
    twins = [copy_of(copy.deepcopy(module)) for copy_of in COPIES.values()]
    before = step(module, x)
    for twin in twins:
        assert modes(twin) == modes(module)
        same(step(twin, x), before)
        same_state(twin, module)
        same_kernels(twin, module)
        with torch.no_grad():
            for tensor in twin.state_dict().values():
                tensor.zero_()
    assert not any(storages(twin) & storages(module) for twin in twins)


def modes(module):
    return {name: part.training for name, part in module.named_modules()}


def storages(module):
    """Where the numbers lie."""
    tensors = (*module.parameters(), *module.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@over_forms(ALL)
def test_a_state_dict_goes_into_another_module_of_the_form(form):
    module, x = made(form)
    other, _ = made(form)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    same_state(module, other)
    same(step(module.eval(), x), step(other.eval(), x))
    same_kernels(module, other)


# -- compilation ----------------------------------------------------------------------------------
QUICK_TO_COMPILE = ("orepa_1x1", "deployed dbb")
SLOW_TO_COMPILE = [name for name in BLOCK_FORMS if "cycle" not in name]  # it changes values only
SLOW_TO_COMPILE += ["dbb in a cycle", "deployed repmlp", "digits net"]
SLOW_TO_COMPILE += ["fused digits net", "fused converted mobilenet"]


def change_values(module):
    """A rate, and a redraw and a restoration of every block that can be restored."""
    for one in outermost_blocks(module).values():
        one.set_rate(0.8)
        if one.invertible:
            kernel = one.merged()
            one.redraw("repan", torch.Generator().manual_seed(5))
            one.restore(kernel)


def drop_a_branch(module):
    """Take the last side branch from the first block that has one; whether there is one."""
    for one in outermost_blocks(module).values():
        if one.side_branches:
            del one.branches[list(one.side_branches)[-1]]
            return True
    return False


@over_forms(sorted({*QUICK_TO_COMPILE, *SLOW_TO_COMPILE}), QUICK_TO_COMPILE)
def test_compilation_computes_the_same_and_sees_every_change(form, training=True):
    """As one graph. New values are seen without another compilation, new structure by one."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    module, x = made(form)
    module, x = module.double().train(training), x.double()
    twin, counter = copy.deepcopy(module), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, backend=counter, fullgraph=True)
    same(step(twin, x, compiled), step(module, x), CLOSE)
    same_state_nearly(twin, module)  # running statistics
    once = counter.frame_count
    change_values(twin), change_values(module)
    same(step(twin, x, compiled), step(module, x), CLOSE)
    assert counter.frame_count == once
    dropped = drop_a_branch(twin) and drop_a_branch(module)
    same(step(twin, x, compiled), step(module, x), CLOSE)
    assert (counter.frame_count > once) == dropped


@over_forms(QUICK_TO_COMPILE, ())
def test_compilation_in_eval_mode(form):
    test_compilation_computes_the_same_and_sees_every_change(form, training=False)


@over_forms(("digits net", "replknet", "repmlpnet", "converted mobilenet"), ())
def test_a_network_is_captured_as_one_graph(form):
    """In train mode, dropout and stochastic depth included."""
    torch._dynamo.reset()
    module, x = made(form)
    module, x = module.double(), x.double()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    same(step(twin, x, compiled), step(module, x), CLOSE)
    same_state_nearly(twin, module)
    change_values(twin), change_values(module)
    with torch.compiler.set_stance("fail_on_recompile"):
        same(step(twin, x, compiled), step(module, x), CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@over("form", ["dbb", "orepa_1x1"])
def test_the_default_compiler_computes_the_same(form, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    module, x = made(form)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True)
    same(step(twin, x, compiled), step(module, x), SINGLE)
    change_values(twin), change_values(module)
    same(step(twin, x, compiled), step(module, x), SINGLE)


@over_forms(
    [*BLOCK_FORMS, *DEPLOYED, "digits net", "replknet", "fused digits net", "fused resnet"],
    ("dbb", "shifting", "deployed dbb", "fused digits net"),
)
def test_export_and_what_it_computes(form):
    """Of the eval mode; the program holds the parameters under their names."""
    module, x = made(form)
    module = module.eval()
    program = torch.export.export(module, (x,))
    close(program.module()(x), module(x), SINGLE)
    assert set(program.state_dict) <= set(module.state_dict())
    assert set(dict(module.named_parameters())) <= set(program.state_dict)


# -- lower and higher precision -------------------------------------------------------------------
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half the step from 1 to the next number
DTYPES = [torch.bfloat16, slow(torch.float16)]


def near(ours, theirs, bound):
    """Within a share of the largest number; of a map, the border no worse than the inside."""
    assert ours.isfinite().all()
    error = (ours.double() - theirs.double()).abs() / theirs.abs().max()
    assert error.max() < bound, f"{error.max():.1e}"
    if theirs.dim() > 2:
        inside = torch.zeros(theirs.shape[2:], dtype=torch.bool)
        inside[(slice(1, -1),) * inside.dim()] = True
        border, rest = error[..., ~inside].mean(), error[..., inside].mean()
        assert border < 2 * rest, f"border {border:.1e}, inside {rest:.1e}"


def allowed(form, dtype):
    """Rounding in one block, or in a network."""
    return UNIT[dtype] * (32 if form in NETWORKS else 4)


@over("training", [True, False], ids=["train", "eval"])
@over("dtype", DTYPES, ids=str)
@over_forms(ALL)
def test_autocast(form, dtype, training):
    module, x = made(form)
    module.train(training)
    exact = copy.deepcopy(module)(x).detach()
    with torch.autocast("cpu", dtype):
        ours = step(module, x)
    if form not in NETWORKS or not training:  # batch statistics of three images amplify rounding
        near(ours["output"], exact, allowed(form, dtype))
    for name, tensor in (ours | module.state_dict()).items():
        assert tensor.isfinite().all(), name
        assert tensor.dtype in (torch.float32, torch.int64) or name == "output", name


@over("dtype", DTYPES, ids=str)
@over_forms(ALL)
def test_a_map_of_low_precision_stays_one_under_autocast(form, dtype):
    """Whatever is float32 in a block, its map does not become twice as large."""
    module, x = made(form)
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert module(x.to(dtype)).dtype == dtype


@over("dtype", DTYPES, ids=str)
@over_forms(ALL)
def test_a_whole_module_in_lower_precision(form, dtype):
    module, x = made(form)
    low = copy.deepcopy(module).to(dtype)
    assert list(low.state_dict()) == list(module.state_dict())
    assert {v.dtype for v in low.state_dict().values()} <= {dtype, torch.int64}
    assert step(low, x.to(dtype))["output"].dtype == dtype
    low = copy.deepcopy(module).to(dtype).eval()
    exact = copy.deepcopy(low).double()  # the same numbers
    ours = step(low, x.to(dtype))
    near(ours["output"], exact(x.to(dtype).double()).detach(), 2 * allowed(form, dtype))
    for p, q in zip(kernels_of(low), kernels_of(exact), strict=True):
        assert p.dtype == dtype and torch.equal(p, q.to(dtype))


@over_forms(ALL)
def test_a_whole_module_in_double_precision(form):
    module, x = made(form)
    exact = copy.deepcopy(module).double().eval()
    out = exact(x.double())
    assert out.dtype == torch.float64
    close(module.eval()(x).double(), out, SINGLE)
    for p, q in zip(kernels_of(module), kernels_of(exact), strict=True):
        assert torch.equal(p, q.float())
    for one in outermost_blocks(exact).values():
        given = one.merged(rate=0.1)
        one.set_rate(0.1)  # a number that float32 has not
        assert torch.equal(one.merged().weight, given.weight)


@contextlib.contextmanager
def kernels_convolved(monkeypatch):
    """The kernels that are convolved with inside."""
    seen, plain_convolve = [], kernels.convolve

    def convolve(x, kernel, *arguments):
        seen.append(kernel)
        return plain_convolve(x, kernel, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "convolve", convolve)
        yield seen


SQUEEZED = ("orepa", "orepa_1x1", "orepa_stem", "orepa_stem_base", "orepa_repvgg", "expandnet")


@over("form", SQUEEZED)
def test_a_squeezed_kernel_is_made_in_full_precision(form, monkeypatch):
    module, x = made(form)
    branch_by_branch(module)  # the form that always makes the whole kernel
    with kernels_convolved(monkeypatch) as plainly:
        module(x)
    with kernels_convolved(monkeypatch) as cast, torch.autocast("cpu", torch.bfloat16):
        module(x)
    assert len(plainly) == len(cast) == 1
    assert cast[0].weight.dtype == torch.float32
    assert torch.equal(cast[0].weight, plainly[0].weight)


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast, float16": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


def work(module):
    """All that is done with a tree: every tensor that comes out, by name."""
    out = {f"merged {i}": tensor for i, tensor in enumerate(kernels_of(module))}
    if isinstance(module, RepBlock | RepMLP):
        out |= {f"deployed {k}": v for k, v in module.deploy().state_dict().items()}
    else:
        out |= {f"fused {k}": v for k, v in fuse(module).state_dict().items()}
    if not isinstance(module, RepMLP):
        change_values(module)
    return out | module.state_dict()


@over("context", ["autocast", "inference mode", *map(slow, ("autocast, float16", "no_grad"))])
@over_forms([*BLOCK_FORMS, *NETWORK_FORMS])
def test_folding_is_as_exact_in_any_context(form, context):
    """Autocast must not reach the float64 in which kernels are folded and restored."""
    module, x = made(form)
    twin = copy.deepcopy(module.eval())
    expected, outside = work(module), module(x)
    with CONTEXTS[context]():
        same(work(twin), expected)
        if "autocast" not in context:
            assert torch.equal(twin(x), outside)


def test_kernels_of_several_dilations_add_under_autocast():
    """Whose taps are spread by an operation that autocast knows."""
    one, two = (kernels_of_dilation(d) for d in (1, 2))
    expected = one + two
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal((one + two).weight, expected.weight)


def kernels_of_dilation(d):
    generator = torch.Generator().manual_seed(d)
    weight = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    return kernels.Kernel(weight, weight[:, 0, 0, 0], 1, (d, d))


# -- memory formats -------------------------------------------------------------------------------
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
WITH_LAST = [f for f in ALL if "1-D" not in f]


class Layouts(TorchDispatchMode):
    """Operations that made a feature map of `images` images whose channels are not last."""

    def __init__(self, images):
        super().__init__()
        self.images, self.others = images, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **options or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dim() in LAST and len(t) == self.images:
                if t.shape[1] > 1 and t.stride(1) != 1:
                    self.others.add(str(function))
        return out


@over("training", [True, False], ids=["train", "eval"])
@over_forms(WITH_LAST)
def test_channels_last_computes_the_same(form, training):
    module, x = made(form)
    module, x = module.double().train(training), x.double()
    twin = copy.deepcopy(module).to(memory_format=LAST[x.dim()])
    last = x.contiguous(memory_format=LAST[x.dim()])
    same_kernels(twin, module)
    same(step(twin, last), step(module, x), NETWORK if form in NETWORKS else CLOSE)
    same_state_nearly(twin, module)


POOLED = ("dbb, 3-D", "orepa, 3-D")


@over("training", [True, False], ids=["train", "eval"])
@over("form", [f for f in WITH_LAST if f not in NETWORKS and f not in POOLED and "mlp" not in f])
def test_channels_last_stays_so_throughout_a_block(form, training):
    """No map is copied into another format on the way.

    Torch's 1x1 convolution and its pooling give up the format in 3-D; RepMLP regroups its pixels.
    """
    module, x = made(form)
    module.train(training).to(memory_format=LAST[x.dim()])
    last = torch.cat([x, x, x[:1]]).contiguous(memory_format=LAST[x.dim()])  # 7: no width is 7
    with Layouts(7) as layouts, torch.no_grad():
        out = module(last)
    assert layouts.others == set()
    assert out.is_contiguous(memory_format=LAST[x.dim()])


@over("form", [f for f in WITH_LAST if f in BLOCK_FORMS and "mlp" not in f])
def test_channels_last_is_deployed(form):
    """A network keeps its format through fusing, although only its weights tell it."""
    module, x = made(form)
    last = LAST[x.dim()]
    assert module.deploy().weight.is_contiguous()
    conv = module.to(memory_format=last).deploy()
    assert conv.weight.is_contiguous(memory_format=last)
    assert conv.training and torch.equal(conv.weight, module.merged().weight)


STEM = """
import torch
from replib.blocks import BLOCKS
torch.set_num_threads(1)
for _ in range(20):
    block = BLOCKS["repvgg"](3, 48, 3, stride=2)
    exact = BLOCKS["repvgg"](3, 48, 3, stride=2).double()
    exact.load_state_dict(block.state_dict())
    block = block.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    wide = x.double().requires_grad_()
    g = torch.randn(8, 48, 16, 16).contiguous(memory_format=torch.channels_last)
    ours = torch.autograd.grad(block(last), [last, *block.parameters()], g)
    theirs = torch.autograd.grad(exact(wide), [wide, *exact.parameters()], g.double())
    for a, b in zip(ours, theirs):
        assert (a.double() - b).abs().max() <= 1e-4 * (1 + b.abs().max())
"""


def test_a_stem_of_three_channels_in_channels_last():
    """Left to oneDNN, its strided 1x1 convolution overwrites memory: in a process of its own."""
    done = subprocess.run([sys.executable, "-c", STEM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- SyncBatchNorm --------------------------------------------------------------------------------
@over_forms(ALL)
def test_sync_batch_norm_keeps_the_tree(form):
    module, x = made(form)
    branch_by_branch(module)  # as it is evaluated where statistics are exchanged: equal to the bit
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    theirs = [m for m in twin.modules() if isinstance(m, _BatchNorm)]
    assert len(theirs) == len(norms) and all(type(m) is nn.SyncBatchNorm for m in theirs)
    assert norms or form not in FORMS
    same_state(module, twin)
    same(step(twin, x), step(module, x))  # train mode, one process: batch statistics of its own
    same(step(twin.eval(), x), step(module.eval(), x))
    if form in FORMS:
        same(work(twin), work(module))


def in_two_processes(rank, form, folder):
    """One of two gloo processes: what SyncBatchNorm says, and a step on a batch of its own."""
    torch.set_num_threads(1)
    store = (folder / "store").as_uri()
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    module, x = made(form)
    module, x = module.double(), x.double() * (rank + 1)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    try:
        said = str(synchronised(x))
    except ValueError as error:
        said = str(error)
    evaluated = synchronised.eval()(x).detach()
    parallel = nn.parallel.DistributedDataParallel(module)
    computed = step(module, x, parallel)
    torch.save((said, evaluated, computed), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@over("form", ["dbb", "orepa", "digits net"])
def test_two_processes(form, tmp_path):
    """DistributedDataParallel averages the gradients of every parameter over the processes.

    Torch's SyncBatchNorm exchanges batch statistics on a GPU only, and says so in train mode; in
    eval mode it needs none.
    """
    torch.multiprocessing.spawn(in_two_processes, (form, tmp_path), nprocs=2)
    module, x = made(form)
    x = x.double()
    alone = [step(copy.deepcopy(module).double(), x * (rank + 1)) for rank in (0, 1)]
    for rank, own in enumerate(alone):
        said, evaluated, computed = torch.load(tmp_path / f"{rank}.pt")
        assert "SyncBatchNorm expected input tensor to be on GPU" in said
        close(evaluated, copy.deepcopy(module).double().eval()(x * (rank + 1)))
        means = {name: (alone[0][name] + alone[1][name]) / 2 for name in own}
        same(computed, means | {name: own[name] for name in ("output", "input")}, CLOSE)


# -- without data, and without state --------------------------------------------------------------
@over_forms(ALL)
def test_the_meta_device(form):
    """Shapes without numbers; then memory, and the numbers of a file."""
    module, x = made(form)
    empty = copy.deepcopy(module).to("meta")
    for training in (True, False):
        out = empty.train(training)(x.to("meta"))
        assert out.is_meta and out.shape == module.train(training)(x).shape
    assert all(kernel.is_meta for kernel in kernels_of(empty))
    again = copy.deepcopy(empty).to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    again.load_state_dict(module.state_dict())
    same(step(again, x), step(module.eval(), x))
    same_kernels(again, module)


@over_forms(ALL)
def test_a_functional_call_uses_the_state_that_it_is_given(form):
    module, x = made(form)
    module = module.eval()
    before = copy.deepcopy(module.state_dict())
    state = {k: v * 1.25 if v.is_floating_point() else v for k, v in before.items()}
    other = copy.deepcopy(module)
    other.load_state_dict(state)
    assert torch.equal(torch.func.functional_call(module, state, (x,)), other(x))
    assert not torch.equal(other(x), module(x))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@over_forms(ALL)
def test_gradients_of_every_image_at_once(form):
    """torch.func's vmap over grad: per-sample gradients, in eval mode."""
    module, x = made(form)
    module, x = module.double().eval(), x.double()
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def loss(parameters, image):
        out = torch.func.functional_call(module, parameters, (image[None],))
        return out.square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        alone = step(module, image[None])
        for name in parameters:
            close(gradients[name][i], alone.get(name, torch.zeros(())), CLOSE, name)
