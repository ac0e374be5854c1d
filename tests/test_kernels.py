"""The identities against plain loops, in float64, over dimensions, groups, sizes, dilations."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replib import kernels
from replib.kernels import Kernel

EXACT = {"rtol": 0, "atol": 1e-12}  # float64, values of order 1, sums of some hundred terms
quick = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.integers(1, 3)


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.from_numpy(np.asarray(theirs)), **EXACT)


@st.composite
def geometries(draw, dims=None):
    """dims, groups, channels per group (in, between, out), and sizes per axis."""
    dims = draw(st.integers(1, 3)) if dims is None else dims
    groups = draw(st.integers(1, 3))
    channels = [groups * draw(st.integers(1, 2)) for _ in range(3)]
    size1, size2 = (tuple(draw(sizes) for _ in range(dims)) for _ in range(2))
    return dims, groups, channels, size1, size2


@quick
@given(geometries(), st.integers(1, 2), st.integers(1, 2), st.integers(-1, 2))
def test_a_kernel_convolves_as_defined(geometry, stride, dilation, padding):
    dims, groups, (i, _, o), size, _ = geometry
    kernel = Kernel(random(o, i // groups, *size), random(o, seed=1), groups, (dilation,) * dims)
    x = random(1, i, *(7,) * dims, seed=2)
    ours = kernels.convolve(x, kernel, (padding,) * dims, (stride,) * dims)
    close(
        ours,
        reference.convolve(
            x.numpy(),
            kernel.weight.numpy(),
            kernel.bias.numpy(),
            (stride,) * dims,
            (padding,) * dims,
            (dilation,) * dims,
            groups,
        ),
    )


@quick
@given(geometries())
def test_a_norm_folds_into_the_kernel_before_it(geometry):
    dims, groups, (i, _, o), size, _ = geometry
    weight, bias = random(o, i // groups, *size), random(o, seed=1)
    gamma, beta, mean = (random(o, seed=s) for s in (2, 3, 4))
    var, eps = random(o, seed=5).abs(), 1e-5
    factor = gamma / (var + eps).sqrt()
    ours = kernels.scaled(Kernel(weight, bias, groups), factor, beta - mean * factor)
    statistics = [v.numpy() for v in (gamma, beta, mean, var)]
    theirs = reference.fused_norm(weight.numpy(), bias.numpy(), *statistics, eps)
    close(ours.weight, theirs[0])
    close(ours.bias, theirs[1])
    # And both are what the two layers compute one after the other.
    x = random(1, i, *(4,) * dims, seed=6)
    one = (1,) * dims
    y = reference.convolve(x.numpy(), weight.numpy(), bias.numpy(), one, one, one, groups)
    close(kernels.convolve(x, ours, one), reference.norm(y, *statistics, eps))


@quick
@given(geometries())
def test_identity_and_pooling_are_depthwise_kernels_in_any_grouping(geometry):
    dims, groups, _, size, _ = geometry
    channels = groups * 2
    odd = tuple(2 * k - 1 for k in size)
    ours = kernels.regrouped(kernels.identity(channels, dims), groups)
    ours = kernels.resized(ours, odd, (1,) * dims)
    close(ours.weight, reference.identity(channels, groups, odd))
    mean = torch.full((channels, 1, *size), 1 / np.prod(size), dtype=torch.float64)
    pool = Kernel(mean, mean.new_zeros(channels), channels)
    close(kernels.regrouped(pool, groups).weight, reference.average_pool(channels, groups, size))


@quick
@given(geometries(), st.integers(1, 3))
def test_fewer_groups_write_the_same_map(geometry, factor):
    dims, new, (i, _, o), size, _ = geometry
    old, i, o = new * factor, i * factor, o * factor
    kernel = Kernel(random(o, i // old, *size), random(o, seed=1), old)
    ours = kernels.regrouped(kernel, new)
    close(ours.weight, reference.with_fewer_groups(kernel.weight.numpy(), old, new))
    x = random(1, i, *(4,) * dims, seed=2)
    torch.testing.assert_close(kernels.convolve(x, ours), kernels.convolve(x, kernel), **EXACT)


@quick
@given(geometries())
def test_a_pointwise_kernel_before_another(geometry):
    dims, groups, (i, t, o), size, _ = geometry
    first = Kernel(random(t, i // groups, *(1,) * dims), random(t, seed=1), groups)
    second = Kernel(random(o, t // groups, *size, seed=2), random(o, seed=3), groups)
    ours = kernels.composed(first, second)
    tensors = (v.numpy() for k in (first, second) for v in (k.weight, k.bias))
    theirs = reference.pointwise_then(*tensors, groups)
    close(ours.weight, theirs[0])
    close(ours.bias, theirs[1])


@quick
@given(geometries())
def test_any_kernel_before_another(geometry):
    dims, groups, (i, t, o), size1, size2 = geometry
    first = Kernel(random(t, i // groups, *size1), random(t, seed=1), groups)
    second = Kernel(random(o, t // groups, *size2, seed=2), random(o, seed=3), groups)
    ours = kernels.composed(first, second)
    tensors = (v.numpy() for k in (first, second) for v in (k.weight, k.bias))
    theirs = reference.one_after_the_other(*tensors, groups)
    close(ours.weight, theirs[0])
    close(ours.bias, theirs[1])
    x = random(1, i, *(6,) * dims, seed=4)
    both = kernels.convolve(kernels.convolve(x, first), second)
    torch.testing.assert_close(kernels.convolve(x, ours), both, **EXACT)


@quick
@given(geometries(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2))
def test_composition_of_different_groups_and_dilations(geometry, g1, g2, d1, d2):
    dims, groups, (i, t, o), size1, size2 = geometry
    i, t, o = i * g1 * g2, t * g1 * g2, o * g1 * g2
    first = Kernel(
        random(t, i // (groups * g1), *size1), random(t, seed=1), groups * g1, (d1,) * dims
    )
    second = Kernel(
        random(o, t // (groups * g2), *size2, seed=2), random(o, seed=3), groups * g2, (d2,) * dims
    )
    ours = kernels.composed(first, second)
    x = random(1, i, *(9,) * dims, seed=4)
    both = kernels.convolve(kernels.convolve(x, first), second)
    torch.testing.assert_close(kernels.convolve(x, ours), both, **EXACT)


@quick
@given(geometries(), st.integers(0, 2), st.integers(1, 3))
def test_a_small_kernel_adds_at_the_centre_of_a_large_one(geometry, margin, factor):
    dims, groups, (i, _, o), size, _ = geometry
    large = tuple(k + 2 * margin for k in size)
    a = Kernel(random(o, i // groups, *large), random(o, seed=1), groups)
    b = Kernel(random(o, i // groups, *size, seed=2), random(o, seed=3), groups)
    small = reference.centred(b.weight.numpy(), large)
    close((a + b).weight, a.weight.numpy() + small)
    close((a + b).bias, a.bias.numpy() + b.bias.numpy())
    close((a - b * factor).weight, a.weight.numpy() - factor * small)
    # The aligned padding of the small one: p - (difference of the extents) / 2, cropping below 0.
    x = random(1, i, *(8,) * dims, seed=4)
    padding = (1,) * dims
    apart = kernels.convolve(x, a, padding) + kernels.convolve(x, b, (1 - margin,) * dims)
    torch.testing.assert_close(kernels.convolve(x, a + b, padding), apart, **EXACT)


def per_axis(low, high, dims):
    """A number of its own for every axis."""
    return st.tuples(*[st.integers(low, high)] * dims)


@st.composite
def kernels_between(draw, i, o, dims, most=3, seed=0):
    """A kernel from i to o channels of any groups, odd sizes, and dilations up to `most`."""
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if i % g == o % g == 0]))
    size = draw(st.tuples(*[st.sampled_from([1, 3])] * dims))
    dilation = draw(per_axis(1, most, dims))
    weight, bias = random(o, i // groups, *size, seed=seed), random(o, seed=seed + 1)
    return Kernel(weight, bias, groups, dilation)


def extent(kernel):
    """The pixels that one output sees, per axis."""
    return [(k - 1) * d + 1 for k, d in zip(kernel.size, kernel.dilation, strict=True)]


def looped(x, kernel, padding, stride):
    """A kernel applied by plain loops."""
    x, weight, bias = (value.numpy() for value in (x, kernel.weight, kernel.bias))
    form = stride, padding, kernel.dilation, kernel.groups
    return torch.from_numpy(reference.convolve(x, weight, bias, *form))


@st.composite
def placed(draw, kernel, least=0):
    """A small image that the kernel fits in, a padding and a stride."""
    padding, stride = (draw(per_axis(low, high, kernel.dims)) for low, high in ((least, 2), (1, 3)))
    space = [e + draw(st.integers(-2 * least, 3)) for e in extent(kernel)]
    return random(1, kernel.in_channels, *space, seed=9), padding, stride


@quick
@given(st.data(), st.integers(1, 3))
def test_stride_padding_and_dilation_belong_to_their_axis(data, dims):
    kernel = data.draw(kernels_between(2, 4, dims))
    x, padding, stride = data.draw(placed(kernel, least=-1))
    ours = kernels.convolve(x, kernel, padding, stride)
    torch.testing.assert_close(ours, looped(x, kernel, padding, stride), **EXACT)


@quick
@given(st.data(), st.integers(1, 3))
def test_a_dilated_kernel_is_a_larger_one_with_zeros(data, dims):
    kernel = data.draw(kernels_between(2, 4, dims))
    ours = kernels.resized(kernel, tuple(extent(kernel)), (1,) * dims)
    close(ours.weight, reference.spread(kernel.weight.numpy(), kernel.dilation))


@quick
@given(st.data(), st.integers(1, 2))
def test_a_sum_of_any_kernels_is_the_sum_of_what_they_compute(data, dims):
    """Of other sizes, dilations and groups, each cropped to its place; by plain loops."""
    a, b = (data.draw(kernels_between(4, 4, dims, seed=seed)) for seed in (0, 2))
    both = a + b
    x, padding, stride = data.draw(placed(both))

    def alone(kernel):
        axes = zip(padding, extent(both), extent(kernel), strict=True)
        return looped(x, kernel, [p - (big - e) // 2 for p, big, e in axes], stride)

    ours = kernels.convolve(x, both, padding, stride)
    torch.testing.assert_close(ours, alone(a) + alone(b), **EXACT)


@quick
@given(st.data(), st.integers(1, 2))
def test_any_two_kernels_and_a_norm_in_a_row(data, dims):
    """The padding before the first one, the stride in the second one; by plain loops."""
    first = data.draw(kernels_between(2, 4, dims, most=2))
    second = data.draw(kernels_between(4, 2, dims, most=2, seed=2))
    factor, shift = random(2, seed=4), random(2, seed=5)
    one = kernels.scaled(kernels.composed(first, second), factor, shift)
    x, padding, stride = data.draw(placed(one))
    nothing, unit = (0,) * dims, (1,) * dims
    y = looped(looped(x, first, padding, unit), second, nothing, stride)
    y = y * factor.view(-1, *unit) + shift.view(-1, *unit)
    torch.testing.assert_close(kernels.convolve(x, one, padding, stride), y, **EXACT)


@quick
@given(st.data(), st.integers(1, 2))
def test_kernels_form_an_algebra(data, dims):
    """Composition is associative, and distributes over sums where the other has no bias."""
    channels = (2, 4), (4, 4), (4, 2), (4, 4)
    a, b, c, d = (
        data.draw(kernels_between(*between, dims, most=2, seed=seed))
        for seed, between in enumerate(channels)
    )
    silent = Kernel(c.weight, torch.zeros_like(c.bias), c.groups, c.dilation)
    for ours, theirs in (
        (kernels.composed(kernels.composed(a, b), c), kernels.composed(a, kernels.composed(b, c))),
        (kernels.composed(a, b + d), kernels.composed(a, b) + kernels.composed(a, d)),
        (
            kernels.composed(b + d, silent),
            kernels.composed(b, silent) + kernels.composed(d, silent),
        ),
    ):
        nothing = ours - theirs
        assert nothing.weight.abs().max() < 1e-12 and nothing.bias.abs().max() < 1e-12


def test_dilated_kernels_meet_in_their_common_dilation():
    a = Kernel(random(2, 2, 3), random(2), 1, (4,))
    b = Kernel(random(2, 2, 3, seed=1), random(2), 1, (6,))
    both = a + b
    assert (both.size, both.dilation) == ((7,), (2,))
    x = random(1, 2, 20, seed=2)
    apart = kernels.convolve(x, a, (0,)) + kernels.convolve(x, b, (2,))  # extents 9 and 13
    torch.testing.assert_close(kernels.convolve(x, both, (2,)), apart, **EXACT)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda k: kernels.regrouped(k, 4),
            r"groups \(=4\) must divide the kernel's groups \(=2\)",
        ),
        (lambda k: kernels.resized(k, (2, 2), (1, 1)), "size 3 and dilation 1 does not fit"),
        (lambda k: k + Kernel(k.weight[:2], k.bias[:2]), "cannot be added"),
        (lambda k: kernels.composed(k, Kernel(random(3, 5, 1, 1), random(3))), "takes 5"),
    ],
)
def test_impossible_requests_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(Kernel(random(4, 3, 3, 3), random(4), 2))


def test_gradients_flow_through_the_identities():
    def whole(weight1, bias1, weight2):
        both = kernels.composed(Kernel(weight1, bias1, 2), Kernel(weight2, bias1[:2], 2))
        kernel = both + kernels.identity(2, dims=1)
        return kernel.weight, kernel.bias

    inputs = [random(4, 1, 3), random(4, seed=1), random(2, 2, 3, seed=2)]
    assert torch.autograd.gradcheck(whole, [value.requires_grad_() for value in inputs])
