"""What this environment has, and what to fix before a run: python -m dqbench.doctor [results=DIR] [json=PATH]

Exit status 0 when a run can work, 1 when something must be fixed first.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dqbench.commands import command, split_json
from dqbench.config import data_root
from dqbench.errors import UserError

GB = 1e9
ENOUGH_DISK = 5 * GB  # activations of a reconstruction unit, samples, artifacts
ENOUGH_MEMORY = 3 * GB
SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HF_HOME", "WANDB_MODE", "WANDB_BASE_URL")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fix` says what to do; `blocks` that no run works before it is done."""

    topic: str
    found: str
    fix: str = ""
    blocks: bool = False


def findings(results: Path) -> Iterator[Finding]:
    """All that is looked at, in the order it is printed."""
    yield python()
    yield from packages(requirements())
    yield from torch_pair()
    yield configs()
    yield disk(results)
    yield memory()
    yield wandb_mode()
    yield hub()
    yield slurm()
    yield Finding("settings", ", ".join(f"{k}={os.environ[k]}" for k in SETTINGS if k in os.environ) or "none")


def python() -> Finding:
    """The interpreter."""
    old = sys.version_info < (3, 11)
    fix = "install Python 3.11 or newer and make the environment with it: make install PYTHON=python3.11"
    return Finding("python", f"{platform.python_version()}, {platform.platform(terse=True)}", fix if old else "", old)


def requirements() -> list[str]:
    """What dqbench requires: of the checkout's pyproject.toml, else of the installed package."""
    path = data_root() / "pyproject.toml"
    if path.is_file():
        return tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [line for line in importlib.metadata.requires("dqbench") or [] if "extra ==" not in line]


def packages(required: Sequence[str]) -> Iterator[Finding]:
    """The installed version of each requirement; one that is absent or outside its bounds blocks."""
    from packaging.requirements import Requirement

    installed: list[str] = []
    for requirement in map(Requirement, required):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        if version == "absent" or not requirement.specifier.contains(version, prereleases=True):
            yield Finding("packages", f"{requirement.name} {version}", f"install {requirement}: make install", True)
        else:
            installed.append(f"{requirement.name} {version}")
    yield Finding("packages", ", ".join(installed))


def torch_pair() -> Iterator[Finding]:
    """torch and torchvision are of one build (else torchvision's operators are missing), and the devices torch sees."""
    try:
        import torch
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        found = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision")]
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        fix = "torch and torchvision do not fit together: install both at once, from one index: make clean install"
        yield Finding("torch", f"{type(error).__name__}: {str(error).splitlines()[0]}", fix, True)
        return
    yield Finding("torch", f"{', '.join(found)}: their operators work together")
    yield Finding("devices", devices())


def devices() -> str:
    """Accelerators, and the threads of the CPU."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [f"cpu ({torch.get_num_threads()} threads, {cores} cores)"]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} ({card.name}, {card.total_memory / GB:.0f} GB)")
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found)


def configs() -> Finding:
    """conf/, and the weights of the miniatures that the default run needs."""
    conf = data_root() / "conf"
    if not (conf / "config.yaml").is_file():
        return Finding("configs", f"none in {data_root()}", "incomplete installation: install dqbench again", True)
    zoo = Path(__file__).parent / "zoo"
    absent = [name for name in ("digits_ddpm", "digits_classifier") if not any(zoo.glob(f"{name}/**/*.safetensors"))]
    fix = "make the weights: " + ", ".join(f"python -m dqbench.zoo.train {name}" for name in absent) if absent else ""
    found = f"{conf}, embedded models {'absent: ' + ', '.join(absent) if absent else 'present'}"
    return Finding("configs", found, fix, bool(absent))


def disk(results: Path) -> Finding:
    """Free space where results are written, and whether they can be."""
    folder = next(path for path in (results.resolve(), *results.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / GB:.1f} GB free for {results}"
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        return Finding("disk", found, f"{folder} cannot be written: choose another folder with paths.results=DIR", True)
    fix = f"free {ENOUGH_DISK / GB:.0f} GB or choose another folder with paths.results=DIR"
    return Finding("disk", found, fix if free < ENOUGH_DISK else "", free < 0.1 * ENOUGH_DISK)


def memory() -> Finding:
    """Memory that a run could take now."""
    import psutil

    now = psutil.virtual_memory()
    fix = "close other programs, or lower sampler.batch_size and recon.batch_size"
    found = f"{now.available / GB:.1f} of {now.total / GB:.1f} GB available"
    return Finding("memory", found, fix if now.available < ENOUGH_MEMORY else "")


def wandb_mode() -> Finding:
    """What tracking=wandb would do here."""
    from dqbench.tracking import MODES, choose_mode

    mode = choose_mode("auto")
    if mode not in MODES[1:]:
        allowed = ", ".join(MODES[1:])
        return Finding("w&b", f"WANDB_MODE={mode}", f"WANDB_MODE={mode} is unknown; allowed: {allowed}; or unset it")
    why = "WANDB_MODE" if os.environ.get("WANDB_MODE") else "a key" if mode == "online" else "no key"
    return Finding("w&b", f"{mode} ({why})")


def hub() -> Finding:
    """Whether checkpoints may be fetched, and where fetched ones lie."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return Finding("hub", f"{'offline: only checkpoints in' if offline else 'downloads into'} {home}")


def slurm() -> Finding:
    """Whether hydra/launcher=slurm could submit from here."""
    found = shutil.which("sbatch")
    return Finding("slurm", found or "sbatch not found: sweeps run on this machine")


def main(argv: Sequence[str]) -> None:
    """Print the findings, then what to fix; exit with 1 if something blocks."""
    from dqbench.results import atomic_write

    rest, target = split_json(list(argv))
    unknown = [arg for arg in rest if not arg.startswith("results=")]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; allowed: results=DIR, json=PATH")
    found = list(findings(Path(rest[-1].removeprefix("results=") if rest else "results")))
    show(found)
    if target is not None:
        atomic_write(target, json.dumps([asdict(finding) for finding in found], indent=1) + "\n")
    sys.exit(int(any(finding.blocks for finding in found)))


def show(found: Sequence[Finding]) -> None:
    """The report for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table.grid(padding=(0, 2))
    for finding in found:
        mark = "[red]✗[/]" if finding.blocks else "[yellow]![/]" if finding.fix else "[green]✓[/]"
        table.add_row(mark, f"[bold]{finding.topic}[/]", finding.found)
    console.print(table)
    to_fix = [finding for finding in found if finding.fix]
    console.print("\nNothing to fix." if not to_fix else "\nTo fix:")
    for finding in to_fix:
        console.print(f"  {'must' if finding.blocks else 'should'}: {finding.fix}", markup=False, highlight=False)


if __name__ == "__main__":
    command(main)()
