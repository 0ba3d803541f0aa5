"""Networks, units and recorded calls that the benchmark runs: ours prepared as in a run, the plain one from its grids."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits, Recon, compose
from dqbench.quant.attach import calibrating, find_units, freeze, prepare, quantize_attention, quantize_inputs, skip_splits
from dqbench.quant.capture import Call, Recorder, first_tensor
from dqbench.quant.plan import select, split
from dqbench.quant.quantizers import ActQuantizer, ActRule, SplitQuantizer, WeightRule
from dqbench.quant.reconstruct import Job
from tests.reference import module_swap as plain

BITS = Bits(weight=4, act=8, attention=8, softmax=8)
WEIGHT = WeightRule("per_channel", None, "mse", False, False)
ACT = ActRule("minmax", False, "first", 0.0, False, False)


@dataclass
class Network:
    """A denoiser and the patterns of its family."""

    name: str
    unet: nn.Module
    units: list[str]
    shortcuts: list[str]

    def calibration(self, rows: int) -> CalibrationSet:
        """Normal noise at random time steps: [rows, C, H, W]."""
        config, generator = self.unet.config, torch.Generator().manual_seed(0)
        shape = (rows, config.in_channels, config.sample_size, config.sample_size)
        timestep = torch.randint(0, 1000, (rows,), generator=generator)
        return CalibrationSet.from_tensors(torch.randn(shape, generator=generator), timestep)


def network(name: str) -> Network:
    """digits_ddpm with its trained weights, ddpm_cifar10 (35.7 M parameters) with random ones."""
    from omegaconf import OmegaConf

    from dqbench.models import denoiser, load

    model = OmegaConf.to_object(compose([f"model={name}"]).model)
    if model.path.startswith("zoo:"):
        unet = denoiser(load(model))
    else:
        from diffusers import UNet2DModel

        torch.manual_seed(0)
        unet = UNet2DModel(**{key: value for key, value in model.architecture.items() if not key.startswith("_")})
    return Network(name, freeze(unet), model.units, model.shortcuts)


@dataclass
class Stamped(Call):
    """A recorded call that notes the CPU time at each mini-batch: iteration k lasts from stamp k to stamp k + 1."""

    stamps: list[float] = field(default_factory=list)

    def batch(self, rows: slice | np.ndarray, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        self.stamps.append(process_time())
        return super().batch(rows, device)


def stamped(call: Call) -> Stamped:
    return Stamped(call.rows, call.args, call.kwargs)


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
        """Name inside the unit -> name in the network."""
        return {member.removeprefix(self.name).lstrip("."): member for member in self.job.units[self.name]}

    def swapped(self) -> tuple[nn.Module, dict[str, plain.SwappedLayer]]:
        """The plain unit on the same grids, its rounding as it starts."""
        items = {inner: self.job.layers[name] for inner, name in self.layers().items()}
        specs = {
            name: plain.LayerSpec(item.weight, item.grid.scale, item.grid.zero_point, BITS.weight) for name, item in items.items()
        }
        return plain.swap(self.teacher, specs)

    def swapped_with_steps(self) -> nn.Module:
        """The plain unit with the student's rounded weights and the student's activation steps."""
        unit, layers = self.swapped()
        for inner, layer in layers.items():
            rounded = self.job.layers[self.layers()[inner]].layer
            up = rounded.weight > torch.floor(layer.weight / layer.scale) * layer.scale
            layer.alpha.data, layer.hard = torch.where(up, 1.0, -1.0), True
            layer.act = plain_steps(rounded.act_quantizer)
        processor = getattr(self.student, "processor", None)
        if processor is not None:
            unit.set_processor(plain.AttentionSteps({part: plain_steps(q) for part, q in processor.quantizers.items()}))
        return unit


def plain_steps(quantizer: nn.Module) -> nn.Module:
    """The plain counterpart of an activation quantizer."""
    if isinstance(quantizer, SplitQuantizer):
        return plain.SplitStep(quantizer.split, plain_steps(quantizer.first), plain_steps(quantizer.second))
    assert isinstance(quantizer, ActQuantizer)
    return plain.Step(quantizer.scale, quantizer.zero_point, (quantizer.qmin, quantizer.qmax))


def cases(net: Network, names: list[str], recon: Recon, rows: int, folder: Path):
    """The named units of a network, weights prepared, calls recorded on `rows` inputs."""
    calib, student = net.calibration(rows), copy.deepcopy(net.unet)
    splits = skip_splits(student, calib.rows([0]), net.shortcuts)
    plan = {k: v for k, v in select(student, BITS, [], {}).items() if any(f"{k}.".startswith(f"{name}.") for name in names)}
    layers = prepare(student, split(plan, list(splits)), WEIGHT, splits)
    job = Job(student, net.unet, find_units(student, net.units, layers), layers, calib, recon, [])
    teacher = Recorder(net.unet, calib, folder / "outputs", replay=False)
    for name in names:
        yield Case(job, name, teacher.inputs(name, folder / name, with_output=True), net.unet.get_submodule(name))


@torch.no_grad()
def add_steps(case: Case) -> None:
    """Quantize the activations of a case's unit, ranges from one mini-batch of its recorded call."""
    quantize_inputs({name: case.job.layers[name] for name in case.job.units[case.name]}, signed=False)
    quantize_attention(case.student, BITS, signed=False, signed_softmax=False)
    with calibrating(case.student, ACT):
        args, kwargs = case.call.batch(slice(0, case.job.recon.batch_size), torch.device("cpu"))
        first_tensor(case.student(*args, **kwargs))
