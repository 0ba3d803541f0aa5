"""Activation parameters that change from one sampling step to the next, chosen by the timestep of a forward pass.

    quantize_inputs(layers, signed=False)                       # plain quantizers, as everywhere
    clock = per_step(student, timesteps, n_bits=None)           # now each has one scale and zero_point per timestep
    calibrate_steps(student, calib, rule)                       # running.py: from each step's own rows, in one pass
    student(sample, t)                                          # from here on the forward itself turns the clock

`n_bits` may be a list with one width per timestep; `groups` of steps may share parameters (a range of steps at one
width). `held(clock, k)` makes the clock stand at position k whatever timestep passes. A saved network needs
`timesteps_of(model)` in its description, and `attach_clock(model, timesteps)` after its quantizers have been rebuilt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dqbench.errors import UserError
from dqbench.quant.functional import fake_quantize, qrange
from dqbench.quant.plan import matches
from dqbench.quant.quantizers import ActQuantizer

CHILD = "step_clock"


class StepClock(nn.Module):
    """The sampler's distinct timesteps, noisiest first, and where among them the current forward pass is.

    index: [1] for index_select, or [B] where the rows of a batch have timesteps of their own. It has no state to save:
    the timesteps are Python numbers, which a change of dtype leaves alone.
    """

    def __init__(self, timesteps: Iterable[float], argument: int) -> None:
        super().__init__()
        self.timesteps = tuple(sorted({float(t) for t in timesteps}, reverse=True))
        self.argument = argument  # position of `timestep` among the denoiser's arguments
        self.positions = {t: k for k, t in enumerate(self.timesteps)}
        self.register_buffer("steps", torch.arange(len(self.timesteps)), persistent=False)
        self.standing = False
        self.turn([0])

    def turn(self, positions: Sequence[int]) -> None:
        """Point at one position for all rows, or at one for each row."""
        first = positions[0]
        self.position = first if len(set(positions)) == 1 else None
        self.index = self.steps[first : first + 1] if self.position is not None else self.steps[list(positions)]

    def only(self) -> int:
        """The position of all rows."""
        if self.position is None:
            raise RuntimeError("per-step ranges are collected one step at a time; see held()")
        return self.position

    def find(self, timestep: float) -> int:
        """The position of a timestep; UserError for one that is not in the table."""
        if timestep not in self.positions:
            known = f"{len(self.timesteps)} from {self.timesteps[0]:g} to {self.timesteps[-1]:g}"
            raise UserError(f"timestep {timestep:g}: these are the parameters of another sampler, they know {known}")
        return self.positions[timestep]

    @torch.compiler.disable
    def follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Turn to the timestep, a number or a tensor [] or [B], that the denoiser is called with."""
        if not self.standing:
            timestep = args[self.argument] if len(args) > self.argument else kwargs["timestep"]
            self.turn([self.find(t) for t in torch.as_tensor(timestep).reshape(-1).tolist()])


def attach_clock(denoiser: nn.Module, timesteps: Iterable[float]) -> StepClock:
    """Give the denoiser a clock that its forward turns, and show it to everything below that goes by steps."""
    clock = StepClock(timesteps, list(inspect.signature(type(denoiser).forward).parameters).index("timestep") - 1)
    previous = clock_of(denoiser)
    if previous is not None and previous.timesteps != clock.timesteps:
        raise UserError("the denoiser has per-step parameters of another sampler already")
    if previous is None:
        denoiser.add_module(CHILD, clock.to(next(denoiser.parameters()).device))
        denoiser.register_forward_pre_hook(_follow, with_kwargs=True, prepend=True)
    for module in denoiser.modules():
        if hasattr(module, "clock"):
            object.__setattr__(module, "clock", clock_of(denoiser))  # not as a child: it has one parent, the denoiser
    return clock_of(denoiser)


def _follow(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    clock_of(denoiser).follow(args, kwargs)


def clock_of(denoiser: nn.Module) -> StepClock | None:
    """The denoiser's clock; None where nothing goes by steps."""
    return getattr(denoiser, CHILD, None)


def timesteps_of(denoiser: nn.Module) -> list[float]:
    """What attach_clock() needs to make the denoiser's clock again; empty where it has none."""
    clock = clock_of(denoiser)
    return [] if clock is None else list(clock.timesteps)


@contextmanager
def held(clock: StepClock, position: int) -> Iterator[None]:
    """Inside: the clock stands at `position`."""
    clock.standing = True
    clock.turn([position])
    try:
        yield
    finally:
        clock.standing = False


class StepQuantizer(ActQuantizer):
    """An ActQuantizer with one scale and zero_point per timestep (buffers, shape [S]); widths [S] may differ.

    n_bits, qmin and qmax are those of all steps, or of the step that is being calibrated.
    """

    def __init__(self, widths: Sequence[int], signed: bool) -> None:
        super().__init__(widths[0], signed)
        self.widths = tuple(widths)
        self.bounds = tuple(qrange(width, signed) for width in widths)
        self.uniform = len(set(widths)) == 1
        self.scale, self.zero_point = torch.ones(len(widths)), torch.zeros(len(widths))
        self.clock: StepClock | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, ...], or [B k, ...] with k consecutive entries for each row. While observed, the range follows x."""
        if self.observer is not None:
            self.write([self.clock.only()], *self.observer.observe(x))
            if self.observer.rule.through:
                return x
        return fake_quantize(x, *self.parameters(x))

    def write(self, positions: Sequence[int], scale: Tensor, zero_point: Tensor) -> None:
        """Let these positions have these parameters, shape []."""
        self.scale[list(positions)], self.zero_point[list(positions)] = scale, zero_point

    def calibrates(self, position: int) -> None:
        """Let n_bits, qmin and qmax be those of a position, for the observer."""
        self.n_bits, (self.qmin, self.qmax) = self.widths[position], self.bounds[position]

    def parameters(self, x: Tensor) -> tuple[Tensor, Tensor, Any, Any]:
        """(scale, zero_point, qmin, qmax) where the clock points, broadcastable to x."""
        index = self.clock.index
        scale, zero_point = self.scale.index_select(0, index), self.zero_point.index_select(0, index)
        if len(index) == 1:
            return scale, zero_point, *((self.qmin, self.qmax) if self.uniform else self.bounds[self.clock.position])
        bounds = scale.new_tensor(self.bounds).index_select(0, index)
        return tuple(per_row(values, x) for values in (scale, zero_point, *bounds.unbind(1)))

    def spec(self) -> dict[str, Any]:
        """What rebuilds this module before its buffers are loaded."""
        return {"kind": "per_step", "n_bits": list(self.widths), "signed": self.signed}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> StepQuantizer:
        """The module that spec() described."""
        return cls(spec["n_bits"], spec["signed"])

    def extra_repr(self) -> str:
        return f"steps={len(self.widths)}, {super().extra_repr()}"


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """values [B] as a tensor that broadcasts to x [B k, ...]."""
    return values.repeat_interleave(len(x) // len(values)).reshape(-1, *[1] * (x.ndim - 1))


def per_step(
    student: nn.Module,
    timesteps: Iterable[float],
    n_bits: int | Sequence[int] | None = None,
    names: Sequence[str] = ("*",),
) -> StepClock:
    """Turn the activation quantizers of layers (or attentions) that match `names` into StepQuantizers.

    n_bits: their width, one width per distinct timestep (noisiest first), or None: the width each has. Each step starts
    with the parameters that all had.
    """
    count = len({float(t) for t in timesteps})
    if isinstance(n_bits, Sequence) and len(n_bits) != count:
        raise UserError(f"{len(n_bits)} activation widths for {count} sampler steps; allowed: one for each")
    for name, module in list(student.named_modules()):
        if type(module) is ActQuantizer and matches(site_of(name), names):
            widths = [n_bits or module.n_bits] * count if not isinstance(n_bits, Sequence) else n_bits
            quantizer = StepQuantizer(widths, module.signed).to(module.scale.device)
            quantizer.write(range(count), module.scale, module.zero_point)
            student.set_submodule(name, quantizer)
    return attach_clock(student, timesteps)


def site_of(name: str) -> str:
    """The layer or attention module that the quantizer `name` belongs to."""
    return name.split(".act_quantizer")[0].split(".processor.")[0]


def step_quantizers(model: nn.Module) -> list[StepQuantizer]:
    """All per-step quantizers below `model`."""
    return [module for module in model.modules() if isinstance(module, StepQuantizer)]
