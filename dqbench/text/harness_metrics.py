"""lm-evaluation-harness as metrics: the papers' protocol for real checkpoints. Needs `pip install 'dqbench[eval]'`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from dqbench import processes
from dqbench.config import Model, Sampler
from dqbench.errors import UserError
from dqbench.identity import digest
from dqbench.metrics.base import Metric
from dqbench.models import snapshot
from dqbench.provenance import version
from dqbench.stages import checksums
from dqbench.text.lm_eval import Protocol, evaluate, harness, task_index

log = logging.getLogger(__name__)
Z_95 = 1.96  # of the harness's own standard errors
LOWER = ("perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity")  # less is better, where it does not say


@dataclass
class HarnessMetrics:
    version: int
    tasks: dict[str, int]  # task -> examples shown before each question
    include: str | None  # a folder of YAML files that describe tasks of your own; None: the harness's alone
    limit: int | None  # questions of each task; None: all
    chat: bool  # write questions and examples as turns of the tokenizer's chat template
    protocol: Protocol

    modalities = ("text",)

    def check(self, reference: str | None, num_samples: int) -> None:
        """Raise UserError where the harness is missing, nothing is asked of it, or a task that it has not."""
        harness()
        if not self.tasks:
            raise UserError(
                "metrics.tasks is empty; allowed: tasks of lm-evaluation-harness with their few-shot number"
            )
        if self.include is not None and not Path(self.include).is_dir():
            raise UserError(f"metrics.include={self.include} is no folder; needed: YAML files of tasks")
        if unknown := sorted(self.tasks.keys() - set(task_index(self.include).all_tasks)):
            listed = "allowed: those that `lm_eval ls tasks` lists, and those in metrics.include"
            raise UserError(f"metrics.tasks: the harness has no {', '.join(unknown)}; {listed}")

    def check_model(self, model: Model, sampler: Sampler) -> None:
        """Raise UserError where the sampler's texts leave no room for a prompt, or chat is asked of no chat model."""
        if self.chat and not has_chat_template(Path(snapshot(model))):
            raise UserError(f"metrics.chat=true: model={model.name} has no chat template; allowed: metrics.chat=false")
        length = sampler.kwargs.get("gen_length")
        if length is not None and length >= self.protocol.max_length:
            line = f"metrics.protocol.max_length={self.protocol.max_length} leaves no room for a prompt"
            raise UserError(f"{line} before sampler.kwargs.gen_length={length} tokens; allowed: more than {length}")

    def score(
        self, samples: np.ndarray, reference: str | None, cache_dir: Path, *, device: str = "cpu"
    ) -> dict[str, Metric]:
        """Nothing: the harness asks its own questions."""
        return {}

    def score_network(self, pipe: DiffusionPipeline, model: Model) -> dict[str, Metric]:
        """Every measure of every task: TASK_MEASURE. Of several processes the main one asks."""
        return processes.agreed(lambda: self._ask(pipe))

    def _ask(self, pipe: DiffusionPipeline) -> dict[str, Metric]:
        turns = {"apply_chat_template": self.chat, "fewshot_as_multiturn": self.chat}
        found, options = {}, {"limit": self.limit, "task_manager": task_index(self.include), **turns}
        for task, shots in self.tasks.items():
            results = evaluate(pipe, self.protocol, [task], num_fewshot=shots, **options)
            for name, own in results["results"].items():
                found |= measures(name, own, results, shots)
        return found

    def reference_hash(self, reference: str | None, cache_dir: Path, *, device: str = "cpu") -> None:
        """What is asked comes with the harness: see weights_hash()."""
        return None

    def weights_hash(self) -> str:
        """Of what asks: the harness by its version, the files in metrics.include by their content."""
        files = {} if self.include is None else checksums(Path(self.include))
        own = {name: found for name, found in files.items() if "__pycache__" not in name}
        return digest({"lm-eval": version("lm-eval"), "include": own})


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a checkpoint's folder, or in a pipeline's, has one."""
    for place in (folder, folder / "tokenizer"):
        settings = place / "tokenizer_config.json"
        if (place / "chat_template.jinja").exists() or (
            settings.exists() and json.loads(settings.read_text()).get("chat_template")
        ):
            return True
    return False


def questions(results: Mapping[str, Any], name: str) -> int:
    """How many questions a task was asked, or all tasks of a group, such as mmlu, were."""
    if name in results["n-samples"]:
        return results["n-samples"][name]["effective"]
    return sum(questions(results, part) for part in results["group_subtasks"].get(name, []))


def measures(task: str, own: Mapping[str, Any], results: Mapping[str, Any], shots: int) -> dict[str, Metric]:
    """The harness's measures "acc,none" of one task that have a standard error, "acc_stderr,none"; others are told."""
    found, count = {}, questions(results, task)
    edition, better = (results.get(key, {}).get(task) for key in ("versions", "higher_is_better"))
    for key, value in own.items():
        name, _, kind = key.partition(",")
        if f"{name}_stderr,{kind}" not in own:  # no measure
            continue
        error = own[f"{name}_stderr,{kind}"]
        if not isinstance(error, float) or math.isnan(error):
            log.warning("%s has no standard error for %s=%s: it is not in the row", task, name, value)
            continue
        half, higher = Z_95 * error, (better or {}).get(name, name not in LOWER)
        told = f", task version {edition}" if edition is not None else ""
        protocol = f"lm-evaluation-harness, {shots}-shot, {kind}{told}; normal interval"
        found[f"{task}_{name}"] = Metric(value, value - half, value + half, count, "lm_eval", protocol, higher)
    return found
