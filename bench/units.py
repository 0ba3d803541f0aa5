"""Networks, units and recorded calls to measure: ours prepared as in a run, the plain one from its grids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet, named_generator
from dqbench.config import Bits, Model, Recon, compose
from dqbench.models import denoiser, load
from dqbench.quant.attach import (
    calibrating,
    find_units,
    freeze,
    prepare,
    quantize_attention,
    quantize_inputs,
)
from dqbench.quant.capture import Recorder
from dqbench.quant.plan import select, split
from dqbench.quant.quantizers import ActRule, SplitQuantizer, WeightRule
from dqbench.quant.reconstruct import Job
from dqbench.quant.rows import Call, Stored
from dqbench.quant.shortcuts import skip_splits
from tests.reference import module_swap as plain

BITS = Bits(weight=4, act=8, attention=8, softmax=8)
WEIGHT = WeightRule("per_channel", None, "minmax", False, False)
ACT = ActRule("minmax", False, "first", 0.0, False, False)
CPU = torch.device("cpu")


@dataclass
class Network:
    """A denoiser and the patterns of its family."""

    unet: nn.Module
    units: Sequence[str]
    shortcuts: Sequence[str]

    def calibration(self, rows: int) -> CalibrationSet:
        """Normal noise at random time steps: [rows, C, H, W]."""
        config, generator = self.unet.config, torch.Generator().manual_seed(0)
        shape = (rows, config.in_channels, config.sample_size, config.sample_size)
        timestep = torch.randint(0, 1000, (rows,), generator=generator)
        return CalibrationSet.from_tensors(torch.randn(shape, generator=generator), timestep)


def network(name: str) -> Network:
    """digits_ddpm with its trained weights; ddpm_cifar10 (35.7 M parameters) from its architecture, random weights."""
    model: Model = OmegaConf.to_object(compose([f"model={name}"]).model)
    unet = denoiser(load(model)) if model.path.startswith("zoo:") else random_unet(model)
    return Network(freeze(unet), model.units, model.shortcuts)


def random_unet(model: Model) -> nn.Module:
    """The network of model.architecture with weights as diffusers initialises them, seed 0."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(**{key: value for key, value in model.architecture.items() if not key.startswith("_")})


@dataclass
class Case:
    """One unit: the job that ours runs, its recorded full-precision call, the fp32 unit."""

    job: Job
    name: str
    call: Call
    teacher: nn.Module

    @property
    def student(self) -> nn.Module:
        return self.job.student.get_submodule(self.name)

    def layers(self) -> dict[str, str]:
        """Name inside the unit ("": the unit itself) -> name in the network."""
        return {member.removeprefix(self.name).lstrip("."): member for member in self.job.units[self.name]}

    def swapped(self) -> tuple[nn.Module, dict[str, plain.SwappedLayer]]:
        """The plain unit on the same grids, rounding as at the start."""
        specs = {}
        for inner, name in self.layers().items():
            item = self.job.layers[name]
            specs[inner] = plain.LayerSpec(item.weight, item.grid.scale, item.grid.zero_point, BITS.weight)
        return plain.swap(self.teacher, specs)

    def swapped_with_steps(self) -> tuple[nn.Module, list[tuple[nn.Module, plain.Step]]]:
        """The plain unit with the student's rounded weights and steps, and the pairs (our quantizer, its step)."""
        unit, layers = self.swapped()
        pairs: list[tuple[nn.Module, plain.Step]] = []
        for inner, name in self.layers().items():
            rounded, layer = self.job.layers[name].layer, layers[inner]
            middle = (torch.floor(layer.weight / layer.scale) + 0.5) * layer.scale
            layer.alpha.data, layer.hard = torch.where(rounded.weight > middle, 1.0, -1.0), True
            layer.act = plain_steps(rounded.act_quantizer, pairs)
        quantizers = getattr(getattr(self.student, "processor", None), "quantizers", None)
        if quantizers is not None:
            unit.set_processor(plain.AttentionSteps({part: plain_steps(q, pairs) for part, q in quantizers.items()}))
        return unit, pairs

    def plain_batches(self, iters: int) -> Iterator[tuple]:
        """(args, kwargs, target) of the rows that ours draws too, gathered from tensors in RAM."""
        arrays = {name: torch.from_numpy(np.array(array)) for name, array in self.call.rows.arrays.items()}
        generator = named_generator(f"reconstruct/{self.name}", self.job.calib.seed)
        for _ in range(iters):
            rows = torch.randperm(len(self.job.calib), generator=generator)[: self.job.recon.batch_size]
            args = [pick(item, arrays, rows) for item in self.call.args]
            kwargs = {key: pick(item, arrays, rows) for key, item in self.call.kwargs.items()}
            yield args, kwargs, arrays["output"][rows]


def pick(item: Any, arrays: dict[str, Tensor], rows: Tensor) -> Any:
    """The chosen rows of a stored argument; a constant as it is."""
    return arrays[item.name][rows] if isinstance(item, Stored) else item


def plain_steps(quantizer: nn.Module, pairs: list[tuple[nn.Module, plain.Step]]) -> nn.Module:
    """The plain counterpart of an activation quantizer; every (ours, plain) is added to `pairs`."""
    if isinstance(quantizer, SplitQuantizer):
        halves = (plain_steps(half, pairs) for half in (quantizer.first, quantizer.second))
        return plain.SplitStep(quantizer.split, *halves)
    step = plain.Step(quantizer.scale, quantizer.zero_point, (quantizer.qmin, quantizer.qmax))
    pairs.append((quantizer, step))
    return step


def cases(net: Network, names: Sequence[str], recon: Recon, rows: int, folder: Path) -> Iterator[Case]:
    """The named units (none: all), weights prepared, calls recorded on `rows` inputs."""
    calib, student = net.calibration(rows), copy.deepcopy(net.unet)
    splits = skip_splits(student, calib.rows([0]), net.shortcuts)
    plan = select(student, BITS, [], {})
    inside = {key: plan[key] for key in plan if any(f"{key}.".startswith(f"{name}.") for name in names or [key])}
    layers = prepare(student, split(inside, list(splits)), WEIGHT, splits)
    job = Job(student, net.unet, find_units(student, net.units, layers), layers, calib, recon, [])
    teacher = Recorder(net.unet, calib, folder / "outputs", replay=False)
    for name in names or job.units:
        call = teacher.inputs(name, folder / name, with_output=True)
        yield Case(job, name, call, net.unet.get_submodule(name))
        call.rows.drop()


@torch.no_grad()
def quantize_activations(case: Case) -> None:
    """Quantize the activations of a case's unit, ranges from one mini-batch of its recorded call."""
    quantize_inputs({name: case.job.layers[name] for name in case.job.units[case.name]}, signed=False)
    quantize_attention(case.student, BITS, signed=False, signed_softmax=False)
    with calibrating(case.student, ACT):
        args, kwargs = case.call.batch(slice(0, case.job.recon.batch_size), CPU)
        case.student(*args, **kwargs)
