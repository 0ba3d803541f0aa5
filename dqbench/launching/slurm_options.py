"""Options of hydra/launcher=slurm, and what sbatch is told."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dqbench.errors import UserError, check_choice

LEAST = {
    "cpus": 1,
    "gpus": 0,
    "processes": 1,
    "array_parallelism": 1,
    "max_array_size": 1,
    "max_num_timeout": 0,
    "signal_delay_s": 0,
    "poll_s": 0.1,
}
UNITS = ("d", "h", "m", "s")
FORMS = {  # Slurm's forms of a time, as the units of its fields
    r"(\d+)": "m",
    r"(\d+):(\d+)": "ms",
    r"(\d+):(\d+):(\d+)": "hms",
    r"(\d+)-(\d+)": "dh",
    r"(\d+)-(\d+):(\d+)": "dhm",
    r"(\d+)-(\d+):(\d+):(\d+)": "dhms",
}
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@dataclass
class Options:
    """The keys of hydra.launcher; conf/hydra/launcher/slurm.yaml says what each is."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    time: str
    mem: str | None
    cpus: int
    gpus: int
    processes: int | None
    array_parallelism: int
    max_array_size: int
    setup: list[str]
    sbatch: dict[str, Any]
    srun: list[str]
    python: str | None
    max_num_timeout: int
    signal_delay_s: int
    poll_s: float
    on_interrupt: str  # cancel | detach


def read_options(values: Mapping[str, Any]) -> Options:
    """The options, types and ranges checked."""
    from dqbench.launching.explain import explain

    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), values))
    except OmegaConfBaseException as error:
        raise UserError(explain(error, "hydra.launcher")) from error
    for name, least in LEAST.items():
        if (value := getattr(options, name)) is not None and not value >= least:
            raise UserError(f"hydra.launcher.{name}={value} is out of range; allowed: {least} or more")
    check_choice("hydra.launcher.on_interrupt", options.on_interrupt, ("cancel", "detach"))
    minutes(options.time)
    return options


def require_slurm() -> None:
    """Raise UserError on a machine that cannot submit."""
    if missing := [name for name in ("sbatch", "squeue", "scancel", "srun") if shutil.which(name) is None]:
        line = f"hydra/launcher=slurm: {', '.join(missing)} not found on this machine"
        raise UserError(f"{line}; run on a node of a Slurm cluster, or choose hydra/launcher=basic or accelerate")


def minutes(time: str) -> int:
    """Whole minutes of a time as Slurm writes it, rounded up."""
    for form, units in FORMS.items():
        if (found := re.fullmatch(form, time)) and int(re.sub(r"\D", "", time)):
            seconds = sum(int(value) * SECONDS[unit] for value, unit in zip(found.groups(), units, strict=True))
            return -(-seconds // 60)
    raise UserError(f"hydra.launcher.time={time} is no time; allowed: minutes, h:m:s, d-h or d-h:m:s, more than 0")


def parameters(options: Options) -> dict[str, Any]:
    """What submitit makes an sbatch script of. A task may be requeued; srun gets its cores (22.05 forgets them)."""
    named = {key: getattr(options, key) for key in ("partition", "account", "qos", "constraint")}
    extra = {"requeue": True, "mem": options.mem, "gres": f"gpu:{options.gpus}" if options.gpus else None}
    return {
        **given(named),
        "job_name": "dqbench",
        "wckey": None,  # submitit would set one, which some clusters refuse
        "time": minutes(options.time),
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": options.cpus,
        "array_parallelism": options.array_parallelism,
        "signal_delay_s": options.signal_delay_s,
        "setup": options.setup or None,
        "srun_args": [f"--cpus-per-task={options.cpus}", *options.srun],
        "stderr_to_stdout": True,
        "additional_parameters": {**given(extra), **options.sbatch},
    }


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {key: value for key, value in values.items() if value is not None}
