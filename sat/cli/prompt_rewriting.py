"""``sample.py --optimize-prompt``: prompts are rewritten by a language model before they are drawn."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from sat.apps.prompts.optimizer import Cache, Endpoint, OptimizerError, PromptOptimizer, Rewritten
from sat.cli.main_guard import UsageError
from sat.config.cascade import Cascade, Stage
from sat.config.parts import find_tokenizer
from sat.config.schema import Experiment
from sat.parallel.collectives import from_main
from sat.parallel.launch import Runtime
from sat.sampling.generator import title
from sat.sampling.prompts import Prompt

log = logging.getLogger(__name__)


def optimizer(args: argparse.Namespace, experiment: Experiment) -> PromptOptimizer | None:
    """What rewrites the prompts; None where nobody asked for it. The key comes from the environment alone."""
    if not args.optimize_prompt:
        return None
    if experiment.sampling.share is not None:
        raise UsageError(
            "--optimize-prompt would ask once for every share: rewrite the file first "
            "(prompt_optimize.py --prompt-file FILE --output FILE)"
        )
    endpoint = Endpoint.found(args.optimizer_url, args.optimizer_model)
    return PromptOptimizer(
        endpoint, find_tokenizer(experiment.conditioning, experiment.checkpoint), Cache.of_user()
    )


def rewrite_all(
    ask: PromptOptimizer | None, cascade: Cascade, prompts: Sequence[Prompt], runtime: Runtime
) -> tuple[Cascade, Sequence[Prompt]]:
    """The cascade with rewritten prompts in its configs, so that its record repeats the run; the prompts.

    The main rank asks for all. What cannot be rewritten stays as it is, with a notice; without ``ask``, all.
    """
    if ask is None:
        return cascade, prompts
    texts = [prompt.text for prompt in prompts]
    answers = ask.all(texts) if runtime.is_main else []
    new: list[str] = from_main([_told(*pair) for pair in zip(texts, answers, strict=False)])
    stages = [_with_prompts(stage, new) for stage in cascade.stages]
    return Cascade(stages, cascade.keep), [replace(p, text=t) for p, t in zip(prompts, new, strict=True)]


def one_by_one(ask: PromptOptimizer | None) -> Callable[[str], str]:
    """Rewriting of prompts that are typed in turn; without ``ask`` they stay as they are."""
    if ask is None:
        return str.strip
    return lambda text: _told(text, ask.all([text])[0])


def _told(prompt: str, answer: Rewritten | OptimizerError) -> str:
    """The text to draw, and what became of the prompt in the log."""
    if isinstance(answer, OptimizerError):
        log.warning("%s is drawn as it is: %s", repr(title(prompt)), answer)
        return prompt
    log.info("%s is drawn as: %s", repr(title(prompt)), answer.text)
    return answer.text


def _with_prompts(stage: Stage, prompts: list[str]) -> Stage:
    experiment = stage.experiment
    sampling = replace(experiment.sampling, prompt=prompts, prompt_file=None)
    return Stage(stage.name, replace(stage.loaded, experiment=replace(experiment, sampling=sampling)))
