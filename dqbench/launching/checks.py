"""Values of a composed config that its types allow and that nothing could run with. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig

from dqbench.config import OFF, Config
from dqbench.errors import UserError, check_choice
from dqbench.launching.table import check_scale


def check(cfg: DictConfig) -> None:
    """Raise UserError, one line with what is allowed, for the first bad key or value."""
    check_keys(cfg)
    check_scale(cfg)
    for key, bits in cfg.bits.items():
        if not (2 <= bits <= 8 or bits in OFF):
            raise UserError(f"bits.{key}={bits} is not supported; allowed: 2 to 8, or 16 and 32 for full precision")
    check_choices(cfg)
    check_ranges(cfg)
    if cfg.base is not None and "base" not in cfg.method:
        raise UserError(f"base has no meaning for method={cfg.method.get('name')}, which builds on no other method")


def check_keys(cfg: DictConfig) -> None:
    """Raise UserError for keys that were appended with `+` and that nothing would read."""
    from dqbench.launching.searchpath import presets

    if "sweeps" in cfg:
        raise UserError(f"sweeps={cfg.sweeps} is unknown; allowed: {', '.join(presets()) or 'none, sweeps/ is empty'}")
    check_node(cfg, Config, "")
    for name, kind in get_type_hints(Config).items():
        if is_dataclass(kind):
            check_node(cfg[name], kind, f"{name}.")


def check_node(node: DictConfig, kind: type, prefix: str) -> None:
    """Raise UserError for a key of `node` that the dataclass `kind` has not."""
    known = [field.name for field in fields(kind)]
    for key in node:
        if key not in (*known, "hydra"):
            raise UserError(f"{prefix}{key} is unknown; allowed: {', '.join(known)}")


def check_choices(cfg: DictConfig) -> None:
    """Raise UserError for words that are none of those known."""
    if cfg.sampler.spacing is not None:
        check_choice("sampler.spacing", cfg.sampler.spacing, ("leading", "trailing", "linspace", "quad"))
    check_choice("calib.source", cfg.calib.source, ("trajectory", "noise", "image", "train_mimic"))
    check_choice("calib.policy", cfg.calib.policy, ("uniform", "normal", "fixed"))
    check_choice("recon.order", cfg.recon.order, ("execution", "official"))
    check_choice("recon.split_penalty", cfg.recon.split_penalty, ("both", "first"))
    check_choice("recon.act_init", cfg.recon.act_init, ("random", "first"))
    check_choice("model.dtype", cfg.model.dtype, ("float32", "float16", "bfloat16"))


def check_ranges(cfg: DictConfig) -> None:
    """Raise UserError for numbers outside their range; NaN is outside every range."""
    calib, recon, sampler = cfg.calib, cfg.recon, cfg.sampler
    uniform = calib.policy == "uniform"
    kept = calib.steps or sampler.steps
    if not uniform and calib.samples is None:
        raise UserError(f"calib.samples=null has no meaning for calib.policy={calib.policy}; allowed: 1 or more")
    if uniform and calib.mask is None and calib.samples is not None and calib.samples // kept > calib.chains:
        given = f"calib.samples={calib.samples} is more than {kept} steps x calib.chains={calib.chains}"
        raise UserError(f"{given}; allowed: at most their product")
    check_range("sampler", sampler, {"steps": (1, None), "eta": (0, 1), "num_samples": (2, None)})
    check_range("sampler", sampler, {"batch_size": (1, None)})
    check_range("calib", calib, {"chains": (1, None), "samples": (1, None), "mean": (None, None), "std": (0, None)})
    check_range("calib", calib, {"batch_size": (1, None)})
    check_range("calib", calib, {"steps": (1, sampler.steps if uniform else None)}, "sampler.steps")
    check_range("calib", calib, {"step": (0, sampler.steps - 1)}, "sampler.steps - 1")
    if calib.mask is not None:
        check_mask(calib)
    check_range("recon", recon, {"iters": (0, None), "iters_act": (0, None), "batch_size": (1, None), "warmup": (0, 1)})
    check_range("recon", recon, {"lr": (0, None), "lr_act": (0, None), "p": (0, None), "p_act": (0, None)})
    check_range("recon", recon, {"penalty": (0, None), "act_init_samples": (1, None)})
    check_range("runtime", cfg.runtime, {"threads": (1, None)})
    check_range("", cfg, {"seed": (0, None)})
    if len(recon.beta) != 2:
        raise UserError(f"recon.beta={list(recon.beta)} is not usable; allowed: two numbers, start and end")


def check_mask(calib: DictConfig) -> None:
    """Raise UserError for masks that could not calibrate a language model."""
    check_choice("calib.mask.mode", calib.mask.mode, ("none", "per_sample_grid", "cross"))
    check_range("calib.mask", calib.mask, {"gamma": (0, 1), "times": (1, None), "length": (2, None)})
    if calib.samples is None:
        raise UserError("calib.samples=null has no meaning for masked texts; allowed: 1 or more")


def check_range(group: str, node: DictConfig, limits: dict[str, tuple[Any, Any]], high_is: str = "") -> None:
    """Raise UserError for a key of `node` outside [low, high]; None is no limit; `high_is` names what sets high."""
    for key, (low, high) in limits.items():
        value = node[key]
        lowest, highest = float("-inf") if low is None else low, float("inf") if high is None else high
        if value is not None and not (lowest <= value <= highest and abs(value) < float("inf")):
            upper = f"{high} ({high_is})" if high_is else high
            at_least = f"{low} or more" if low is not None else "a finite number"
            allowed = f"{low} to {upper}" if high is not None else at_least
            raise UserError(f"{group}{'.' if group else ''}{key}={value} is out of range; allowed: {allowed}")
