"""Statistics of feature sets [N, D], computed by torch-fidelity's own functions."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from dqbench.metrics.measure import Kind, Values


def frechet(features: Tensor, reference: dict[str, np.ndarray]) -> Values:
    """Fréchet distance of Gaussians fitted to features [N, D] and to the reference (Heusel et al. 2017, 1706.08500)."""
    return (fid_statistics_to_metric(fid_features_to_statistics(features), reference, verbose=False)[KEY_METRIC_FID],)


def kernel(features: Tensor, reference: Tensor, subsets: int, subset_size: int) -> Values:
    """Unbiased squared MMD, cubic kernel, mean over random subsets (Binkowski et al. 2018, 1801.01401)."""
    size = min(subset_size, len(features), len(reference))
    result = kid_features_to_metric(features, reference, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return (result[KEY_METRIC_KID_MEAN],)


def precision_recall(features: Tensor, reference: Tensor, neighborhood: int) -> Values:
    """Share of samples in the reference manifold, and the reverse (Kynkäänniemi et al. 2019, 1904.06991)."""
    result = prc_features_to_metric(
        features, reference, prc_neighborhood=neighborhood, save_cpu_ram=len(features) > 10_000, verbose=False
    )
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def inception_score(logits: Tensor, reference: Tensor, splits: int) -> Values:
    """exp E KL(p(y|x) || p(y)) of the classifier's predictions (Salimans et al. 2016, 1606.03498)."""
    return (isc_features_to_metric(logits, splits=min(splits, len(logits)))[KEY_METRIC_ISC_MEAN],)


def confident(logits: Tensor, reference: Tensor, threshold: float) -> Values:
    """Share of samples whose most probable class has at least the probability `threshold`."""
    return ((logits.softmax(1).amax(1) >= threshold).double().mean().item(),)


KINDS = {
    "frechet": Kind(frechet, higher_is_better=False, prepare=fid_features_to_statistics),
    "kernel": Kind(kernel, higher_is_better=False),
    "precision_recall": Kind(precision_recall, higher_is_better=True),
    "inception_score": Kind(inception_score, higher_is_better=True),
    "confident": Kind(confident, higher_is_better=True),
}
