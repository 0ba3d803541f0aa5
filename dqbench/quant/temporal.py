"""TFMQ-DM's temporal information block (Huang et al. 2024, arXiv:2311.16503): t -> embeddings emb_{t,i} = g_i(h(t)).

The block is found by tracing: of the denoiser's whole forward only what the embeddings depend on is kept, with weights
as inputs, so that it runs, and is learned, without the network around it, whatever the family.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from dqbench.arguments import SAMPLES, Batch, flatten, nest
from dqbench.calibration import CalibrationSet, named_generator
from dqbench.errors import UserError
from dqbench.progress import track
from dqbench.quant.attach import QuantLayer, rounding
from dqbench.quant.checkpoints import Checkpoints
from dqbench.quant.plan import LAYER_TYPES, matches
from dqbench.quant.reconstruct import Job, reconstruction_loss, set_beta

log = logging.getLogger(__name__)
Features = list[Tensor]  # one [R, C_i] per head


@dataclass
class TemporalBlock:
    """Layers of the temporal path; heads are those that feed no other of them. `graph` takes `size` rows at once."""

    layers: list[str]
    heads: list[str]
    inputs: list[str]  # the denoiser's arguments that the embeddings depend on: timestep, and maybe conditions
    tensors: list[str]  # its parameters and buffers on that path
    graph: fx.GraphModule  # (*tensors, *inputs) -> heads' outputs
    size: int

    def __call__(self, model: nn.Module, rows: Batch) -> Features:
        """Embeddings of exactly `size` rows under the model's present weights."""
        tensors = (attrgetter(name)(model) for name in self.tensors)
        return list(self.graph(*tensors, *(rows[name] for name in self.inputs)))

    @torch.no_grad()
    def features(self, model: nn.Module, rows: Batch) -> Features:
        """Embeddings of any number of rows."""
        count = len(rows["timestep"])
        parts = []
        for first in range(0, count, self.size):
            chosen = torch.arange(first, first + self.size).clamp(max=count - 1)
            part = self(model, take(rows, chosen))
            parts.append([values[: count - first] for values in part])
        return [torch.cat(values) for values in zip(*parts, strict=True)]


def take(rows: Batch, indices: Tensor) -> Batch:
    """Chosen rows."""
    return {name: values[indices.to(values.device)] for name, values in rows.items()}


def trace_block(model: nn.Module, batch: Batch, patterns: Sequence[str]) -> TemporalBlock:
    """The temporal block of `model`: the convs and linears that match `patterns` and what leads to them.

    batch: the denoiser's arguments for `size` rows. Raises UserError where nothing matches, or where a layer's output
    depends on the sample.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, LAYER_TYPES) and matches(n, patterns)]
    if not names:
        raise UserError(f"model.time_embedding={list(patterns)} matches no layer; give patterns of its time embedding")
    tensors, batch = dict(model.named_parameters()) | dict(model.named_buffers()), flatten(batch)
    graph, reached = _trace(model, names, tensors, batch)
    outputs = dict(zip(reached, graph.graph.output_node().args[0], strict=True))
    paths = {name: _ancestors(node) for name, node in outputs.items()}
    heads = [name for name in reached if not any(outputs[name] in path for key, path in paths.items() if key != name)]
    placeholders = dict(zip([*tensors, *batch], graph.graph.find_nodes(op="placeholder"), strict=True))
    for name in heads:
        if any(placeholders[key] in paths[name] for key in SAMPLES if key in batch):
            raise UserError(f"model.time_embedding: {name} depends on the sample, not on time alone; drop its pattern")
    used = {key for key, node in placeholders.items() if any(node in paths[name] for name in heads)}
    _prune(graph, [outputs[name] for name in heads])
    return TemporalBlock(
        layers=[name for name in reached if name in heads or any(outputs[name] in paths[head] for head in heads)],
        heads=heads,
        inputs=[key for key in batch if key in used],
        tensors=[key for key in tensors if key in used],
        graph=graph,
        size=len(batch["timestep"]),
    )


@torch.no_grad()
def _trace(
    model: nn.Module, names: Sequence[str], tensors: dict[str, Tensor], batch: Batch
) -> tuple[fx.GraphModule, list[str]]:
    """The whole forward as a graph that returns the outputs of the layers `names`, in order of execution."""
    seen: dict[str, Tensor] = {}

    def run(*values: Tensor) -> list[Tensor]:
        seen.clear()
        state, inputs = values[: len(tensors)], values[len(tensors) :]
        functional_call(model, dict(zip(tensors, state, strict=True)), (), nest(dict(zip(batch, inputs, strict=True))))
        return list(seen.values())

    handles = [model.get_submodule(n).register_forward_hook(lambda *a, n=n: seen.setdefault(n, a[2])) for n in names]
    try:
        graph = make_fx(run, tracing_mode="fake")(*tensors.values(), *batch.values())
    finally:
        for handle in handles:
            handle.remove()
    return graph, list(seen)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that `node` is computed from."""
    found, queue = set(), list(node.all_input_nodes)
    while queue:
        if (parent := queue.pop()) not in found:
            found.add(parent)
            queue += parent.all_input_nodes
    return found


def _prune(graph: fx.GraphModule, outputs: list[fx.Node]) -> None:
    """Keep what `outputs` are computed from."""
    graph.graph.output_node().args = (outputs,)
    kept = {graph.graph.output_node(), *outputs}.union(*(_ancestors(node) for node in outputs))
    for node in reversed(graph.graph.nodes):
        if node not in kept:
            graph.graph.erase_node(node)
    graph.recompile()


def distinct_rows(
    block: TemporalBlock, calib: CalibrationSet, timesteps: Sequence[float] | None, device: torch.device | str
) -> Batch:
    """One row per input the block can tell apart: per timestep, or per (timestep, condition) of the calibration set.

    timesteps: all that the sampler visits; None: those of the set. With conditions it is always the set's pairs.
    """
    columns = [np.asarray(calib.inputs[name]).reshape(len(calib), -1) for name in block.inputs]
    first = {tuple(column[k].tobytes() for column in columns): k for k in reversed(range(len(calib)))}
    rows = flatten(calib.rows(np.array(sorted(first.values())), device))
    if len(block.inputs) > 1:
        conditions = ", ".join(name for name in block.inputs if name != "timestep")
        log.info("temporal block: %d pairs of timestep and %s", len(first), conditions)
    elif timesteps is not None:
        return {"timestep": torch.tensor(list(timesteps)).to(rows["timestep"])}
    return {name: rows[name] for name in block.inputs}


def reconstruct_block(job: Job, block: TemporalBlock, rows: Batch) -> None:
    """TIAR: learn the rounding of all the block's weights at once; a killed run that had finished it does not again."""
    layers = {name: item for name, item in members(job, block).items() if item.grid is not None}
    checkpoints = Checkpoints("temporal")
    if layers and not checkpoints.load("block", {name: item.layer.weight for name, item in layers.items()}):
        learn_block(job, block, list(layers.values()), rows)
        checkpoints.save("block", {name: item.layer.weight for name, item in layers.items()})


def members(job: Job, block: TemporalBlock) -> dict[str, QuantLayer]:
    """The block's layers that are quantized."""
    return {name: job.layers[name] for name in block.layers if name in job.layers}


def learn_block(job: Job, block: TemporalBlock, layers: Sequence[QuantLayer], rows: Batch) -> None:
    """Loss: sum over heads of mean over rows of sum over channels |emb - emb_teacher|^p, plus AdaRound's penalty."""
    recon, wanted, count = job.recon, block.features(job.teacher, rows), len(rows["timestep"])
    generator = named_generator("temporal block", job.calib.seed)
    with rounding(layers, first_half_only=False) as rounders:
        optimizer = torch.optim.Adam([rounder.alpha for rounder in rounders], lr=recon.lr, fused=True)
        for k in track(range(1, recon.iters + 1), "reconstruct temporal block", recon.iters):
            set_beta(rounders, recon, k)
            chosen = torch.randperm(count, generator=generator)[torch.arange(block.size) % count]
            outputs = [values.float() for values in block(job.student, take(rows, chosen))]
            pairs = [(found, exact[chosen].float()) for found, exact in zip(outputs, wanted, strict=True)]
            slopes = [reconstruction_loss(*pair, recon.p)[1] for pair in pairs]
            optimizer.zero_grad()
            torch.autograd.backward(outputs, slopes)
            optimizer.step()
