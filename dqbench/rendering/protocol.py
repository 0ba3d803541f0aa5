"""Where our rows were made or measured otherwise than the published ones: computed from both, never written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dqbench.published import PublishedRow, Table
from dqbench.rendering.estimates import measured
from dqbench.results import Row

SAME = {"PNDM": ("plms", "pndm"), "DPMSolverMultistep": ("dpm",)}  # our scheduler -> words for it; others: their name
LIBRARIES = ("torch-fidelity", "clean-fid", "guided-diffusion", "lm-evaluation-harness")
UNKNOWN = "not known"
MEASURE = "measure of"


@dataclass(frozen=True, order=True)
class Difference:
    """One setting. decisive: a row that differs in it is no reproduction; if not, what is published is too vague."""

    topic: str
    published: str
    ours: str
    decisive: bool = True

    def __str__(self) -> str:
        return f"{self.topic}: {self.published} → {self.ours}"


def differences(table: Table, line: PublishedRow, row: Row, metrics: Mapping[str, str], mini: bool) -> list[Difference]:
    """What differs between a published row and one of ours. metrics: published name -> ours."""
    found = list(sampling(table, row.config["sampler"]))
    if mini:
        wanted = ", ".join(filter(None, (table.model, table.dataset, table.resolution)))
        found.insert(0, Difference("model", wanted or UNKNOWN, str(row.config["model"]["name"])))
    if 16 in (line.w, line.a):
        dtype = str(row.config["model"].get("dtype", UNKNOWN))
        found.append(Difference("what is not quantized", "16 bits", dtype, decisive=False))
    for name, own in metrics.items():
        if name in line.values and (metric := measured(row, own)):
            found += measuring(table, name, own, metric)
    return [each for each in dict.fromkeys(found) if each.published != each.ours]


def sampling(table: Table, sampler: Mapping[str, Any]) -> Iterator[Difference]:
    """Sampler, steps, eta, guidance, as far as they are published."""
    name = str(sampler["scheduler"]).split(".")[-1].removesuffix("Scheduler")
    if table.sampler and not any(word in table.sampler.lower() for word in SAME.get(name, (name.lower(),))):
        yield Difference("sampler", table.sampler, name)
    if "quad" in (table.sampler or "").lower() and sampler.get("spacing") != "quad":
        yield Difference("spacing of the steps", "quad", str(sampler.get("spacing")))
    for key in ("steps", "eta", "guidance"):
        wanted = getattr(table, key)
        if wanted is not None and wanted != sampler.get(key):
            yield Difference(key, f"{wanted:g}" if not isinstance(wanted, str) else wanted, f"{sampler.get(key):g}")


def measuring(table: Table, name: str, own: str, metric: Mapping[str, Any]) -> Iterator[Difference]:
    """Number of samples, implementation and reference of one metric."""
    wanted, protocol = table.protocol, str(metric["protocol"])
    if wanted.n_samples != metric["n"]:
        count = UNKNOWN if wanted.n_samples is None else f"{wanted.n_samples:,}"
        yield Difference("samples", count, f"{metric['n']:,}", decisive=wanted.n_samples is not None)
    same = [library for library in LIBRARIES if library in protocol and library in (wanted.fid_impl or "")]
    how = f"{own} by {metric['extractor']}; {protocol.partition('; interval')[0]}"
    yield Difference(f"{MEASURE} {name}", wanted.fid_impl or UNKNOWN, how, not same)
    if wanted.reference:
        yield Difference("reference set", wanted.reference, reference(protocol), decisive=False)


def reference(protocol: str) -> str:
    """The part of a metric's protocol that names its reference."""
    parts = [part.strip() for clause in protocol.split(";") for part in clause.split(",") if "reference" in part]
    return ", ".join(part.removeprefix("reference ") for part in parts) or "none"
