"""Tensors of symbols: the library's own code, run on letters instead of numbers.

A `Symbolic` takes the place of a `torch.Tensor` wherever replib computes, so that
`kernels.composed(...)`, `block(x)`, `block.kernel()` and `block.restore(...)` give formulas. A
difference that simplifies to 0 proves an identity of this very code for all values, at the sizes
given. What a convolution, a norm and a pooling are is written out below as sums; nothing is
computed by torch.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import product
from math import prod
from typing import Any

import numpy as np
import sympy
import torch
from sympy import Expr
from sympy.printing.mathml import mathml
from torch import Tensor, nn

from replib.blocks import RepBlock
from replib.branches import BATCH_NORM, Convolution, Scale

Sizes = tuple[int, ...]
EPSILON = sympy.Symbol("epsilon", positive=True)  # of every norm
LONGEST = 55  # operations of a formula that is worth showing


def exact(value: Any) -> Expr:
    """A number as the fraction that it stands for: 0.1 is 1/10, 0.1 + 0.2 all of its bits."""
    if isinstance(value, float):
        short = Fraction(value).limit_denominator(10**6)
        value = short if float(short) == value else Fraction(value)
    return sympy.sympify(value)


def entries(values: Any) -> np.ndarray:
    """Numbers, expressions, arrays or tensors as an array of exact expressions."""
    if isinstance(values, Symbolic):
        return values.values
    if isinstance(values, Tensor):
        values = values.detach().double().numpy()
    if isinstance(values, np.ndarray) and values.dtype == object:
        return values
    return np.vectorize(exact, otypes=[object])(values)


class Symbolic:
    """A tensor of expressions, with as much of the interface of `torch.Tensor` as replib uses.

    values: an array of sympy expressions. In-place methods change it; views share it.
    """

    dtype, device, is_meta = torch.float64, torch.device("cpu"), False

    def __init__(self, values: Any):
        self.values = np.asarray(entries(values), dtype=object)

    @classmethod
    def named(cls, letter: str, *shape: int, **assumptions: bool) -> Symbolic:
        """Real symbols letter_ijk, one for every place i, j, k of the shape."""
        names = [f"{letter}_{''.join(map(str, place))}".rstrip("_") for place in places(shape)]
        symbols = [sympy.Symbol(name, real=True, **assumptions) for name in names]
        return cls(np.array([*symbols, None], dtype=object)[:-1].reshape(shape))

    @classmethod
    def __torch_function__(cls, function: Callable, types, args=(), kwargs=None):
        """torch.f(...) with a symbol among its arguments: one of `MEANINGS`, or our method f."""
        name = function.__name__
        args = [cls(value) if isinstance(value, Tensor) else value for value in args]
        meaning = MEANINGS.get(name) or getattr(cls, name, None)
        if meaning is None:
            raise NotImplementedError(
                f"{name} has no meaning for symbols; {__name__} gives it one."
            )
        return meaning(*args, **kwargs or {})

    # -- form -------------------------------------------------------------------------------------
    @property
    def shape(self) -> Sizes:
        return self.values.shape

    def dim(self) -> int:
        return self.values.ndim

    def numel(self) -> int:
        return self.values.size

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index) -> Symbolic:
        return Symbolic(np.asarray(self.values[index], dtype=object))

    def __setitem__(self, index, value) -> None:
        self.values[index] = entries(value)[()]  # of no axes: the entry itself

    def to(self, *args, **kwargs) -> Symbolic:
        return self

    double = to

    def clone(self, **kwargs) -> Symbolic:
        return Symbolic(self.values.copy())

    def view(self, *shape) -> Symbolic:
        return Symbolic(self.values.reshape(*shape))

    reshape = view

    def view_as(self, other) -> Symbolic:
        return self.view(*other.shape)

    def flatten(self, start: int = 0) -> Symbolic:
        return self.view(*self.shape[:start], -1)

    def unflatten(self, axis: int, sizes: Sizes) -> Symbolic:
        return self.view(*self.shape[:axis], *sizes, *self.shape[axis + 1 :])

    def expand(self, *shape: int) -> Symbolic:
        own = (1,) * (len(shape) - self.dim()) + self.shape
        wanted = [n if s == -1 else s for n, s in zip(own, shape, strict=True)]
        return Symbolic(np.broadcast_to(self.values, wanted))

    def transpose(self, a: int, b: int) -> Symbolic:
        return Symbolic(self.values.swapaxes(a, b))

    def flip(self, axes: Sizes) -> Symbolic:
        return Symbolic(np.flip(self.values, axes))

    def narrow(self, axis: int, start: int, length: int) -> Symbolic:
        return self[(slice(None),) * axis + (slice(start, start + length),)]

    def index_copy(self, axis: int, index: Tensor, source: Symbolic) -> Symbolic:
        out = self.clone()
        out[(slice(None),) * axis + (index.numpy(),)] = source
        return out

    def new_zeros(self, *shape) -> Symbolic:
        return Symbolic(np.zeros(*shape if isinstance(shape[0], tuple | list) else [shape]))

    def zeros_like(self) -> Symbolic:
        return self.new_zeros(*self.shape)

    def full_like(self, value: float, **kwargs) -> Symbolic:
        return self.zeros_like().copy_(value)

    # -- arithmetic -------------------------------------------------------------------------------
    def add(self, other) -> Symbolic:
        return Symbolic(self.values + entries(other))

    def sub(self, other) -> Symbolic:
        return Symbolic(self.values - entries(other))

    def mul(self, other) -> Symbolic:
        return Symbolic(self.values * entries(other))

    def div(self, other) -> Symbolic:
        return Symbolic(self.values / entries(other))

    def matmul(self, other) -> Symbolic:
        return Symbolic(self.values @ entries(other))

    def addcmul(self, a, b) -> Symbolic:
        return self + a * b

    def __neg__(self) -> Symbolic:
        return self * -1

    def __rtruediv__(self, other) -> Symbolic:
        return Symbolic(entries(other)).div(self)

    def __lt__(self, other) -> Symbolic:
        return self.each(lambda e: e < exact(other))

    __add__ = __radd__ = add
    __mul__ = __rmul__ = mul
    __sub__, __truediv__, __matmul__ = sub, div, matmul

    def each(self, function: Callable[[Expr], Any]) -> Symbolic:
        """The function of every entry."""
        return Symbolic(np.vectorize(function, otypes=[object])(self.values))

    def sqrt(self) -> Symbolic:
        return self.each(sympy.sqrt)

    def rsqrt(self) -> Symbolic:
        return 1 / self.sqrt()

    def abs(self) -> Symbolic:
        return self.each(sympy.Abs)

    def sum(self, axes: Sizes | None = None) -> Symbolic:
        return Symbolic(self.values.sum(axes))

    def any(self) -> bool:
        return any(e != 0 for e in self.values.flat)

    def max(self) -> Expr:
        return sympy.Max(*self.values.flat)

    # -- in place ---------------------------------------------------------------------------------
    def copy_(self, other) -> Symbolic:
        self[...] = other
        return self

    fill_ = copy_

    def add_(self, other) -> Symbolic:
        return self.copy_(self + other)

    def zero_(self) -> Symbolic:
        return self.copy_(0)

    def masked_fill_(self, mask: Symbolic, value: float) -> Symbolic:
        """An undecided condition is false: a symbol stands for values that are no special case."""
        filled = np.array([condition is sympy.true for condition in mask.values.flat])
        self.values[filled.reshape(self.shape)] = exact(value)
        return self

    # -- what one asks of formulas ----------------------------------------------------------------
    def simplified(self) -> Symbolic:
        """Every entry in a normal form of all that replib computes: multiplied out, with roots of
        fractions in lowest terms and signs of single factors. Equal formulas have difference 0.
        """

        def normal(e: Expr) -> Expr:
            e = sympy.expand(e)
            if e.has(sympy.Abs, sympy.sign) or any(map(is_root, e.atoms(sympy.Pow))):
                e = e.replace(is_root, lowest_terms)
                e = e.replace(sympy.Abs, lambda a: a * sympy.sign(a))
                e = e.replace(sympy.sign, sign_by_factors)
                e = sympy.expand(e)
            return e

        return self.each(normal)

    def _repr_html_(self) -> str:
        """Its formulas in a table, a row for every index but the last."""
        rows = "".join(
            f"<tr>{''.join(f'<td>{formula(e)}</td>' for e in row)}</tr>"
            for row in self.values.reshape(-1, *self.shape[-1:] or (1,))
        )
        return f'<div class="wide"><table class="formulas">{rows}</table></div>'

    def with_values(self, values: dict[Expr, Any]) -> Symbolic:
        """The symbols replaced."""
        return self.each(lambda e: e.subs(values))

    def numbers(self, values: dict[Expr, float]) -> Tensor:
        """The float64 tensor that results when all symbols take these values."""
        evaluated = [float(e.xreplace(values)) for e in self.values.flat]
        return torch.tensor(evaluated, dtype=torch.float64).view(self.shape)


def is_root(e: Expr) -> bool:
    """Whether e is a square root, or one over it."""
    return e.is_Pow and abs(e.exp) == sympy.S.Half


def lowest_terms(root: Expr) -> Expr:
    """sqrt(a / b) as sqrt(a) / sqrt(b), which is the same where a / b is positive."""
    above, below = sympy.fraction(sympy.together(sympy.cancel(sympy.expand(root.base))))
    return sympy.expand(above) ** root.exp / sympy.factor(below) ** root.exp


def sign_by_factors(e: Expr) -> Expr:
    """The sign of a product as the product of the signs."""
    return sympy.Mul(*map(sympy.sign, e.as_ordered_factors()))


def formula(expression: Expr) -> str:
    """MathML, which browsers draw by themselves; of a long formula only its length."""
    if expression.count_ops() > LONGEST:
        return f"<small>({expression.count_ops()} operations, too long to show)</small>"
    return f'<math displaystyle="true">{mathml(expression, printer="presentation")}</math>'


def places(shape: Iterable[int]) -> Iterable[Sizes]:
    """Every index of a tensor of this shape."""
    return product(*map(range, shape))


# -- what the operations mean ---------------------------------------------------------------------
def per_axis(value: int | Sizes, dims: int) -> Sizes:
    """One number per axis."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def padded(x: Symbolic, amounts: Sizes, mode: str = "constant", value: float | None = None):
    """A constant around x; amounts as in torch: before and after, from the last axis on."""
    if mode != "constant":
        raise NotImplementedError(f"padding mode {mode!r} is not written out for symbols.")
    pairs = [(0, 0)] * (x.dim() - len(amounts) // 2)
    pairs += [*zip(amounts[::2], amounts[1::2], strict=True)][::-1]
    return Symbolic(np.pad(x.values, pairs, constant_values=exact(value or 0)))


def convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Symbolic:
    """y[n, o, p] = b[o] + sum over j, t of w[o, j, t] x[n, first(o) + j, p stride + t dilation]."""
    x, w = Symbolic(x), Symbolic(weight).values
    b = entries(bias) if bias is not None else [0] * len(w)
    dims = w.ndim - 2
    stride, padding, dilation = (per_axis(v, dims) for v in (stride, padding, dilation))
    x = padded(x, tuple(amount for p in reversed(padding) for amount in (p, p))).values
    reach = [(k - 1) * d for k, d in zip(w.shape[2:], dilation, strict=True)]
    space = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    y = np.empty((len(x), len(w), *space), dtype=object)
    for n, o, *p in places(y.shape):
        first = o // (len(w) // groups) * w.shape[1]
        taps = []
        for j, *t in places(w.shape[1:]):
            q = [p[a] * stride[a] + t[a] * dilation[a] for a in range(dims)]
            taps.append(w[(o, j, *t)] * x[(n, first + j, *q)])
        y[(n, o, *p)] = sympy.Add(b[o], *taps)
    return Symbolic(y)


def average_pooling(x: Symbolic, size: Sizes, stride: Sizes, padding: Sizes) -> Symbolic:
    """The mean of every window; padded zeros count."""
    x = padded(x, tuple(amount for p in reversed(padding) for amount in (p, p)))
    space = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], size, stride, strict=True)]
    y = x.new_zeros(*x.shape[:2], *space)
    for p in places(space):
        window = [slice(a * s, a * s + k) for a, s, k in zip(p, stride, size, strict=True)]
        y[(..., *p)] = x[(..., *window)].sum(tuple(range(2, x.dim()))) / prod(size)
    return y


def batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """gamma (x - mean) / sqrt(var + eps) + beta; in training by the batch, and mean, var follow."""
    if training:
        axes, count = (0, *range(2, x.dim())), x.numel() // x.shape[1]
        batch_mean = x.sum(axes) / count
        squares = (x - channels(batch_mean, x)).each(lambda e: e**2).sum(axes)
        for running, now in ((mean, batch_mean), (var, squares / max(count - 1, 1))):
            running.copy_(running * (1 - exact(momentum)) + now * exact(momentum))
        mean, var = batch_mean, squares / count
    y = (x - channels(mean, x)) / channels((var + eps).sqrt(), x)
    y = y if weight is None else y * channels(weight, x)
    return y if bias is None else y + channels(bias, x)


def channels(values: Symbolic, x: Symbolic) -> Symbolic:
    """One value per channel, to be combined with a feature map."""
    return values.view(-1, *(1,) * (x.dim() - 2))


def normalised(x: Symbolic, p=2.0, dim=1, eps=1e-12, out=None) -> Symbolic:
    """x[i] / (sum over j of |x[j]|^p)^(1/p) along an axis; no length is as small as eps."""
    length = x.each(lambda e: abs(e) ** exact(p)).values.sum(dim, keepdims=True)
    return x / length ** (1 / exact(p))


def summed(equation: str, *operands) -> Symbolic:
    """Einstein's summation."""
    return Symbolic(np.einsum(equation, *(entries(o) for o in operands)))


def joined(parts: Iterable, dim: int = 0) -> Symbolic:
    """Concatenation."""
    return Symbolic(np.concatenate([entries(part) for part in parts], dim))


MEANINGS: dict[str, Callable] = {
    "pad": padded,
    "batch_norm": batch_norm,
    "normalize": normalised,
    "einsum": summed,
    "cat": joined,
    **{f"conv{dims}d": convolution for dims in (1, 2, 3)},
    **{f"avg_pool{dims}d": average_pooling for dims in (1, 2, 3)},
}


# -- a module of symbols --------------------------------------------------------------------------
NORMS = tuple(BATCH_NORM.values())
LETTERS = {  # what the field calls the tensors of a part, by its type
    NORMS: {"weight": "gamma", "bias": "beta", "running_mean": "mu", "running_var": "v"},
    Scale: {"weight": "s", "value": "s"},
    Convolution: {"weight": "w", "bias": "b"},
    RepBlock: {"rate": "lambda"},
}


def with_symbols(module: nn.Module) -> tuple[nn.Module, dict[Expr, float]]:
    """A copy that runs on `Symbolic` inputs, and the values that its symbols stand for.

    Parameters, statistics and the rate are symbols, numbered where several have one letter;
    variances are positive, eps is the same in every norm. Fixed filters stay numbers.
    """
    module, values = copy.deepcopy(module), {}
    found = [
        (part, name, short)
        for part in module.modules()
        for types, letters in LETTERS.items()
        if isinstance(part, types)
        for name, short in letters.items()
        if (part._parameters | part._buffers).get(name) is not None
    ]
    total, seen = Counter(short for *_, short in found), Counter()
    for part, name, short in found:
        seen[short] += 1
        number = f"^({seen[short]})" if total[short] > 1 else ""
        tensor = getattr(part, name)
        positive = {"positive": True} if short == "v" else {}
        symbols = Symbolic.named(short + number, *tensor.shape, **positive)
        values |= zip(symbols.values.flat, tensor.flatten().tolist(), strict=True)
        # Straight into the dictionary, past the check that a parameter is a tensor.
        (part._parameters if name in part._parameters else part._buffers)[name] = symbols
    for part in module.modules():
        if isinstance(part, NORMS):
            if values.setdefault(EPSILON, part.eps) != part.eps:
                raise ValueError(f"eps (={part.eps}) must be the same in every norm.")
            part.eps = EPSILON
    return module, values
