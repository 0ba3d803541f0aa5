"""lm-evaluation-harness on a masked-diffusion pipeline: `pip install dqbench[eval]`; the harness downloads its tasks.

Log-likelihoods are Monte-Carlo bounds, as in LLaDA's evaluation (Nie et al. 2025, arXiv:2502.09992); texts come from
the pipeline's own sampler. The harness is imported when it is asked for.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dqbench.errors import UserError
from dqbench.sampling import generators, sample_seed
from dqbench.text.likelihood import count_masks, nll_bound
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.schedulers import LLaDAScheduler


@dataclass
class Protocol:
    """How the harness's requests are answered."""

    draws: int  # masks behind a log-likelihood; 128 in the papers; of a single token one is taken
    batch_size: int
    max_length: int  # of prompt and answer; longer prompts lose their beginning
    check_greedy: bool | None  # also ask whether greedy decoding gives the continuation, a pass for each of its tokens;
    # None: where a question has one continuation, whose greediness is then its accuracy (LAMBADA)
    steps: int  # of the sampler, for generated texts
    guidance: float
    seed: int


def evaluate(pipe: MaskedDiffusionPipeline, protocol: Protocol, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """The harness's results for its tasks; `options` are simple_evaluate's (num_fewshot, limit, ...)."""
    return harness().simple_evaluate(model=harness_model(pipe, protocol), tasks=list(tasks), **options)


def harness_model(pipe: MaskedDiffusionPipeline, protocol: Protocol) -> Any:
    """The pipeline as a model of the harness."""
    harness()
    from lm_eval.api.model import LM

    return type("MaskedDiffusionLM", (Answers, LM), {})(pipe, protocol)


@functools.cache
def task_index(include: str | None) -> Any:
    """The harness's TaskManager: its own tasks, and those that the YAML files in the folder `include` describe."""
    harness()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def harness() -> Any:
    """The package lm_eval. Raises UserError where it is not installed."""
    try:
        import lm_eval
    except ImportError as error:
        raise UserError("lm-evaluation-harness is not installed; needed: pip install 'dqbench[eval]'") from error
    return lm_eval


class Answers:
    """The harness's three kinds of request; mixed into its class LM."""

    def __init__(self, pipe: MaskedDiffusionPipeline, protocol: Protocol) -> None:
        super().__init__()
        self.pipe, self.protocol = pipe, protocol

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(bound on log p(continuation | context), whether it is the greedy one) for each request's two texts."""
        pairs, asked = [self._encode_pair(*request.args) for request in requests], self._asks_greedy(requests)
        return [
            (self._score(*pair), greedy and self._is_greedy(*pair)) for pair, greedy in zip(pairs, asked, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The bound on log p(text), the text cut into pieces of at most max_length tokens."""
        texts, size = [self._tokens(request.args[0]) for request in requests], self.protocol.max_length
        return [sum(self._score([], text[i : i + size]) for i in range(0, len(text), size)) for text in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The sampled completion of each context, cut off before the first of its stop texts."""
        size = self.protocol.batch_size
        texts = [self._complete(requests[i : i + size], i) for i in range(0, len(requests), size)]
        return [cut(text, request.args[1]) for text, request in zip(sum(texts, []), requests, strict=True)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's template writes it."""
        return self.pipe.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use; the harness records it."""
        return self.pipe.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of requests."""
        return self.pipe.tokenizer.name_or_path.replace("/", "__")

    def _tokens(self, text: str) -> list[int]:
        return self.pipe.tokenizer([text])["input_ids"][0]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both; spaces at the seam belong to the continuation, as in the harness."""
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        prompt, whole = self._tokens(context), self._tokens(context + continuation)
        target = whole[len(prompt) :]
        room = self.protocol.max_length - len(target)
        if not target or room < 0:
            raise UserError(f"a continuation has {len(target)} tokens; allowed: 1 to {self.protocol.max_length}")
        return last(prompt, room), target

    def _score(self, prompt: list[int], target: list[int]) -> float:
        """The bound on log p(target | prompt), in nats. All draws mask a single token alike: one is taken."""
        row, draws = torch.tensor([prompt + target]), self.protocol.draws if len(target) > 1 else 1
        asked = torch.arange(row.shape[1])[None] >= len(prompt)
        masks = count_masks(asked, draws, self.protocol.seed)
        return -float(nll_bound(self.pipe.model, row, masks, batch_size=self.protocol.batch_size).mean())

    def _asks_greedy(self, requests: Sequence[Any]) -> list[bool]:
        """For each request whether it matters that its continuation is the greedy one."""
        if self.protocol.check_greedy is not None:
            return [self.protocol.check_greedy] * len(requests)
        offered = defaultdict(set)
        for request in requests:
            offered[request.task_name, request.doc_id].add(request.idx)
        return [len(offered[request.task_name, request.doc_id]) == 1 for request in requests]

    def _is_greedy(self, prompt: list[int], target: list[int]) -> bool:
        """Whether filling in the surest token again and again gives the target."""
        greedy = copy.copy(self.pipe)
        greedy.scheduler = LLaDAScheduler(gen_length=len(target))
        steps = {"num_inference_steps": len(target), "guidance_scale": self.protocol.guidance}
        return greedy([prompt], output_type="pt", **steps).generated[0].tolist() == target

    def _complete(self, requests: Sequence[Any], first: int) -> list[str]:
        """Completions of a batch of requests, the first of which has index `first`."""
        room = self.protocol.max_length - self.pipe.scheduler.config.gen_length
        prompts = [last(self._tokens(request.args[0]), room) for request in requests]
        seeds = [sample_seed(self.protocol.seed, first + i) for i in range(len(prompts))]
        settings = {"num_inference_steps": self.protocol.steps, "guidance_scale": self.protocol.guidance}
        return self.pipe(prompts, generators(seeds), **settings).texts


def last(ids: list[int], length: int) -> list[int]:
    """The last `length` token ids."""
    return ids[max(len(ids) - length, 0) :]


def cut(text: str, settings: dict[str, Any]) -> str:
    """The text before the first of its stop texts."""
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
