"""What lm-evaluation-harness reports, as metrics of a row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from dqbench.config import build, compose
from dqbench.errors import UserError
from dqbench.metrics.base import difference
from dqbench.text import harness_metrics, modality
from dqbench.text.data import TASKS

ZOO = Path(harness_metrics.__file__).parents[1] / "zoo"
RESULTS = {
    "results": {
        "piqa": {
            "alias": "piqa",
            "acc,none": 0.75,
            "acc_stderr,none": 0.01,
            "bleu,none": 3.0,
            "bleu_stderr,none": "N/A",
            "ter,none": 0.5,
            "ter_stderr,none": 0.1,
        }
    },
    "n-samples": {"piqa": {"original": 100, "effective": 40}},
    "versions": {"piqa": 1.0},
    "higher_is_better": {"piqa": {"acc": True, "ter": False}},
}
INDEX = SimpleNamespace(all_tasks=["mmlu", "piqa"])


def scorer(*overrides: str) -> harness_metrics.HarnessMetrics:
    return build(compose(["model=llada_8b_base", *overrides]).metrics)


def test_measures_with_a_standard_error_are_metrics(monkeypatch, caplog):
    asked = []

    def evaluate(pipe, protocol, tasks, **options):
        asked.append((protocol.draws, tasks, options))
        return RESULTS

    monkeypatch.setattr(harness_metrics, "evaluate", evaluate)
    monkeypatch.setattr(harness_metrics, "task_index", lambda include: INDEX)
    own = scorer("~metrics.tasks", "+metrics.tasks={piqa: 5}", "metrics.limit=40", "metrics.chat=true")
    found = own.score_network(None, None)
    given = {"num_fewshot": 5, "limit": 40, "task_manager": INDEX}
    assert asked == [(128, ["piqa"], given | {"apply_chat_template": True, "fewshot_as_multiturn": True})]
    assert set(found) == {"piqa_acc", "piqa_ter"} and not found["piqa_ter"].higher_is_better
    assert "task version 1.0" in found["piqa_acc"].protocol and "piqa has no standard error for bleu=3.0" in caplog.text
    metric = found["piqa_acc"]
    assert (metric.value, metric.n, metric.higher_is_better) == (0.75, 40, True)
    assert metric.high - metric.value == pytest.approx(0.0196) and "5-shot" in metric.protocol
    assert difference(metric, metric)["high"] == pytest.approx(0.0196 * np.sqrt(2))
    assert own.score(np.zeros((2, 2)), None, Path()) == {}


def test_a_group_counts_the_questions_of_its_tasks():
    own = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    results = {
        "results": {"mmlu": own, "mmlu_stem": own, "anatomy": own, "virology": own},
        "n-samples": {"anatomy": {"effective": 3}, "virology": {"effective": 4}},
        "group_subtasks": {"mmlu": ["mmlu_stem", "virology"], "mmlu_stem": ["anatomy"]},
    }
    assert [harness_metrics.questions(results, name) for name in results["results"]] == [7, 3, 3, 4]


def test_unknown_tasks_and_folders_are_told_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(harness_metrics, "harness", lambda: None)
    monkeypatch.setattr(harness_metrics, "task_index", lambda include: INDEX)
    scorer("~metrics.tasks", "+metrics.tasks={mmlu: 5}", f"metrics.include={tmp_path}").check(None, 2)
    with pytest.raises(UserError, match="no arc_challenge, arc_easy, hellaswag, winogrande; allowed"):
        scorer().check(None, 2)
    with pytest.raises(UserError, match="metrics.include=/nowhere is no folder"):
        scorer("metrics.include=/nowhere").check(None, 2)


def test_an_edited_task_is_another_and_bytecode_is_none(tmp_path, monkeypatch):
    own = scorer(f"metrics.include={tmp_path}")
    (tmp_path / "mine.yaml").write_text("task: mine")
    first = own.weights_hash()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "utils.pyc").write_bytes(b"1")
    assert own.weights_hash() == first
    (tmp_path / "mine.yaml").write_text("task: yours")
    assert own.weights_hash() != first
    before = scorer().weights_hash()
    monkeypatch.setattr(harness_metrics, "version", lambda library: "99")
    assert scorer().weights_hash() != before  # another harness may ask otherwise


def test_texts_must_leave_room_for_a_prompt():
    sampler = OmegaConf.to_object(compose(["model=llada_8b_base"]).sampler)
    scorer("metrics.protocol.max_length=1025").check_model(None, sampler)
    short, model = scorer("metrics.protocol.max_length=1024"), SimpleNamespace(data=TASKS)
    cell = SimpleNamespace(metrics=short, sampler=sampler, model=model)
    with pytest.raises(UserError, match="leaves no room .*gen_length=1024 tokens; allowed: more than 1024"):
        modality.check(cell)


def test_chat_needs_a_model_that_chats(tmp_path):
    cfg = compose(["model=llada_8b_base", f"model.path={tmp_path}", "metrics.chat=true"])
    own, model, sampler = build(cfg.metrics), OmegaConf.to_object(cfg.model), OmegaConf.to_object(cfg.sampler)
    (tmp_path / "config.json").touch()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="metrics.chat=true: model=llada_8b_base has no chat template; allowed: "):
        own.check_model(model, sampler)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    own.check_model(model, sampler)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    own.check_model(model, sampler)


def test_a_local_task_and_a_group_are_scored_by_the_harness_itself(tmp_path):
    """lm-evaluation-harness as it is, where it is installed: questions from files, none fetched."""
    pytest.importorskip("lm_eval")
    from dqbench.text.pipeline import MaskedDiffusionPipeline

    (tmp_path / "sums.jsonl").write_text('{"q": "      12+34=", "a": "46"}\n{"q": "      19+98=", "a": "117"}\n')
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}", "target_delimiter": ""}
    common["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "sums.jsonl")}, "cache_dir": str(tmp_path / "c")}
    choose = {"task": "choose", "output_type": "multiple_choice", "doc_to_target": "a", "doc_to_choice": ["46", "117"]}
    choose["metric_list"] = [{"metric": "acc"}]
    write = {
        "task": "write",
        "output_type": "generate_until",
        "doc_to_target": "a",
        "metric_list": [{"metric": "exact_match"}],
    }
    group = {"group": "chosen", "task": ["choose"], "aggregate_metric_list": [{"metric": "acc"}]}
    for name, content in {"choose": common | choose, "write": common | write, "chosen": group}.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    changes = (f"metrics.include={tmp_path}", "metrics.protocol.max_length=64", "metrics.protocol.steps=8")
    own = scorer("~metrics.tasks", "+metrics.tasks={chosen: 0, write: 0}", *changes)
    own.check(None, 2)
    pipe = MaskedDiffusionPipeline.from_pretrained(ZOO / "text_mdlm")
    found = own.score_network(pipe, None)
    own.chat, pipe.tokenizer.chat_template = True, "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    assert own.score_network(pipe, None) == found  # this template adds nothing
    assert {name: (metric.value, metric.n) for name, metric in found.items()} == {
        "chosen_acc": (1.0, 2), "choose_acc": (1.0, 2), "write_exact_match": (1.0, 2)
    }  # fmt: skip


def test_a_missing_harness_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'dqbench\[eval\]'"):
        scorer().check(None, 2)
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    with pytest.raises(UserError, match="tasks is empty"):
        scorer("~metrics.tasks", "+metrics.tasks={}").check(None, 2)
