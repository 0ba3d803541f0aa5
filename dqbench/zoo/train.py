"""Train a miniature of the zoo: `python -m dqbench.zoo.train digits_ddpm`. Seeded, resumable, EMA weights."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf
from torch import Generator, Tensor, nn

from dqbench.commands import exit_status
from dqbench.config import build
from dqbench.errors import UserError
from dqbench.progress import track

ZOO = Path(__file__).parent


class Task(Protocol):
    """What is trained. All that is random is drawn from `generator`, on the CPU: draws do not depend on the device."""

    def model(self) -> nn.Module: ...
    def loss(self, model: nn.Module, batch_size: int, generator: Generator) -> Tensor: ...
    def evaluate(self, model: nn.Module) -> dict[str, float]: ...
    def save(self, model: nn.Module, folder: Path) -> None: ...


@dataclass
class Settings:
    seed: int
    iterations: int
    batch_size: int
    max_lr: float
    warmup: float  # share of the iterations
    weight_decay: float
    ema_decay: float
    checkpoint_every: int
    task: dict[str, Any]

    def build_task(self) -> Task:
        return build(OmegaConf.create(self.task))


class Trainer:
    """Model, its exponential moving average, optimizer, schedule and random state: all that a checkpoint holds."""

    def __init__(self, settings: Settings, device: str):
        self.settings, self.task = settings, settings.build_task()
        torch.manual_seed(settings.seed)
        self.model = self.task.model().to(device).train()
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=settings.weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.max_lr, total_steps=settings.iterations, pct_start=settings.warmup
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.iteration, self.seconds = 0, 0.0

    def step(self) -> float:
        loss = self.task.loss(self.model, self.settings.batch_size, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self._update_ema()
        self.iteration += 1
        return loss.item()

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Moving average with a short memory at first: decay = min(ema_decay, (1 + i) / (10 + i))."""
        decay = min(self.settings.ema_decay, (1 + self.iteration) / (10 + self.iteration))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer", "schedule")}
        progress = {"iteration": self.iteration, "seconds": self.seconds, "generator": self.generator.get_state()}
        return parts | progress | {"settings": vars(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "ema", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.iteration, self.seconds = state["iteration"], state["seconds"]


def fit(trainer: Trainer, checkpoint: Path) -> None:
    """Run to `settings.iterations`, from `checkpoint` if there is one."""
    resume(trainer, checkpoint)
    settings, start, losses = trainer.settings, time.perf_counter() - trainer.seconds, []
    remaining = range(trainer.iteration, settings.iterations)
    for _ in track(remaining, "training", settings.iterations, trainer.iteration):
        losses.append(trainer.step())
        trainer.seconds = time.perf_counter() - start
        if trainer.iteration % settings.checkpoint_every == 0:
            save_atomic(trainer.state_dict(), checkpoint)
            print(f"iteration {trainer.iteration}: mean loss {sum(losses) / len(losses):.4f}", file=sys.stderr)
            losses.clear()


def resume(trainer: Trainer, checkpoint: Path) -> None:
    if not checkpoint.exists():
        return
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state["settings"] != vars(trainer.settings):
        raise UserError(f"{checkpoint} was written with other settings: delete it to start again, or restore them")
    trainer.load_state_dict(state)


def save_atomic(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_stem(f"{path.stem}.partial")
    torch.save(state, partial)
    partial.replace(path)


def load_settings(name: str) -> Settings:
    """The settings in dqbench/zoo/<name>.yaml, checked against `Settings`."""
    path = ZOO / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(path.stem for path in ZOO.glob("*.yaml")))
        raise UserError(f"no miniature named {name!r}; known: {known}")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.load(path)))


def train(settings: Settings, folder: Path, device: str) -> dict[str, Any]:
    """Train, write the model and training.json (what the model card reports) to `folder`."""
    checkpoint = folder / "train_state.pt"
    trainer = Trainer(settings, device)
    fit(trainer, checkpoint)
    trainer.task.save(trainer.ema, folder)
    report = trainer.task.evaluate(trainer.ema) | {
        "iterations": trainer.iteration,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "parameters": sum(p.numel() for p in trainer.ema.parameters()),
        "seconds": round(trainer.seconds),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    checkpoint.unlink()
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dqbench.zoo.train", description=__doc__)
    parser.add_argument("name", help="digits_ddpm, digits_classifier or text_mdlm")
    parser.add_argument("--out", type=Path, help="folder to write (default: the one shipped with the package)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with exit_status():
        report = train(load_settings(args.name), args.out or ZOO / args.name, args.device)
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
