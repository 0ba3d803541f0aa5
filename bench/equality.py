"""Before anything is timed: ours and the plain implementation compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.reconstruction import rounding
from bench.units import Case, quantize_activations
from dqbench.quant.reconstruct import learn_rounding, learn_steps
from dqbench.quant.rows import Call
from tests.reference import module_swap as plain


@dataclass
class Watching(Call):
    """A recorded call that remembers the alphas of `case` at each mini-batch."""

    case: Case | None = None
    alphas: list[dict[str, Tensor]] = field(default_factory=list)

    def batch(self, rows: Any, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        self.alphas.append({})
        for inner, name in self.case.layers().items():
            rounder = self.case.job.layers[name].layer.parametrizations.weight[0]
            self.alphas[-1][inner] = rounder.alpha.detach().clone()
        return super().batch(rows, device)


def first_losses(case: Case) -> tuple[float, float]:
    """The reconstruction loss of the first mini-batch: (ours, plain)."""
    once = replace(case, job=replace(case.job, recon=replace(case.job.recon, iters=1)))
    unit, layers = case.swapped()
    theirs = next(plain.learn_rounding(unit, layers.values(), case.plain_batches(1), rounding(once.job.recon)))
    return learn_rounding(once.job, case.name, case.call, case.call), theirs


def alphas(case: Case) -> tuple[Tensor, Tensor]:
    """Every alpha of the unit after all iterations but one: (ours, plain), flat."""
    call = Watching(case.call.rows, case.call.args, case.call.kwargs, case)
    learn_rounding(case.job, case.name, call, call)
    unit, layers = case.swapped()
    recon = case.job.recon
    list(plain.learn_rounding(unit, layers.values(), case.plain_batches(recon.iters - 1), rounding(recon)))
    ours = torch.cat([alpha.flatten() for alpha in call.alphas[-1].values()])
    return ours, torch.cat([layers[name].alpha.detach().flatten() for name in call.alphas[-1]])


def steps(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Every activation step of the unit after the activation phase: (at its start, ours, plain)."""
    quantize_activations(case)
    unit, pairs = case.swapped_with_steps()
    start = torch.stack([quantizer.scale.clone() for quantizer, _ in pairs])
    recon = case.job.recon
    learn_steps(case.job, case.name, case.call)
    list(plain.learn_steps(unit, case.plain_batches(recon.iters_act), recon.iters_act, recon.lr_act, recon.p_act))
    return start, torch.stack([q.scale for q, _ in pairs]), torch.stack([step.scale.detach() for _, step in pairs])


def check(case: Case) -> None:
    """Raise AssertionError where ours and the plain implementation part."""
    ours, theirs = first_losses(case)
    assert abs(ours - theirs) <= 1e-4 * theirs, f"{case.name}: first loss {ours}, plain {theirs}"
    learned, reference = alphas(case)
    apart = ((learned - reference).abs() > 1e-3).float().mean()
    assert apart < 1e-3, f"{case.name}: {apart:.2%} of the alphas differ by more than 0.001"
    start, learned, reference = steps(case)
    assert (learned != start).all(), f"{case.name}: an activation step did not move"
    assert torch.allclose(learned, reference, rtol=1e-3), f"{case.name}: activation steps {learned}, plain {reference}"
