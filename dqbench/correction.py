"""Noise-corrected sampling (PTQD, He et al. 2023, arXiv:2305.10657): any diffusers scheduler, its step corrected.

At each step the quantized prediction is e^ = (1 + k) e + D', D' with mean b by channel and standard deviation s. CNC
and BC replace e^ by (e^ - b) / (1 + k); VSC takes what D' adds to x_{t-1} out of the sampler's own noise.
A corrected scheduler's config holds the statistics, so it is saved and loaded like any other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dqbench import schedulers
from dqbench.config import Sampler
from dqbench.errors import UserError, check_choice
from dqbench.models import locate
from dqbench.noise_statistics import Statistics
from dqbench.schedulers import QuadDDIMScheduler, check_sampler

FORMS = ("paper", "official_master")
PREFIX = "Corrected"
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


@dataclass(frozen=True)
class Switches:
    """What is corrected: correlated noise, bias, variance schedule; form of the last: paper | official_master."""

    cnc: bool
    bc: bool
    vsc: bool
    form: str


@dataclass(frozen=True)
class StepNoise:
    """The noise model of one step, as the switches let it act."""

    k: float
    bias: Sequence[float]  # by channel, or one for all
    std: float

    def corrected(self, predicted: Tensor, channels: int) -> Tensor:
        """(e^ - b) / (1 + k) on the first `channels` channels: what follows is a learned variance. [B, C', ...]"""
        if not self.k and not any(self.bias):
            return predicted
        noise, rest = predicted[:, :channels], predicted[:, channels:]
        bias = torch.tensor(self.bias, device=noise.device, dtype=noise.dtype)
        noise = (noise - bias.reshape(-1, *[1] * (noise.ndim - 2))) / (1 + self.k)
        return torch.cat([noise, rest], dim=1) if rest.shape[1] else noise

    @property
    def variance(self) -> float:
        """Of D' in the corrected prediction."""
        return (self.std / (1 + self.k)) ** 2


class CorrectedStep:
    """Mixed into a diffusers scheduler; `config.correction` holds the statistics and the switches."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """The base class's, from the first position; UserError where the statistics are those of another schedule."""
        super().set_timesteps(*args, **kwargs)
        if "correction" not in self.config:  # some classes call this while they are constructed
            return
        known, wanted = self.config.correction["timesteps"], [float(t) for t in self.timesteps.tolist()]
        if list(known) != wanted:
            raise UserError(
                f"the noise statistics are those of another sampler, {span(known)}; this one takes {span(wanted)}"
            )
        self._call = -1

    def noise_at(self, timestep: float) -> StepNoise:
        """The noise model of the next step, which must be at `timestep`, and move there.

        A pipeline may start further on in the schedule, so the next position with that timestep counts. One that is
        nowhere in it has k = 0 and std = 0, and the bias of the position it stands at (the authors' release).
        """
        own, start = self.config.correction, self._call + 1
        steps = own["timesteps"]
        found = next((i for i in [*range(start, len(steps)), *range(start)] if steps[i] == timestep), None)
        self._call = min(start, len(steps) - 1) if found is None else found
        i, known = self._call, found is not None
        bias = own["bias"][i] if own["bc"] else (0.0,)
        return StepNoise(max(own["k"][i], 0) * (own["cnc"] and known), bias, own["std"][i] * known)

    def calibrated(self, model_output: Tensor, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the base class's step under VSC."""
        return kwargs


class CorrectedDDIMStep(CorrectedStep):
    """VSC of DDIM: sigma'^2 = sigma^2 - C^2 (s / (1 + k))^2, at least 0.

    C = sqrt(1 - a_p - sigma^2) - sqrt(a_p (1 - a_t) / a_t). paper: the direction towards x_t keeps sigma, the noise
    takes sigma'; official_master (the authors' release): both take sigma'. Where x_0 is clipped (clip_sample), which
    the paper's models do not do, the error does not pass through it: there C is its first term alone.
    """

    def calibrated(self, model_output: Tensor, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        """eta and variance_noise that make diffusers' step add sigma' z."""
        eta = kwargs.pop("eta", 0.0)
        generator, noise = kwargs.pop("generator", None), kwargs.pop("variance_noise", None)
        a, a_prev = alphas(self, int(timestep), self._call)
        variance = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        if eta == 0 or variance <= 0:
            return kwargs | {"eta": eta, "generator": generator, "variance_noise": noise}
        if noise is None:
            like = {"device": model_output.device, "dtype": model_output.dtype}
            noise = randn_tensor(model_output.shape, generator=generator, **like)
        sigma2 = eta**2 * variance
        direction, through_x0 = max(1 - a_prev - sigma2, 0) ** 0.5, (a_prev * (1 - a) / a) ** 0.5
        if self.config.correction["form"] == "paper":
            slope = direction - through_x0 * self._free
            kept = (1 - slope**2 * self._step_noise.variance / sigma2).clamp(min=0).sqrt()  # sigma' / sigma
            return kwargs | {"eta": eta, "variance_noise": noise * kept}
        kept = max(1 - (direction - through_x0) ** 2 * self._step_noise.variance / sigma2, 0) ** 0.5
        return kwargs | {"eta": eta * kept, "variance_noise": noise}


class CorrectedDDPMStep(CorrectedStep):
    """VSC of DDPM: sigma'^2 = sigma_t^2 - beta_t^2 s^2 / (alpha_t (1 - abar_t) (1 + k)^2), at least 0 (Eq. 10-12).

    alpha_t and beta_t are those of the respaced chain. No other coefficient has sigma in it: both forms are the same.
    Where x_0 is clipped (clip_sample), the error does not reach the mean: there sigma_t stays.
    """

    def _get_variance(self, t: int, *args: Any, **kwargs: Any) -> Tensor:
        value = super()._get_variance(t, *args, **kwargs)
        if not self.config.correction["vsc"]:
            return value
        a, a_prev = alphas(self, int(t), self._call)
        added = (1 - a / a_prev) ** 2 / (a / a_prev * (1 - a)) * self._step_noise.variance * self._free
        if self.config.variance_type == "fixed_small_log":  # there it is the standard deviation
            return (value**2 - added).clamp(min=0) ** 0.5
        return (value - added).clamp(min=0)


def alphas(scheduler: SchedulerMixin, t: int, position: int) -> tuple[float, float]:
    """abar at t and where the step goes, of a DDIM or DDPM scheduler; past the last step, what its config says."""
    if isinstance(scheduler, QuadDDIMScheduler):
        later = scheduler.timesteps[position + 1 :]
        previous = int(later[0]) if len(later) else -1
    elif isinstance(scheduler, DDIMScheduler):
        previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    else:
        previous = int(scheduler.previous_timestep(t))
    last = scheduler.final_alpha_cumprod if isinstance(scheduler, DDIMScheduler) else scheduler.one
    return float(scheduler.alphas_cumprod[t]), float(scheduler.alphas_cumprod[previous] if previous >= 0 else last)


def unclipped(scheduler: Any, noise: Tensor, sample: Tensor, t: int) -> Tensor:
    """1 where the predicted x_0 stays as it is, 0 where the scheduler clips it; [B, C, ...], or [] without clipping."""
    if not scheduler.config.clip_sample:
        return noise.new_ones(())
    a, _ = alphas(scheduler, t, scheduler._call)
    x_0 = (sample - (1 - a) ** 0.5 * noise) / a**0.5
    return (x_0.abs() < scheduler.config.clip_sample_range).to(noise.dtype)


def span(timesteps: Sequence[float]) -> str:
    """A schedule in few words."""
    return f"{len(timesteps)} steps from t={timesteps[0]:g} to t={timesteps[-1]:g}"


def correct(
    scheduler: SchedulerMixin, statistics: Statistics, switches: Switches, sampler: Sampler | None = None
) -> SchedulerMixin:
    """`scheduler` with its steps corrected; UserError where a switch has no meaning for it.

    sampler: the one that the statistics were collected under; its eta and guidance are then asked for.
    """
    check_correction(scheduler, switches)
    lists = {name: getattr(statistics, name).tolist() for name in ("timesteps", "k", "bias", "std")}
    own = {} if sampler is None else {"eta": sampler.eta, "guidance": sampler.guidance}
    added = {"corrected": dotted_name(type(scheduler)), "correction": {**lists, **asdict(switches), **own}}
    return corrected_class(type(scheduler)).from_config(scheduler.config, **added)


def dotted_name(cls: type) -> str:
    """What locate() takes."""
    return f"{cls.__module__}.{cls.__qualname__}"


def check_correction(scheduler: SchedulerMixin, switches: Switches) -> None:
    """Raise UserError, one line, where the corrections have no meaning for a scheduler of diffusers."""
    check_choice("method.form", switches.form, FORMS)
    predicts = scheduler.config.get("prediction_type", "a velocity")
    if predicts != "epsilon":
        name = type(scheduler).__name__
        raise UserError(f"PTQD corrects the predicted noise; under {name} this model predicts {predicts}, not epsilon")
    if switches.vsc and type(scheduler) not in (DDIMScheduler, QuadDDIMScheduler, DDPMScheduler):
        given = f"method.vsc=true has a formula for DDIM and DDPM alone, not for {type(scheduler).__name__}"
        raise UserError(f"{given}; allowed: method.vsc=false, which leaves method.cnc and method.bc")
    if switches.vsc and scheduler.config.thresholding:
        raise UserError(
            "method.vsc=true has no formula for sampler.kwargs.thresholding=true; allowed: method.vsc=false"
        )
    if switches.vsc and isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type not in FIXED_VARIANCES:
        given = f"variance_type={scheduler.config.variance_type}"
        raise UserError(f"method.vsc=true has no formula for DDPM with {given}; allowed: {', '.join(FIXED_VARIANCES)}")


@functools.cache
def corrected_class(base: type) -> type:
    """The scheduler class `base` with corrected steps; found by its name in this module, too."""
    kinds = ((DDIMScheduler, CorrectedDDIMStep), (DDPMScheduler, CorrectedDDPMStep), (object, CorrectedStep))
    kind = next(own for parent, own in kinds if issubclass(base, parent))

    def __init__(self: Any, *args: Any, corrected: str, correction: dict[str, Any], **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.register_to_config(corrected=corrected, correction=correction)

    @functools.wraps(base.step)  # pipelines look at the signature for what they may hand on
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        check_sampler(self, {"eta": kwargs["eta"]} if "eta" in kwargs else {})
        self._step_noise = self.noise_at(float(timestep))
        model_output = self._step_noise.corrected(model_output, sample.shape[1])
        if self.config.correction["vsc"]:
            self._free = unclipped(self, model_output[:, : sample.shape[1]], sample, int(timestep))
            kwargs = self.calibrated(model_output, float(timestep), kwargs)
        return base.step(self, model_output, timestep, sample, *args, **kwargs)

    __init__.__signature__ = joint_signature(base.__init__, __init__)  # from_config() looks at it
    content = {"__module__": __name__, "__doc__": base.__doc__, "__init__": __init__, "step": step}
    return type(f"{PREFIX}{base.__name__}", (kind, base), content)


def joint_signature(first: Callable, second: Callable) -> inspect.Signature:
    """The first's parameters, then the keyword-only ones of the second."""
    own = inspect.signature(second).parameters.values()
    added = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    return inspect.Signature([*inspect.signature(first).parameters.values(), *added])


def from_saved(config: dict[str, Any]) -> SchedulerMixin:
    """The corrected scheduler that a scheduler_config.json describes."""
    return corrected_class(locate(config["corrected"])).from_config(config)


def __getattr__(name: str) -> type:
    """CorrectedXScheduler for each XScheduler of ours or of diffusers, which looks classes up by module and name."""
    own = name.removeprefix(PREFIX)
    base = getattr(schedulers, own, None) or getattr(diffusers, own, None)
    if own == name or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return corrected_class(base)
