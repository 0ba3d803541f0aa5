"""diffusers schedulers, configured from a sampler; quadratic spacing."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    SchedulerMixin,  # noqa: F401 (diffusers looks for it in the module of a scheduler that it loads)
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dqbench.config import Sampler
from dqbench.errors import UserError
from dqbench.quant.functional import fake_quantize, qrange


class QuadDDIMScheduler(DDIMScheduler):
    """DDIM with quadratic spacing: t_i = int(linspace(0, sqrt(0.8 T), S)[i]^2), the CIFAR-10 setting of DDIM's release.

    A trajectory over chosen time steps is DDIM on the chain respaced to them: within a step, alphas_cumprod is replaced
    by its values at t_i, and the base class steps through positions with stride 1. Small t_i repeat; a step from t to
    the same t leaves the sample as it is.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the descending t_i and restart the position."""
        train_steps = self.config.num_train_timesteps
        ascending = (np.linspace(0, np.sqrt(0.8 * train_steps), num_inference_steps) ** 2).astype(np.int64)
        self._respaced = self.alphas_cumprod[torch.from_numpy(ascending).to(self.alphas_cumprod.device)]
        self.num_inference_steps = train_steps  # makes the base class's stride 1
        self.timesteps = torch.from_numpy(ascending[::-1].copy()).to(device)
        self._position = num_inference_steps - 1

    @functools.wraps(DDIMScheduler.step)  # pipelines look at the signature for what they may hand on
    def step(self, model_output: Tensor, timestep: int, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base class's step from the current position to the one before it."""
        full, self.alphas_cumprod = self.alphas_cumprod, self._respaced
        try:
            return super().step(model_output, self._position, sample, *args, **kwargs)
        finally:
            self.alphas_cumprod = full
            self._position -= 1


def make_scheduler(config: dict[str, Any], sampler: Sampler) -> Any:
    """The sampler's scheduler on the noise schedule of `config` (a diffusers scheduler config).

    Raises UserError for an unknown class, an eta or a spacing that the class does not take.
    """
    cls = scheduler_class(sampler)
    settings = dict(sampler.kwargs)
    if sampler.spacing not in (None, "quad"):
        settings["timestep_spacing"] = sampler.spacing
    accepted = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in settings:
        if name not in accepted:
            where = "spacing" if name == "timestep_spacing" else f"kwargs.{name}"
            raise UserError(f"sampler.{where} has no meaning for {sampler.scheduler}; it takes: {', '.join(accepted)}")
    train_steps = config.get("num_train_timesteps", sampler.steps)
    if sampler.steps > train_steps:
        line = f"sampler.steps={sampler.steps} is more than the model was trained with; allowed: 1 to {train_steps}"
        raise UserError(line)
    return cls.from_config(config, **settings)


def scheduler_class(sampler: Sampler) -> type:
    """The class named by `sampler.scheduler`: of diffusers, or a dotted name."""
    if sampler.spacing == "quad":
        if sampler.scheduler != "DDIMScheduler":
            raise UserError(f"sampler.spacing=quad is defined for DDIMScheduler, not for {sampler.scheduler}")
        return QuadDDIMScheduler
    module, _, name = sampler.scheduler.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module) if module else diffusers, name)
    except (ImportError, AttributeError) as error:
        known = "DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler"
        raise UserError(
            f"sampler.scheduler={sampler.scheduler} is unknown; a diffusers class such as {known}"
        ) from error
    if sampler.eta > 0 and not issubclass(cls, DDIMScheduler):
        raise UserError(f"sampler.eta={sampler.eta} has no meaning for {sampler.scheduler}; allowed: 0 (eta is DDIM's)")
    return cls


def check_sampler(scheduler: Any, settings: Mapping[str, float]) -> None:
    """Raise UserError where a corrected scheduler's statistics are those of another eta or guidance."""
    known = scheduler.config.get("correction") or {}
    for key, value in settings.items():
        if known.get(key, value) != value:
            raise UserError(f"the noise statistics are those of sampler.{key}={known[key]}, not of {value}")


OPERATION_BITS = 8  # PTQ4DM, Table 1


class QuantizedOperations:
    """Mixed into a DDIM or DDPM scheduler: x_{t-1} = mu + sigma z with fake-quantized mu, sigma or x_{t-1}.

    `config.operations` names what is quantized, symmetric and per tensor; `config.bound` is the range of mu and x. The
    range of sigma is its largest value over the steps, for learned variances their upper limit, sqrt(beta_t). The paper
    gives no ranges and its release has no code for them.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """The base class's; the range of sigma is found anew."""
        super().set_timesteps(*args, **kwargs)
        self._largest: dict[float, float] = {}

    def quantized_step(self, step: Callable, model_output: Tensor, timestep: int, sample: Tensor, **kwargs: Any) -> Any:
        """The base class's step, taken apart into mu and sigma z, and put together from quantized parts."""
        generator, eta = kwargs.pop("generator", None), kwargs.get("eta", 0.0)
        generators = generator if isinstance(generator, list) else [generator or fresh_generator()]
        twins = [one.clone_state() for one in generators]
        own, theirs = (many if len(many) > 1 else many[0] for many in (generators, twins))
        result = step(model_output, timestep, sample, generator=own, **kwargs)
        z = randn_tensor(sample.shape, generator=theirs, device=sample.device, dtype=sample.dtype)
        sigma = torch.as_tensor(self._sigma(timestep, eta, model_output), device=sample.device).to(sample.dtype)
        mu = self._on("mu", result.prev_sample - sigma * z, self.config.bound)
        sigma = self._on("sigma", sigma, self._largest_sigma(eta))
        result.prev_sample = self._on("x", mu + sigma * z, self.config.bound)
        return result

    def _sigma(self, timestep: int, eta: float, model_output: Tensor | None = None) -> Tensor | float:
        """The standard deviation that the base class's step multiplies z by."""
        if isinstance(self, DDIMScheduler):
            stride = self.config.num_train_timesteps // self.num_inference_steps
            return float(eta * self._get_variance(timestep, timestep - stride) ** 0.5)
        if timestep == 0:
            return 0.0
        if model_output is None or not self.config.variance_type.startswith("learned"):
            kind = self.config.variance_type.replace("learned_range", "fixed_large").replace("learned", "fixed_large")
            found = self._get_variance(timestep, variance_type=kind)
            return float(found if kind == "fixed_small_log" else found**0.5)
        predicted = model_output.chunk(2, dim=1)[1]
        found = self._get_variance(timestep, predicted_variance=predicted)
        return (found / 2).exp() if self.config.variance_type == "learned_range" else found.sqrt()

    def _largest_sigma(self, eta: float) -> float:
        if eta not in self._largest:
            self._largest[eta] = max(self._sigma(int(t), eta) for t in self.timesteps)
        return self._largest[eta]

    def _on(self, operation: str, x: Tensor, bound: float) -> Tensor:
        if operation not in self.config.operations:
            return x
        qmin, qmax = qrange(OPERATION_BITS, symmetric=True)
        scale = torch.tensor(max(bound / qmax, 1e-8), device=x.device, dtype=x.dtype)
        return fake_quantize(x, scale, torch.zeros_like(scale), qmin, qmax)


def fresh_generator() -> torch.Generator:
    """A generator seeded by the global one, for a caller that gives none."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


class QuantizedDDIMScheduler(QuantizedOperations, DDIMScheduler):
    """DDIM with quantized operations."""

    @functools.wraps(DDIMScheduler.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self.quantized_step(super().step, *args, **kwargs)


class QuantizedDDPMScheduler(QuantizedOperations, DDPMScheduler):
    """DDPM with quantized operations."""

    @functools.wraps(DDPMScheduler.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self.quantized_step(super().step, *args, **kwargs)


def quantize_operations(scheduler: Any, operations: list[str], bound: float) -> Any:
    """`scheduler` with mu, sigma or x quantized to 8 bit (PTQ4DM, Table 1); `bound`: the largest |x_t| to represent.

    Raises UserError for a scheduler that is not exactly DDIM's or DDPM's.
    """
    twins = {DDIMScheduler: QuantizedDDIMScheduler, DDPMScheduler: QuantizedDDPMScheduler}
    if type(scheduler) not in twins:
        raise UserError(
            f"method.quantize_mu/sigma/x: defined for DDIM and DDPM schedulers, not {type(scheduler).__name__}"
        )
    twin = twins[type(scheduler)].from_config(scheduler.config)
    twin.register_to_config(operations=operations, bound=bound)
    return twin
