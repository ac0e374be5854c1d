"""Toy blocks: one function at first; branches under one scale are one kernel that learns faster."""

import pytest
import torch

from replib.analysis.toy_blocks import FORMS, Path, apart, block, distances, trained


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_all_forms_are_one_function_at_first():
    weights = [drawn(2, 3, 3, 3, seed=i) for i in range(3)]
    x = drawn(2, 3, 6, 6, seed=9)
    expected = torch.nn.functional.conv2d(x, sum(weights))
    for form in FORMS:
        torch.testing.assert_close(block(form, weights)(x), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"form \(='both'\) must be one of single, shared, own"):
        block("both", weights)


@pytest.mark.parametrize("branches", [2, 3])
def test_branches_under_one_scale_are_one_kernel_that_learns_faster(branches):
    """The scale of both learns at the same rate; exact up to rounding, over a whole training."""
    options = {"branches": branches, "steps": 30}
    single = trained("single", kernel_factor=branches, **options)
    shared, own = (trained(form, **options) for form in ("shared", "own"))
    assert max(distances(single, shared)) < 1e-12 < 0.01 < max(distances(single, own))
    assert max(distances(single, trained("single", **options))) > 0.01, "another learning rate"
    assert single.losses == pytest.approx(shared.losses, rel=1e-10)
    assert max(shared.gradients_apart) < 1e-12
    assert own.gradients_apart[0] < 1e-12 < 1e-3 < own.gradients_apart[-1]
    assert shared.losses[-1] < shared.losses[0] / 2 and own.losses[-1] < own.losses[0] / 2
    assert len(own.kernels) == len(own.losses) + 1 == 31, "the kernel after the last step too"


def test_how_alike_kernels_are_is_their_cosine():
    """In `shared` they move alike, from kernels that the seed draws; their difference stays."""
    generator = torch.Generator().manual_seed(3)
    _, _, first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64).flatten()
        for shape in ((16, 4, 8, 8), *3 * [(4, 4, 3, 3)])
    )
    found = trained("shared", seed=3, steps=2)
    assert found.kernels_alike[0] == pytest.approx(
        (first @ second / first.norm() / second.norm()).item()
    )
    assert found.kernels_alike[1] != found.kernels_alike[0]
    torch.testing.assert_close(found.kernels[0], (first + second) / 6, rtol=0, atol=1e-12)
    assert trained("single", steps=2).kernels_alike == []


def test_gradients_of_branches_by_hand():
    """s_i g for the kernel of branch i, <g, W_i> for its scale; s g for all of them under one."""
    weights, x = [drawn(2, 2, 3, 3, seed=i) for i in range(2)], drawn(3, 2, 5, 5, seed=5)
    merged = sum(weights).requires_grad_()
    torch.nn.functional.conv2d(x, merged).square().sum().backward()
    own = block("own", weights)
    own(x).square().sum().backward()
    for chain, weight in zip(own.branches.values(), weights, strict=True):
        torch.testing.assert_close(chain[0].weight.grad, merged.grad, rtol=0, atol=1e-9)
        assert chain[0].weight.data_ptr() != weight.data_ptr(), "training moves a copy"
        expected = (merged.grad * weight).sum((1, 2, 3))
        torch.testing.assert_close(chain[1].weight.grad, expected, rtol=0, atol=1e-9)


def test_distances_are_relative_to_the_way():
    ones, twos = torch.ones(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    first, second = Path(kernels=[ones, 3 * ones]), Path(kernels=[twos, twos])
    assert distances(first, second) == [0.5, 0.5]
    assert (apart(ones, ones), apart(ones, -ones), apart(ones, twos)) == (
        0,
        1,
        pytest.approx(1 / 3),
    )
