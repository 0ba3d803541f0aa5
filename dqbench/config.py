"""Types of the configuration, and what is done with it before anything heavy is imported. Values live in conf/."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dqbench.errors import UserError, one_line
from dqbench.identity import run_id

OFF = (16, 32)  # bit-widths that mean "not quantized"


@dataclass
class Model:
    """Where a pipeline comes from and what is special about its family. Patterns are fnmatch on module names."""

    name: str
    path: str  # zoo:NAME, a diffusers folder, or a hub id
    version: int
    pipeline: str  # class with from_pretrained that loads and samples it
    denoiser: str  # attribute of the pipeline that is quantized
    dtype: str
    data: str | None  # real images: a registered dataset or a folder
    prompts: str | None  # file with one prompt per line
    num_classes: int | None  # class-conditional models: sample i gets class i mod num_classes
    units: list[str]  # reconstruction units; the outermost match wins, other layers are units of their own
    official_order: list[str]  # the authors' registration order; empty: execution order
    shortcuts: list[str]  # convs whose input is a skip concatenation
    time_embedding: list[str]
    architecture: dict[str, Any]
    inputs: dict[str, Any]


@dataclass
class Bits:
    """Bit-widths, 2..8; 16 and 32 switch the quantizer off."""

    weight: int
    act: int
    attention: int  # q, k, v at the attention matmuls
    softmax: int


@dataclass
class Recon:
    """Reconstruction: AdaRound weight phase, then the activation-step phase, as in Q-Diffusion's release."""

    iters: int
    iters_act: int
    batch_size: int
    lr: float
    lr_act: float
    p: float
    p_act: float
    penalty: float
    warmup: float
    beta: list[float]
    asymmetric: bool  # weight phase sees the quantized prefix's inputs
    order: str  # execution | official
    dropout: bool
    split_penalty: str  # both | first
    bound_steps: bool  # activation scales stay within a factor of 2 of where they start
    act_init: str  # random | first
    act_init_samples: int


@dataclass
class Mask:
    """Texts that calibrate a masked-diffusion language model, a prefix of each left visible (Quant-dLLM's MCS)."""

    mode: str  # per_sample_grid | cross: every row at every one of `times` mask ratios
    gamma: float  # visible prefix, share of a row
    times: int
    rows: str  # of the model's data: english, tasks or a task of the miniature; text for a file
    length: int | None  # tokens of a row of a text file


@dataclass
class Calib:
    """What calibrates. policy: uniform, normal or fixed; source: trajectory, noise, image or train_mimic."""

    source: str
    policy: str
    chains: int  # full-precision sampling chains recorded
    steps: int | None  # uniform: how many sampler steps are kept; None: all of them
    samples: int | None  # size of the set; uniform: samples / steps per kept step, None: every chain
    batch_size: int  # rows that pass the network at once while ranges are collected; running ranges depend on it
    mean: float  # normal: in units of the number of steps, from the clean end
    std: float
    step: int | None  # fixed: position in the sampler's steps
    official: bool
    mask: Mask | None  # language models: `samples` masked texts in place of all other keys


@dataclass
class Sampler:
    """A diffusers scheduler and how it is driven."""

    scheduler: str
    steps: int
    eta: float
    spacing: str | None  # leading | trailing | linspace | quad; None where the scheduler has no such choice
    guidance: float
    num_samples: int
    batch_size: int
    kwargs: dict[str, Any]


@dataclass
class Paths:
    results: str
    cache: str


@dataclass
class Runtime:
    """How, not what: never part of a run's identity."""

    device: str  # auto | cpu | cuda | cuda:N
    threads: int | None
    force: bool  # run again although the row exists


@dataclass
class Config:
    """The root node. method, metrics and tracking are open: build() checks them against their `_target_`."""

    model: Model = MISSING
    base: Any = None  # what a method that builds on another one starts from; None for all others
    method: Any = MISSING
    bits: Bits = MISSING
    recon: Recon = MISSING
    calib: Calib = MISSING
    sampler: Sampler = MISSING
    metrics: Any = MISSING
    tracking: Any = MISSING
    paths: Paths = MISSING
    runtime: Runtime = MISSING
    seed: int = MISSING
    published: Any = None  # by setting=: values of method keys that ask for them; hashed there
    scale: str = MISSING  # mini | full: which axes of `table` a preset sweeps
    table: Any = None


def register() -> None:
    """Make the schema, the `run_id` resolver and the search path of sweeps/ known to Hydra. Safe to call twice."""
    from dqbench.launching.searchpath import choices, register_search_path

    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_id", lambda *, _root_: run_id(_root_), replace=True)
    OmegaConf.register_new_resolver("choices", choices, replace=True)
    register_search_path()


def data_root() -> Path:
    """The folder that holds conf/ and sweeps/: the repository of a checkout, else the installed package."""
    package = Path(__file__).resolve().parent
    return package.parent if (package.parent / "conf" / "config.yaml").exists() else package


def build(node: DictConfig) -> Any:
    """Validate `node` against its `_target_` dataclass (keys, types, nothing missing), then construct it.

    A value that has a `_target_` of its own, as a method's base, is built likewise.
    """
    from dqbench.launching.explain import explain

    where = str(node._key() or "")
    try:
        cls = pkgutil.resolve_name(node._target_)
    except (ImportError, AttributeError, ValueError) as error:
        line = f"{where}._target_={node._target_} is no class ({one_line(error)}); allowed: a dotted name"
        raise UserError(line) from error
    values = {key: value for key, value in node.items() if not key.startswith("_")}
    parts = {key: build(value) for key, value in values.items() if OmegaConf.is_dict(value) and "_target_" in value}
    checked = OmegaConf.structured(cls, flags={"allow_objects": True})
    try:
        return OmegaConf.to_object(OmegaConf.merge(checked, {**values, **parts}))
    except OmegaConfBaseException as error:
        raise UserError(explain(error, where)) from error


def compose(overrides: list[str], hydra_node: bool = False) -> DictConfig:
    """The resolved-on-access config for command-line overrides, as `python -m dqbench` would see it."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    register()
    if GlobalHydra.instance().is_initialized():
        return hydra.compose("config", overrides, return_hydra_config=hydra_node)
    with hydra.initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        return hydra.compose("config", overrides, return_hydra_config=hydra_node)


def expand(overrides: list[str]) -> Iterator[list[str]]:
    """The cells of a sweep as lists of overrides, in Hydra's own order (its basic sweeper does the splitting)."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(overrides=overrides)
    for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
        yield from (list(cell) for cell in batch)
