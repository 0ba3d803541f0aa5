"""Samples that no metric should be computed on: they fail the run loudly."""

from __future__ import annotations

import numpy as np

BATCH = 1024  # samples read at a time


class DegenerateSamples(RuntimeError):
    """The model collapsed. The message is one line: what is wrong with the samples."""


def check_samples(samples: np.ndarray) -> None:
    """Fail on samples [N, ...] (any real dtype) that hold NaN or infinity, are each one color, or are all the same."""
    if not len(samples):
        raise DegenerateSamples("there are no samples")
    first, flat, same = np.asarray(samples[0]), True, True
    for start in range(0, len(samples), BATCH):
        batch = np.asarray(samples[start : start + BATCH])
        check_finite(batch, start)
        pixels = batch.reshape(len(batch), -1)
        flat = flat and bool((pixels == pixels[:, :1]).all())
        same = same and bool((batch == first).all())
    if flat:
        raise DegenerateSamples(f"every one of the {len(samples)} samples is a single color (first: {first.flat[0]})")
    if same and len(samples) > 1:
        raise DegenerateSamples(f"all {len(samples)} samples are the same image")


def check_finite(batch: np.ndarray, start: int) -> None:
    """Fail on samples [n, ...], the first of which has index `start`, that hold NaN or infinity."""
    bad = ~np.isfinite(batch).reshape(len(batch), -1).all(1)
    if bad.any():
        index = start + int(bad.argmax())
        raise DegenerateSamples(f"sample {index} holds NaN or infinity ({bad.sum()} such samples in its batch)")
