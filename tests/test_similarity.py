"""Similarity of branches: hand-worked cases, plain loops over the definitions."""

import math
from itertools import permutations

import pytest
import torch
from torch import nn

from replib.analysis.similarity import branch_similarity, kernel_cosines, unbiased_hsic
from replib.blocks import BLOCKS

torch.set_num_threads(1)


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scrambled(module: nn.Module) -> nn.Module:
    """In eval mode and float64, no norm and no scale as it was made."""
    generator = torch.Generator().manual_seed(1)
    module = module.double().eval()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point() and value.dim() and not name.endswith("conv.weight"):
            if value.dim() == 1:
                value.data.uniform_(0.5, 1.5, generator=generator)
    return module


def u_statistic(k: torch.Tensor, el: torch.Tensor) -> float:
    """HSIC as its definition has it: a mean over all choices of four different images."""
    n, total, k, el = len(k), 0.0, k.tolist(), el.tolist()
    for i, j, q, r in permutations(range(n), 4):
        total += k[i][j] * (el[i][j] + el[q][r] - 2 * el[i][q])
    return total / math.perm(n, 4)


def test_hsic_is_the_mean_over_all_fours_of_images():
    features = [drawn(7, 3), drawn(7, 5, seed=1), drawn(7, 2, seed=2) + 3]
    grams = torch.stack([x @ x.T for x in features])
    found = unbiased_hsic(grams)
    for i, first in enumerate(grams):
        for j, second in enumerate(grams):
            assert found[i, j].item() == pytest.approx(u_statistic(first, second), abs=1e-11)
    with pytest.raises(ValueError, match="of 3 images"):
        unbiased_hsic(grams[:, :3, :3])


FAMILIES = ["repvgg", "acb", "dbb", "orepa", "orepa_repvgg", "mobileone", "csla"]
SHAPES = {"square": {}, "strided": {"stride": 2}, "valid": {"padding": 0}, "circular": {}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_of_branches_add_up_to_the_block(family, shape):
    mode = {"padding_mode": "circular"} if shape == "circular" else {}
    torch.manual_seed(0)
    block = scrambled(BLOCKS[family](4, 4, 3, **SHAPES[shape], **mode))
    block.set_rate(0.3)
    x = drawn(2, 4, 7, 8)
    with torch.no_grad():
        outputs = block.branch_outputs(x)
        assert list(outputs) == list(block.branches)
        side = sum(out for name, out in outputs.items() if name != block.main)
        whole = outputs[block.main] + 0.3 * side
        whole = whole if block.post_norm is None else block.post_norm(whole)
        torch.testing.assert_close(whole, block(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_cosines_and_cka_are_those_of_plain_loops(family):
    """Of the second of two blocks, so that its inputs are no white noise; over two batches."""
    torch.manual_seed(0)
    blocks = [BLOCKS[family](3, 4, 3), BLOCKS[family](4, 4, 3, stride=2)]
    model = scrambled(nn.Sequential(blocks[0], nn.ReLU(), blocks[1]))
    batches = [drawn(5, 3, 4, 5), drawn(6, 3, 4, 5, seed=1)]
    found = branch_similarity(model, batches)["2"]
    names = list(blocks[1].branches)
    assert found["branches"] == names
    with torch.no_grad():
        maps = [blocks[1].branch_outputs(model[1](blocks[0](x))) for x in batches]

    def kernel(name):
        weight = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
        own = blocks[1].branches[name].kernel()
        grouped = (
            own.weight
            if own.groups == 1
            else torch.diag_embed(own.weight[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1)
        )
        h, w = grouped.shape[2:]
        weight[:, :, 1 - h // 2 : 2 + h // 2, 1 - w // 2 : 2 + w // 2] = grouped
        return weight.detach()

    def hsic(first, second):
        grams = [
            [m[name].flatten(1) @ m[name].flatten(1).T for name in (first, second)] for m in maps
        ]
        return sum(u_statistic(k, el) for k, el in grams)

    def dot(first, second):
        return sum((m[first] * m[second]).sum().item() for m in maps)

    def cosine(inner, first, second):
        return inner(first, second) / math.sqrt(inner(first, first) * inner(second, second))

    def product(first, second):
        return (kernel(first) * kernel(second)).sum().item()

    for i, j in ((0, 1), (1, 0), (len(names) - 1, 0)):
        for name, inner in (("kernels", product), ("outputs", dot), ("cka", hsic)):
            expected = cosine(inner, names[i], names[j])
            assert found[name][i, j].item() == pytest.approx(expected, abs=1e-9), name


def test_what_each_measure_does_not_see():
    """A branch that is another one, scaled: all are 1. Turned channels: CKA alone is 1."""
    block = BLOCKS["duplicate"](3, 3, 3, norms="none").double().eval()
    (first, second), x = block.branches.values(), drawn(20, 3, 6, 6)
    convs = [next(m for m in b.modules() if hasattr(m, "weight")) for b in (first, second)]
    for turn, expected in ((2.5 * torch.eye(3), (1, 1, 1)), (torch.eye(3).roll(1, 0), None)):
        convs[1].weight.data = torch.einsum("po,oihw->pihw", turn.double(), convs[0].weight.data)
        found = branch_similarity(block, [x])[""]
        values = [found[name][0, 1].item() for name in ("kernels", "outputs", "cka")]
        if expected:
            assert values == pytest.approx(expected, abs=1e-9)
        else:
            assert values[2] == pytest.approx(1, abs=1e-9) and max(map(abs, values[:2])) < 0.9


def test_what_cannot_be_compared():
    model = nn.Sequential(BLOCKS["orepa"](2, 2, 3)).double().eval()
    cosines = kernel_cosines(model[0])
    prior = list(model[0].branches).index("prior")  # its scale starts at 0
    assert cosines[prior].isnan().all() and not cosines[0, 1].isnan()
    with pytest.raises(ValueError, match="no image has reached 0"):
        branch_similarity(model, [])
    with pytest.raises(ValueError, match="is in train mode"):
        branch_similarity(model.train(), [drawn(4, 2, 5, 5)])
    assert not any(m._forward_pre_hooks for m in model.modules())
