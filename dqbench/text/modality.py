"""Language models: samples are token ids, and quantization shows in what is predicted for masked tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dqbench import processes
from dqbench.config import Calib, Model
from dqbench.diagnostics import curves
from dqbench.errors import UserError
from dqbench.metrics.base import Metric, mean_interval
from dqbench.metrics.guards import DegenerateSamples
from dqbench.models import denoiser
from dqbench.sampling import generators, padded_length, sample_seed
from dqbench.shards import Shards, save_array
from dqbench.text import tasks
from dqbench.text.agreement import agreement, predictions
from dqbench.text.data import TASKS, ask, check_questions, check_rows, content_hash, token_rows
from dqbench.text.likelihood import Masks, bin_masks
from dqbench.text.mcs import mask_rows

if TYPE_CHECKING:
    from dqbench.record import Stages
    from dqbench.run import Cell, Quantized
    from dqbench.stages import Artifact

PROBES, BINS, DRAWS = 64, 5, 2  # held-out rows at most, ranges of the masked fraction, masks of a row in each
SHARED = 2**26  # bytes of predictions that are kept for other cells
SHOWN = 12  # samples in the picture


def check(cell: Cell) -> None:
    """Raise UserError where there is nothing, or too little, to ask the model or to calibrate it with."""
    check_questions(cell.model, cell.sampler.num_samples)
    if hasattr(cell.metrics, "check_model"):
        cell.metrics.check_model(cell.model, cell.sampler)
    if cell.quantizing:
        mask = cell.calib.mask
        check_rows(cell.model.data, "calib.mask", mask.rows, mask.length)
        if cell.model.data == TASKS:
            tasks.token_rows(mask.rows, "train", cell.calib.samples, cell.seed)  # raises where there are fewer


def sample(cell: Cell, pipe: DiffusionPipeline, rows: range) -> dict[str, np.ndarray]:
    """Generated token ids, int32 [B, G]; a short batch is filled up, so that it rounds as all do."""
    filled = [*rows, *[rows[-1]] * (padded_length(len(rows), cell.sampler) - len(rows))]
    made = pipe(
        ask(cell.model, filled, cell.sampler.num_samples),
        generator=generators([sample_seed(cell.seed, i) for i in filled]),
        num_inference_steps=cell.sampler.steps,
        guidance_scale=cell.sampler.guidance,
        output_type="np",
    )
    return {"sample": made.generated[: len(rows)].astype(np.int32)}


def check_samples(samples: np.ndarray) -> None:
    """Fail on token ids [N, G] that are all one token."""
    if (samples == samples.flat[0]).all():
        raise DegenerateSamples(f"every token of the {len(samples)} samples is token {samples.flat[0]}")


def calibrate(cell: Cell) -> Artifact:
    """Masked rows of the model's training data: input_ids [N, L]; step: the masked share in sixteenths, N the least."""

    def produce(folder: Path) -> None:
        for name, values in masked_rows(cell.model, cell.calib, cell.pipe, cell.seed).items():
            save_array(folder / f"{name}.npy", values)

    depends = {**cell.origin, "calib": cell.picked, "data": content_hash(cell.model.data)}
    return cell.store.get("calibration", depends, produce)


def masked_rows(model: Model, calib: Calib, pipe: DiffusionPipeline, seed: int) -> dict[str, np.ndarray]:
    """The calibration set as arrays. Raises UserError where the model's data does not give it."""
    mask, config = calib.mask, denoiser(pipe).config
    ids = token_rows(model, pipe.tokenizer, mask.rows, "train", calib.samples, mask.length, seed)
    if ids.max() >= config.vocab_size:
        raise UserError(f"the tokenizer of {model.path} makes token {ids.max()}; the network has {config.vocab_size}")
    rows = mask_rows(ids, mask.mode, mask.gamma, mask.times, config.mask_token_id, seed)
    return {"input_ids": rows.ids.numpy(), "step": positions(rows.ratio.numpy())}


def positions(ratio: np.ndarray) -> np.ndarray:
    """[N]: 0 for the rows that a sampler would meet first, with most masks, up to the last distinct ratio."""
    return np.unique(-ratio, return_inverse=True)[1]


def network_error(cell: Cell, quantized: Quantized) -> Artifact:
    """Agreement with full precision and KL on masked held-out rows, by the share that is masked: [rows, bins] each."""

    depends = {**cell.origin, "calib": cell.picked, "data": content_hash(cell.model.data)}

    def produce(folder: Path) -> None:
        mask = cell.calib.mask
        ids = token_rows(cell.model, cell.pipe.tokenizer, mask.rows, "held_out", PROBES, mask.length)
        masks = bin_masks(torch.ones_like(ids, dtype=torch.bool), BINS, DRAWS, 0)
        found = agreement(expected(cell, depends, ids, masks), denoiser(cell.load(quantized)), ids, masks, BINS)
        if processes.is_main():
            save_array(folder / "agreement.npy", found.same.numpy())
            save_array(folder / "kl.npy", found.kl.numpy())

    return cell.store.get("agreement", {**depends, "quantized": quantized.denoiser.key}, produce, together=True)


def expected(cell: Cell, depends: dict[str, Any], ids: torch.Tensor, masks: Masks) -> Iterator[torch.Tensor]:
    """Full precision's predictions, which all cells share where a file of them is small; large ones are made anew.

    So are those of several processes, each of which takes some of the batches.
    """
    teacher = denoiser(cell.pipe)
    if processes.count() > 1 or 4 * int(masks.masked.sum()) * teacher.config.vocab_size > SHARED:
        yield from predictions(teacher, ids, masks)
        return

    def produce(folder: Path) -> None:
        for k, batch in enumerate(predictions(teacher, ids, masks)):
            save_array(folder / f"{k:05d}.npy", batch.cpu().numpy())

    for file in sorted(cell.store.get("predictions", depends, produce).folder.glob("*.npy")):
        yield torch.from_numpy(np.load(file))


def compare(samples: np.ndarray, reference: np.ndarray, error: Artifact) -> dict[str, Metric]:
    """Share of generated tokens that are full precision's; agreement and KL of the predictions for masked tokens."""
    same = (samples == reference).mean(axis=1)
    probes = {name: np.nanmean(np.load(error.folder / f"{name}.npy"), axis=1) for name in ("agreement", "kl")}
    interval = "mean and t interval over rows"
    masked = f"masked tokens of held-out rows, {BINS} equal ranges of the masked share; {interval}"
    return {
        "same_tokens": mean_of(same, "tokens", f"generated tokens equal to full precision's; {interval}", True),
        "agreement": mean_of(probes["agreement"], "logits", f"most probable token is full precision's; {masked}", True),
        "kl": mean_of(probes["kl"], "logits", f"KL(full precision || quantized), nats; {masked}", False),
    }


def mean_of(values: np.ndarray, extractor: str, protocol: str, higher_is_better: bool) -> Metric:
    """The mean over rows with its interval."""
    mean, half = mean_interval(values)
    return Metric(mean, mean - half, mean + half, len(values), extractor, protocol, higher_is_better)


def error_curves(error: Artifact) -> dict[str, Any]:
    """Agreement and KL over the masked share, mostly masked first, as a sampler goes."""
    middle = [(bin_ + 0.5) / BINS for bin_ in reversed(range(BINS))]
    groups = {}
    for title, name in (("KL to full precision", "kl"), ("agreement with full precision", "agreement")):
        columns = np.load(error.folder / f"{name}.npy").T[::-1]
        points = [mean_interval(column[~np.isnan(column)]) for column in columns]
        means, halves = zip(*points, strict=True)
        groups[title] = curves(middle, {title: means}, {title: halves}, x_label="masked share")
    return groups


def picture(cell: Cell, stages: Stages, folder: Path) -> None:
    """samples.txt: prompt, full precision's answer, the quantized one."""
    parts = [stages.reference, *([stages.samples] if stages.error else [])]
    ids = [np.asarray(Shards(part.folder, "sample").read()[:SHOWN]).tolist() for part in parts]
    decoded = [cell.pipe.tokenizer.batch_decode([cell.pipe.until_end(row) for row in rows]) for rows in ids]
    prompts = ask(cell.model, range(len(ids[0])), cell.sampler.num_samples)
    lines = ["\t".join(["prompt", "fp32", "quantized"][: 1 + len(parts)])]
    lines += ["\t".join(map(repr, line)) for line in zip(prompts, *decoded, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.txt").write_text("\n".join(lines) + "\n")
