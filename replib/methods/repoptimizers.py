"""RepOptimizers: a plain network that is trained as if its layers were blocks of branches.

A search network has blocks of linear branches with trained scales (replib.blocks.linear.CSLA, or
any block whose norm comes after the sum). It is trained on a small data set, and only its scales
are kept. Then the network without branches is trained: its kernels start as such a block's would,
W = sum of s_b W_b, and its gradients are multiplied by what the scales, now constants, would make
of them. A block with constant scales and this single kernel then stay equal, step by step.

The multiplier is read off the tree, for any block of linear branches. A number w of a branch that
reaches one number W of the kernel through a factor c moves it by c times its own step. That step
is c g for SGD: in all c^2 g. For AdamW, which divides it by its size, it is that of sign(c) g: in
all |c|. So W's gradient is multiplied by the sum of c^2, or |c|, over all numbers that reach it.

Source: Ding et al., "Re-parameterizing Your Optimizers rather than Architectures", ICLR 2023,
sections 3.1 to 3.3, appendix D (RepOpt-GhostNet), and its released code.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor, nn

from replib import kernels, parallel
from replib.blocks import RepBlock
from replib.branches import Chain, Convolution, Norm, Piece, Scalar, Scale, Sum
from replib.kernels import Kernel
from replib.networks import CONVOLUTIONS, outermost_blocks
from replib.official import read_state

VERSION = 1  # raise when the numbers of a network trained so change

POWERS: dict[str, Callable] = {  # what a factor on the way to the kernel makes of its gradient
    "square": lambda c: c * c,
    "absolute": lambda c: c.abs(),
    "signed": lambda c: c,
}
POWER_OF = {"sgd": "square", "adamw": "absolute"}  # of which optimizer
CONSTANTS = {
    "searched": "as the search has left them",
    "mean": "the mean of each branch over its channels",
    "initial": "as the search begins",
    "ones": "1",
}
NORMED = "there is a norm in a branch; say norms='sum'"
IDENTITY = {"scale": "the searched scale", "one": "1"}  # what stands on the diagonal at first


# -- the multiplier of a tree ----------------------------------------------------------------------
def multiplier(block: RepBlock, power: str) -> Kernel:
    """What the gradient of a block's kernel is multiplied by, as a kernel (O, I/G, *k) in float64.

    power: a key of `POWERS`, or "none" for 1 everywhere. In a branch with a convolution, that is
    what learns and the scales are constants; where there is none, the scale itself learns. A branch
    in which nothing learns adds nothing: it is followed exactly where nothing decays.
    Raises: ValueError for a tree that no multiplier can stand for.
    """
    if power == "none":
        whole = block.in_own_form(block.branches_kernel())
        ones = (torch.full_like(tensor, 1.0) for tensor in (whole.weight, whole.bias))
        return Kernel(*ones, whole.groups, whole.dilation)
    found = of_sum(block, POWERS[power])
    if found is None:
        raise unfit("nothing in it learns")
    return block.in_own_form(found)


def unfit(reason: str) -> ValueError:
    return ValueError(f"no single kernel can be trained as this block is: {reason}.")


def learns(piece: Piece) -> bool:
    """Whether anything in a piece is trained."""
    held = (value for module in piece.modules() for value in module._parameters.values())
    return any(value is not None and getattr(value, "requires_grad", True) for value in held)


def of_piece(piece: Piece, power: Callable) -> Kernel | None:
    """The multiplier of a piece; None where nothing in it learns."""
    if isinstance(piece, Norm) or getattr(piece, "post_norm", None) is not None:
        raise unfit(NORMED)
    if isinstance(piece, Sum):
        return of_sum(piece, power)
    if isinstance(piece, Chain):
        return of_chain(piece, power)
    if not learns(piece):
        return None
    if isinstance(piece, Convolution):
        if piece.offset or type(piece).effective is not Convolution.effective:
            raise unfit("a convolution's kernel is not what it stores")
        ones = torch.full_like(piece.weight, 1.0, dtype=torch.float64)
        bias = torch.full_like(ones.flatten(1)[:, 0], float(piece.bias is not None))
        return Kernel(ones, bias, piece.groups, piece.dilation)
    if isinstance(piece, Scale) and not isinstance(piece, Scalar):
        return kernels.identity(piece.out_channels, piece.dims, device=piece.weight.device)
    raise unfit(f"a number of {type(piece).__name__} reaches several of the kernel")


def of_sum(piece: Sum, power: Callable) -> Kernel | None:
    """Of branches side by side: the sum."""
    found, rate = [], getattr(piece, "rate", None)
    for name, branch in piece.branches.items():
        part = of_piece(branch, power)
        if part is not None and rate is not None and name != piece.main:
            part = kernels.scaled(part, power(rate.double()).expand(piece.out_channels))
        found += [part] if part is not None else []
    return reduce(add, found) if found else None


def of_chain(chain: Chain, power: Callable) -> Kernel | None:
    """Of pieces one after the other: of the one that learns, through the factors of the others.

    Where something else learns, scales are constants.
    """
    if any(isinstance(piece, Norm) for piece in chain):
        raise unfit(NORMED)
    learning = [piece for piece in chain if learns(piece)]
    if not learning:
        return None
    if len(learning) > 1:
        learning = [piece for piece in learning if not isinstance(piece, Scale)] or learning
    if len(learning) > 1:
        kinds = ", ".join(type(piece).__name__ for piece in learning)
        raise unfit(f"several pieces of one chain learn ({kinds})")
    found, before = None, []
    for piece in chain:
        if piece is learning[0]:
            found = of_piece(piece, power)
            for factor in before:
                found = kernels.composed(factor, found)
        else:
            factor = factors_of(piece, power)
            if found is None:
                before.insert(0, factor)
            else:
                found = kernels.scaled(found, factor.weight.flatten())
    return found


def factors_of(piece: Piece, power: Callable) -> Kernel:
    """What a piece that does not learn multiplies every channel with, raised to a power."""
    kernel = piece.kernel()
    if max(kernel.size) > 1 or kernel.groups < kernel.out_channels or kernel.weight.shape[1] > 1:
        raise unfit(f"next to {type(piece).__name__}, a number reaches several of the kernel")
    return Kernel(power(kernel.weight), torch.zeros_like(kernel.bias), kernel.groups)


# -- a network and its search network --------------------------------------------------------------
def addition_blocks(search: nn.Module) -> dict[str, RepBlock]:
    """Path -> the blocks of a search network that have scales.

    Raises: ValueError where there is none.
    """
    found = {
        path: block
        for path, block in outermost_blocks(search).items()
        if any(isinstance(module, Scale) for module in block.modules())
    }
    if not found:
        raise ValueError(
            f"search (={type(search).__name__}) has no block with scales: build it of csla blocks."
        )
    return found


def scales_of(search: nn.Module) -> dict[str, nn.Parameter]:
    """The scales of a search network, by their names in its state."""
    return {
        f"{path}.{name}.{part.stored}": part.parameter
        for path, block in addition_blocks(search).items()
        for name, part in block.named_modules()
        if isinstance(part, Scale)
    }


def pairs(model: nn.Module, search: nn.Module) -> dict[str, tuple[nn.Module, RepBlock]]:
    """Path -> a convolution of a network without branches, and the block of its search network that
    it is trained as.

    The networks have the same layers under the same names; where `search` has a block with scales,
    `model` has a layer of torch.nn or a block of one branch.
    Raises: ValueError that names a layer which does not fit.
    """
    found = {}
    for path, block in addition_blocks(search).items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"model has no layer {path!r}, which search has: they must be the same network "
                "but for its blocks."
            ) from None
        if isinstance(module, RepBlock):
            if module.side_branches:
                raise ValueError(
                    f"{path} of model has branches ({', '.join(module.branches)}): it must be a "
                    "plain convolution, or block convbn."
                )
            parts = [part for part in module.modules() if isinstance(part, Convolution)]
        else:
            parts = [module] if isinstance(module, CONVOLUTIONS) else []
        g = block.geometry
        shape = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
        kernel = tuple(parts[0].weight.shape) if len(parts) == 1 else None
        if kernel != shape:
            have = f"a kernel {kernel}" if kernel else "no single convolution"
            raise ValueError(
                f"{path} of model has {have}, the block of search one of {shape}: they must be the "
                "same network but for its blocks."
            )
        found[path] = parts[0], block
    return found


def multipliers(model: nn.Module, search: nn.Module, power: str) -> dict[nn.Parameter, Tensor]:
    """Kernel (or bias, where the branches have some) of `model` -> what its gradient is multiplied
    by, of its shape, on its device and in its dtype.

    power: a key of `POWERS`. Raises: ValueError as `pairs` and `multiplier`.
    """
    found = {}
    for path, (conv, block) in pairs(model, search).items():
        try:
            factors = multiplier(block, power)
        except ValueError as error:
            raise ValueError(f"{path} of search: {error}") from None
        found[conv.weight] = like(conv.weight, factors.weight)
        if conv.bias is not None and factors.bias.any():
            found[conv.bias] = like(conv.bias, factors.bias)
    return found


@torch.no_grad()
def like(parameter: nn.Parameter, factor: Tensor) -> Tensor:
    """A factor on the device, in the dtype and in the memory format of a parameter."""
    return torch.empty_like(parameter, requires_grad=False).copy_(factor)


@torch.no_grad()
def reinitialise(
    model: nn.Module,
    search: nn.Module,
    generator: torch.Generator | None = None,
    identity: str = "scale",
) -> None:
    """Give the kernels of a fresh network the values that its blocks would merge to at first.

    The main branch takes the network's own kernel, convolutions beside it are drawn anew as PyTorch
    does, the scales are those of `search`. identity: of `IDENTITY`, released "scale"; the paper's
    text says 1. Of several processes all call it, and get the kernels of the first one.
    Raises: ValueError for another value, and for a network that has been trained.
    """
    if identity not in IDENTITY:
        raise ValueError(f"identity (={identity!r}) must be one of {', '.join(IDENTITY)}.")
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked") and buffer.item():
            raise ValueError(
                f"model has been trained ({name} = {buffer.item()}): its kernels would be "
                "overwritten; take a fresh one."
            )
    for conv, block in pairs(model, search).values():
        block = copy.deepcopy(block).to(conv.weight.device, torch.float64)
        for branch in block.side_branches.values():
            for part in branch.modules():
                if isinstance(part, Convolution):
                    part.redraw("default", generator)
            if isinstance(branch, Scale) and identity == "one":
                branch.parameter.fill_(1)
        main = next(p for p in block.main_branch.modules() if isinstance(p, Convolution))
        main.weight.copy_(conv.weight)
        with_bias = None not in (main.bias, conv.bias)
        if with_bias:
            main.bias.copy_(conv.bias)
        kernel = block.in_own_form(block.branches_kernel())
        conv.weight.copy_(kernel.weight)
        if with_bias:
            conv.bias.copy_(kernel.bias)
    parallel.agree(model)


@torch.no_grad()
def set_constants(search: nn.Module, constants: str) -> None:
    """Let the scales of a search network be what `CONSTANTS` says.

    Raises: ValueError for another value.
    """
    if constants not in CONSTANTS:
        raise ValueError(f"constants (={constants!r}) must be one of {', '.join(CONSTANTS)}.")
    for scale in scales_of(search).values():
        if constants == "mean":
            scale.fill_(scale.mean())
        elif constants == "ones":
            scale.fill_(1)


@torch.no_grad()
def mean_scales(search: nn.Module) -> dict[str, float]:
    """Name of a scale -> the mean of its absolute values, to five digits: a line of a log."""
    found = scales_of(search)
    means = torch.stack([scale.abs().mean() for scale in found.values()]).tolist()
    return {name: float(f"{mean:.5g}") for name, mean in zip(found, means, strict=True)}


# -- scales in files -------------------------------------------------------------------------------
OWN = {"conv": "conv.1.weight", "1x1": "1x1.1.weight", "identity": "identity.weight"}  # of a CSLA
RELEASED = {"conv": "scale_conv", "1x1": "scale_1x1", "identity": "scale_identity"}
GHOST = {"conv": "cheap_operation.1.weight", "identity": "fusion_scale.weight"}
FILE_NAME = {f"branches.{OWN[name]}": f"{RELEASED[name]}.weight" for name in OWN}


def file_name(name: str) -> str:
    """The name of a scale in a file: for the blocks of the paper, that of the released code."""
    for own, released in FILE_NAME.items():
        if name.endswith(f".{own}"):
            return f"{name.removesuffix(f'.{own}').removesuffix('.block')}.{released}"
    return name


def save_scales(search: nn.Module, path: str | Path) -> None:
    """Write the scales of a search network, and nothing else of it: a flat dictionary of tensors,
    for RepOpt-VGG in the names of the released files."""
    scales = {file_name(name): scale.detach().cpu() for name, scale in scales_of(search).items()}
    path = Path(path)
    beside = path.with_name(f"{path.name}.part")  # a file that exists is whole at any moment
    torch.save(scales, beside)
    beside.replace(path)


@torch.no_grad()
def load_scales(search: nn.Module, source: str | Path | Mapping[str, Tensor]) -> None:
    """Give a search network the scales of a file, or of a state; nothing else of it is read.

    source: what `save_scales` wrote, a released file of scales, or a checkpoint of a search
    network, ours or a released one, of any number of classes.
    Raises: ValueError that lists what is missing, unexpected or of another shape; then nothing has
    changed.
    """
    state = with_ghosts_named(read_state(source), search)
    own = scales_of(search)
    theirs = {file_name(name): tensor for name, tensor in state.items() if is_scale(name, own)}
    expected = {file_name(name): scale for name, scale in own.items()}
    shapes = {
        name: f"{name} {tuple(theirs[name].shape)} instead of {tuple(scale.shape)}"
        for name, scale in expected.items()
        if name in theirs and theirs[name].shape != scale.shape
    }
    wrong = {
        "missing": [name for name in expected if name not in theirs],
        "unexpected": [name for name in theirs if name not in expected],
        "of another shape": list(shapes.values()),
    }
    if any(wrong.values()):
        lists = "; ".join(f"{what}: {several(names)}" for what, names in wrong.items() if names)
        raise ValueError(
            f"the file has not the scales of this network ({len(expected)} are expected); {lists}. "
            "Take the file of the same network and width, or search again."
        )
    for name, scale in expected.items():
        scale.copy_(theirs[name])


def means_in(source: str | Path | Mapping[str, Tensor]) -> dict[str, float]:
    """As `mean_scales`, of a file of scales, without the network that they are of."""
    named = {file_name(name): tensor for name, tensor in read_state(source).items()}
    ends = tuple(FILE_NAME.values())
    return {name: scale.abs().mean().item() for name, scale in named.items() if name.endswith(ends)}


def is_scale(name: str, own: Mapping[str, object]) -> bool:
    """Whether a name in a file is that of a scale, of this network or of another one."""
    suffixes = tuple(FILE_NAME.values()) + tuple(f".{suffix}" for suffix in FILE_NAME)
    return name in own or name.endswith(suffixes)


def several(names: list[str]) -> str:
    """The first ones, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def with_ghosts_named(state: Mapping[str, Tensor], search: nn.Module) -> Mapping[str, Tensor]:
    """A released file of RepOpt-GhostNet in our names: its modules in their order are our blocks.

    Raises: ValueError where there are more or fewer of them.
    """
    end = f".{GHOST['identity']}"
    modules = [name.removesuffix(end) for name in state if name.endswith(end)]
    if not modules:
        return state
    blocks = list(addition_blocks(search))
    if len(modules) != len(blocks):
        raise ValueError(
            f"the file has {len(modules)} modules with a {GHOST['identity']}, the network has "
            f"{len(blocks)} blocks with scales: take the file of the same network."
        )
    return {
        f"{path}.branches.{OWN[branch]}": state[f"{module}.{name}"]
        for path, module in zip(blocks, modules, strict=True)
        for branch, name in GHOST.items()
        if f"{module}.{name}" in state
    }


# -- the optimizers --------------------------------------------------------------------------------
class Multiplied(torch.optim.Optimizer):
    """What both optimizers have in common: multipliers that belong to one network, made of the
    scales of its search network at every start and never stored."""

    factors: dict[nn.Parameter, Tensor]
    scales: str  # SHA-256 of the scales that the factors are made of

    def adopt(self, model: nn.Module, search: nn.Module, power: str) -> None:
        parallel.agree(search)
        self.factors = multipliers(model, search, power)
        self.scales = digest(search, power)
        ours = {parameter for group in self.param_groups for parameter in group["params"]}
        if lost := len(self.factors.keys() - ours):
            raise ValueError(
                f"params leave out {lost} of the {len(self.factors)} kernels that have a "
                "multiplier: give the optimizer all parameters of the model."
            )
        self.register_step_pre_hook(multiply)

    def factor(self, parameter: nn.Parameter) -> Tensor | None:
        """Of one parameter, where it is now; None is 1."""
        factor = self.factors.get(parameter)
        if factor is not None and factor.device != parameter.device:
            factor = self.factors[parameter] = like(parameter, factor)
        return factor

    def state_dict(self) -> dict:
        return super().state_dict() | {"scales": self.scales}

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises: ValueError for a state that was saved with other scales."""
        if state_dict.get("scales", self.scales) != self.scales:
            raise ValueError(
                "the state was saved by a RepOptimizer with other scales, or another rule: make "
                "it anew with the same ones, and load then."
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "scales"})

    def __getstate__(self):
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: its multipliers belong to the "
            "parameters of one network. Save state_dict(), and make it anew with the same scales."
        )


@torch.no_grad()
def multiply(optimizer: Multiplied, arguments: tuple, options: dict) -> None:
    """Before a step: multiply the gradients, in place. Raises: ValueError for a closure."""
    if [*arguments[1:], *options.values()] not in ([], [None]):
        raise ValueError("closure must be None: call backward, then step().")
    for parameter in optimizer.factors:
        if parameter.grad is not None:
            parameter.grad.mul_(optimizer.factor(parameter))


def digest(search: nn.Module, power: str) -> str:
    """SHA-256 of the scales of a search network, and of the rule."""
    value = hashlib.sha256(power.encode())
    for name, scale in scales_of(search).items():
        value.update(f"{name} {tuple(scale.shape)}".encode())
        value.update(scale.detach().double().cpu().numpy().tobytes())
    return value.hexdigest()


class RepSGD(Multiplied, torch.optim.SGD):
    """SGD on the gradients times the sum of squares of the scales.

        search = build("repopt_vgg_b1", "csla", classes=100)      # trained, or:
        load_scales(search, "RepOpt-VGG-B1-scales.pth")
        model = build("repopt_vgg_b1", "convbn", classes=1000)
        reinitialise(model, search)
        optimizer = RepSGD(model, search, lr=0.1, momentum=0.9, nesterov=True, weight_decay=4e-5)

    params: parameters or groups; by default all of the model. options: of torch.optim.SGD. The
    gradients are left multiplied in `.grad`. With a gradient scaler, or several backward passes to
    a step, nothing changes; do not clip gradients, whose norm is not that of the block.
    Moving the model to another device is fine; copying it is not, the copy has other parameters.
    Raises: ValueError as `multipliers`.
    """

    def __init__(
        self,
        model: nn.Module,
        search: nn.Module,
        params: Iterable | None = None,
        lr: float = 1e-3,
        **options,
    ):
        super().__init__(model.parameters() if params is None else params, lr=lr, **options)
        self.adopt(model, search, "square")


class RepAdamW(Multiplied):
    """AdamW as the branches of a block with constant scales would be trained by it.

    The gradients times the sum of |scales| give the moments, and their ratio is multiplied by it
    once more: the first leaves the ratio alone but for eps, the second is what the branches add up
    to. Decay is decoupled. signed: the sum of the scales themselves, as released; the same where
    all are positive, another network where one is not.
    Arguments, and what else holds, as for `RepSGD` and torch.optim.AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        search: nn.Module,
        params: Iterable | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        signed: bool = False,
    ):
        params = model.parameters() if params is None else params
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adopt(model, search, "signed" if signed else "absolute")
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }
            # Loaded counts of steps then go where the parameters are, as for torch's AdamW.
            group["capturable"] = any(parameter.is_cuda for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step, by gradients that are multiplied already."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state, gradient = self.state[parameter], parameter.grad
                count, mean, square = state["step"], state["exp_avg"], state["exp_avg_sq"]
                count += 1
                mean.lerp_(gradient, 1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                correction = 1 - beta1 ** count.double(), 1 - beta2 ** count.double()
                ratio = mean / ((square / correction[1]).sqrt() + group["eps"])
                if (factor := self.factor(parameter)) is not None:
                    ratio *= factor
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.sub_(ratio * (lr / correction[0]))


OPTIMIZERS = {"sgd": RepSGD, "adamw": RepAdamW}
