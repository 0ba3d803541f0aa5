"""Which rows may be compared, in which order they are read, and what tells apart those that look alike."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dqbench.identity import digest
from dqbench.results import Row

HOW = ("units", "official_order", "shortcuts", "time_embedding")  # of a model: how it is quantized, not what it is
NOT_SETTINGS = (*(f"model.{key}" for key in HOW), "sampler.batch_size", "metrics.batch_size")
BY_CONTENT = {"checkpoint": ("model.path",), "reference": ("model.data", "metrics.weights")}  # reference: both
BASELINES = ("rtn", "qdiffusion")  # beside full precision
ABSENT = "(absent)"  # what a config has under a key that another has
LONG = 32  # characters of a value; more are cut
Flat = dict[str, Any]  # dotted key -> value


def label(row: Row) -> dict[str, str]:
    """model, method, bits, sampler and number of samples of a row, as people say them."""
    bits, sampler, method = (row.config.get(key, {}) for key in ("bits", "sampler", "method"))
    name, scheduler = method_name(method), str(sampler.get("scheduler", "?")).split(".")[-1]
    return {
        "model": str(row.config.get("model", {}).get("name", "?")),
        "method": name,
        "bits": "–" if name == "fp32" else f"w{bits.get('weight', '?')}a{act_bits(row)}",
        "sampler": f"{scheduler.removesuffix('Scheduler')} {sampler.get('steps', '?')} steps",
        "samples": f"{sampler.get('num_samples', 0):,} samples",
    }


def act_bits(row: Row) -> str:
    """Activation bits; where they vary over the sampling steps, '~' and their mean as it is billed."""
    mixed = row.config.get("method", {}).get("mixed") or {}
    if mixed.get("mode", "none") != "none":
        return f"~{row.cost['bits_per_act']:.1f}"
    return str(row.config.get("bits", {}).get("act", "?"))


def title(row: Row) -> str:
    """'digits_ddpm, DDIM 50 steps, 1,024 samples'."""
    entry = label(row)
    return f"{entry['model']}, {entry['sampler']}, {entry['samples']}"


def method_name(method: Mapping[str, Any]) -> str:
    """A method's name; with that of the method it builds on, if any."""
    name, base = str(method.get("name", "?")), method.get("base")
    return f"{name} on {method_name(base)}" if isinstance(base, Mapping) else name


def settings(row: Row) -> Flat:
    """What makes rows comparable: model, sampler and metrics; what lies in files by its content, not by its path."""
    flat = leaves({part: row.config.get(part, {}) for part in ("model", "sampler", "metrics")})
    hashes = {name: row.provenance.get(f"{name}_hash") for name in BY_CONTENT}
    known = {name: value[:12] for name, value in hashes.items() if value}
    paths = {path for name in known for path in BY_CONTENT[name]}
    return known | {k: flat[k] for k in sorted(flat) if k not in paths and not k.startswith(NOT_SETTINGS)}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested mappings as one with dotted keys; lists and empty mappings are values."""
    flat: Flat = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def settings_apart(found: Sequence[Row]) -> list[Flat]:
    """Per row the settings in which it differs from most rows of its title."""
    return differences([settings(row) for row in found], [title(row) for row in found])


def methods_apart(found: Sequence[Row]) -> list[Flat]:
    """Per row what differs from most rows of its settings, method and bits, the seed excepted; nothing for fp32."""
    contents, groups = [], []
    for row in found:
        entry = label(row)
        config = {} if entry["method"] == "fp32" else {key: row.config[key] for key in row.config if key != "seed"}
        contents.append(leaves(config))
        groups.append((digest(settings(row)), entry["method"], entry["bits"]))
    return differences(contents, groups)


def differences(contents: Sequence[Flat], groups: Sequence[Hashable]) -> list[Flat]:
    """Per content its entries that most contents of its group have otherwise; all entries that differ at a draw."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    result: list[Flat] = [{} for _ in contents]
    for indices in members.values():
        for key, texts in _varying([contents[index] for index in indices]).items():
            (usual, count), second = [*Counter(texts).most_common(2)]
            for index, text in zip(indices, texts, strict=True):
                if text != usual or second[1] == count:
                    result[index][key] = contents[index].get(key, ABSENT)
    return result


def _varying(contents: Sequence[Flat]) -> dict[str, tuple[str, ...]]:
    """The values, as JSON, under keys where they differ; not of method.recon.iters where recon.iters says the same."""
    keys = sorted(set().union(*contents)) if len(contents) > 1 else []
    texts = {key: tuple(json.dumps(flat.get(key, ABSENT)) for flat in contents) for key in keys}
    varying = {key: values for key, values in texts.items() if len(set(values)) > 1}

    def copied(key: str) -> bool:
        parts = key.split(".")
        return any(varying.get(".".join(parts[start:])) == varying[key] for start in range(1, len(parts)))

    return {key: values for key, values in varying.items() if not copied(key)}


def spell(told: Flat) -> str:
    """'recon.iters=20000 method.vsc=false'; a long value is cut and ends in its hash."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
    cut = {key: text if len(text) <= LONG else f"{text[: LONG - 8]}…{digest(text)[:4]}" for key, text in texts.items()}
    return " ".join(f"{key}={text}" for key, text in cut.items())


def in_order(found: Sequence[Row]) -> list[tuple[Row, Flat]]:
    """Rows in reading order, each with what its label does not tell: full precision first, then falling bits."""
    told = [some | more for some, more in zip(settings_apart(found), methods_apart(found), strict=True)]
    return sorted(zip(found, told, strict=True), key=lambda pair: _position(*pair))


def _position(row: Row, told: Flat) -> tuple[Any, ...]:
    entry, bits = label(row), row.config.get("bits", {})
    widths = [-bits.get(key, 0) for key in ("weight", "act")]
    special = [(key, _natural(value)) for key, value in told.items()]
    quantized = entry["method"] != "fp32"
    return entry["model"], entry["sampler"], quantized, widths, entry["method"], special, row.config["seed"], row.run_id


def _natural(value: Any) -> tuple[int, Any]:
    """Sorts numbers by size, everything else after them, by its text."""
    return (0, value) if isinstance(value, (int, float)) else (1, json.dumps(value, sort_keys=True))


def with_baselines(found: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """`found` and what it is to be compared with: full precision, and of `others` the BASELINES under equal settings.

    Rows of `others` must share settings, seed and bits with one of `found`.
    """
    kinds, known = {_kind(row) for row in found}, {row.run_id for row in found}
    full = {kind[:2] for kind in kinds}

    def fits(row: Row) -> bool:
        method = label(row)["method"]
        return _kind(row) in kinds if method in BASELINES else method == "fp32" and _kind(row)[:2] in full

    every = [*found, *(row for row in others if row.run_id not in known and fits(row))]
    there = {_kind(row)[:2] for row in every if label(row)["method"] == "fp32"}
    missing = {_kind(row)[:2]: row for row in found if _kind(row)[:2] not in there}
    return [*every, *map(full_precision, missing.values())]


def _kind(row: Row) -> tuple[str, int, str]:
    return digest(settings(row)), row.config["seed"], label(row)["bits"]


def full_precision(row: Row) -> Row:
    """The full-precision row that a quantized one holds: it has no run of its own."""
    cost = {key.removesuffix("_fp32"): value for key, value in row.cost.items() if key.endswith("_fp32")}
    config = row.config | {"method": {"name": "fp32"}}
    return replace(row, run_id="", config=config, metrics=row.reference, paired={}, difference={}, cost=cost)
