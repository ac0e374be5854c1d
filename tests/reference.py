"""Every identity once more as plain loops, from the papers' definitions; slow, float64.

Nothing here knows replib or torch. Arrays are numpy; a weight is (O, I/groups, *size), a feature
map (N, channels, *space). All convolutions are cross-correlations.
"""

from itertools import product

import numpy as np


def places(shape):
    """Every index of an array of this shape."""
    return product(*(range(n) for n in shape))


def convolve(x, weight, bias, stride, padding, dilation, groups):
    """Convolution by its definition; a negative padding crops."""
    dims, size = weight.ndim - 2, weight.shape[2:]
    space = x.shape[2:]
    out_space = tuple(
        (space[a] + 2 * padding[a] - dilation[a] * (size[a] - 1) - 1) // stride[a] + 1
        for a in range(dims)
    )
    out_channels, slots = weight.shape[:2]
    y = np.zeros((x.shape[0], out_channels, *out_space))
    for n, o, *at in places(y.shape):
        group = o // (out_channels // groups)
        total = bias[o]
        for j, *tap in places((slots, *size)):
            where = [at[a] * stride[a] + tap[a] * dilation[a] - padding[a] for a in range(dims)]
            if all(0 <= where[a] < space[a] for a in range(dims)):
                total += weight[(o, j, *tap)] * x[(n, group * slots + j, *where)]
        y[(n, o, *at)] = total
    return y


def unit_filters(weight):
    """Every filter divided by its length."""
    out = np.zeros_like(weight)
    for o in range(len(weight)):
        length = sum(weight[(o, *at)] ** 2 for at in places(weight.shape[1:])) ** 0.5
        for at in places(weight.shape[1:]):
            out[(o, *at)] = weight[(o, *at)] / length
    return out


def norm(x, gamma, beta, mean, var, eps):
    """Batch normalisation in eval mode, one number at a time."""
    y = np.zeros_like(x)
    for n, c, *at in places(x.shape):
        index = (n, c, *at)
        y[index] = gamma[c] * (x[index] - mean[c]) / np.sqrt(var[c] + eps) + beta[c]
    return y


def fused_norm(weight, bias, gamma, beta, mean, var, eps):
    """Convolution, then norm, as one convolution (DBB, transform I)."""
    weight, bias = weight.copy(), bias.copy()
    for o in range(len(weight)):
        factor = gamma[o] / np.sqrt(var[o] + eps)
        weight[o] = weight[o] * factor
        bias[o] = beta[o] + (bias[o] - mean[o]) * factor
    return weight, bias


def identity(channels, groups, size):
    """x -> x as a kernel: one where the slot is the channel itself and the tap the centre."""
    slots = channels // groups
    weight = np.zeros((channels, slots, *size))
    for o in range(channels):
        weight[(o, o % slots, *(k // 2 for k in size))] = 1
    return weight


def average_pool(channels, groups, size):
    """Average pooling, padding counted, as a kernel (DBB, transform V)."""
    slots = channels // groups
    weight = np.zeros((channels, slots, *size))
    for o in range(channels):
        for tap in places(size):
            weight[(o, o % slots, *tap)] = 1 / np.prod(size)
    return weight


def pointwise_then(weight1, bias1, weight2, bias2, groups):
    """1x1, then k x k, both with the same groups (DBB, transform III)."""
    out_channels, slots = weight2.shape[:2]
    weight = np.zeros((out_channels, weight1.shape[1], *weight2.shape[2:]))
    bias = bias2.copy()
    for o in range(out_channels):
        group = o // (out_channels // groups)
        for local, *tap in places((slots, *weight2.shape[2:])):
            t = group * slots + local
            bias[o] += weight2[(o, local, *tap)] * bias1[t]
            for i in range(weight1.shape[1]):
                weight[(o, i, *tap)] += (
                    weight2[(o, local, *tap)] * weight1[(t, i, *(0 for _ in tap))]
                )
    return weight, bias


def one_after_the_other(weight1, bias1, weight2, bias2, groups):
    """k1, then k2, without padding between them: K(u) = sum over v of K2(v) K1(u - v)."""
    size1, size2 = weight1.shape[2:], weight2.shape[2:]
    out_channels, slots = weight2.shape[:2]
    size = tuple(a + b - 1 for a, b in zip(size1, size2, strict=True))
    weight = np.zeros((out_channels, weight1.shape[1], *size))
    bias = bias2.copy()
    for o in range(out_channels):
        group = o // (out_channels // groups)
        for local, *tap2 in places((slots, *size2)):
            t = group * slots + local
            bias[o] += weight2[(o, local, *tap2)] * bias1[t]
            for i, *tap1 in places((weight1.shape[1], *size1)):
                u = tuple(a + b for a, b in zip(tap1, tap2, strict=True))
                weight[(o, i, *u)] += weight2[(o, local, *tap2)] * weight1[(t, i, *tap1)]
    return weight, bias


def centred(weight, size):
    """A kernel inside a larger one, zeros around it (DBB, transform VI)."""
    out = np.zeros((*weight.shape[:2], *size))
    margin = [(big - k) // 2 for big, k in zip(size, weight.shape[2:], strict=True)]
    for o, i, *tap in places(weight.shape):
        out[(o, i, *(m + t for m, t in zip(margin, tap, strict=True)))] = weight[(o, i, *tap)]
    return out


def with_fewer_groups(weight, old, new):
    """The same map with fewer groups: zeros where the old groups do not reach."""
    out_channels, slots = weight.shape[:2]
    out = np.zeros((out_channels, slots * old // new, *weight.shape[2:]))
    for o, j, *tap in places(weight.shape):
        channel = (o // (out_channels // old)) * slots + j
        first = (o // (out_channels // new)) * out.shape[1]
        out[(o, channel - first, *tap)] = weight[(o, j, *tap)]
    return out


def spread(weight, dilation):
    """A dilated kernel as an ordinary one: zeros between its taps."""
    size = tuple((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
    out = np.zeros((*weight.shape[:2], *size))
    for o, i, *tap in places(weight.shape):
        out[(o, i, *(t * d for t, d in zip(tap, dilation, strict=True)))] = weight[(o, i, *tap)]
    return out


def average(x, size, dilation):
    """The mean of every window of a feature map, without padding."""
    dims = len(size)
    space = tuple(n - (k - 1) * d for n, k, d in zip(x.shape[2:], size, dilation, strict=True))
    y = np.zeros((*x.shape[:2], *space))
    for n, c, *at in places(y.shape):
        for tap in places(size):
            where = [at[a] + tap[a] * dilation[a] for a in range(dims)]
            y[(n, c, *at)] += x[(n, c, *where)] / np.prod(size)
    return y
