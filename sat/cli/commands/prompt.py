"""Prompts rewritten by a language model: the work of ``prompt_optimize.py``, and of ``--optimize-prompt``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sat.apps.prompts.optimizer import Cache, Endpoint, OptimizerError, PromptOptimizer
from sat.cli.arguments import output_file
from sat.cli.main_guard import UsageError
from sat.sampling.prompts import Prompt, check_text, read_prompt_file
from sat.util import log as logs
from sat.util.ending import FAILED
from sat.util.host import write_text
from sat.util.log import title

if TYPE_CHECKING:
    from sat.config.cascade import Cascade
    from sat.config.schema import Experiment
    from sat.parallel.launch import Runtime

log = logging.getLogger(__name__)


def work(args: argparse.Namespace) -> int:
    """Rewrite the prompts, print or write them; the exit code."""
    logs.setup(debug=args.debug, verbosity=args.verbosity)
    prompts = list(args.prompt or []) or read_prompt_file(args.prompt_file)
    for index, prompt in enumerate(prompts):
        check_text(prompt, f"prompt {index}")
        if not prompt.strip():
            raise UsageError(f"prompt {index} is empty: there is nothing to rewrite")
    endpoint = Endpoint.found(args.base_url, args.model, args.api_key)
    cache = None if args.no_cache else Cache.of_user()
    tokenizer = None  # of the config that limits the length
    if args.base:
        from sat.config.build import find_tokenizer
        from sat.config.cascade import load_cascade

        first = load_cascade(args.base, list(args.overrides)).stages[0].experiment
        tokenizer = find_tokenizer(first.conditioning, first.checkpoint)
    if args.output is not None:
        output_file(args.output, "--output")
    optimizer = PromptOptimizer(endpoint, tokenizer, cache)
    if args.dry_run:
        requests = [{"model": endpoint.model, "messages": optimizer.messages(prompt)} for prompt in prompts]
        print(json.dumps(requests if len(requests) > 1 else requests[0], indent=2, ensure_ascii=False))
        return 0
    answers = optimizer.all(prompts)
    failed = [answer for answer in answers if isinstance(answer, OptimizerError)]
    if len(failed) == len(answers):
        raise failed[0]
    lines = [
        prompt if isinstance(answer, OptimizerError) else answer.text
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for number, answer in enumerate(answers):
        if isinstance(answer, OptimizerError):
            print(f"error: prompt {number} is left as it is: {answer}", file=sys.stderr)
    if args.output is None:
        print("\n".join(lines))
    else:
        write_text(args.output, "\n".join(lines) + "\n")
        print(args.output)
    return FAILED if failed else 0


class Rewriting:
    """``sample.py --optimize-prompt``: prompts are rewritten before they are drawn.

    What cannot be rewritten stays as it is, with a notice. The key comes from the environment alone.
    """

    def __init__(self, args: argparse.Namespace, experiment: Experiment) -> None:
        if experiment.sampling.share is not None:
            raise UsageError(
                "--optimize-prompt would ask once for every share: rewrite the file first "
                "(prompt_optimize.py --prompt-file FILE --output FILE)"
            )
        from sat.config.build import find_tokenizer

        endpoint = Endpoint.found(args.optimizer_url, args.optimizer_model)
        tokenizer = find_tokenizer(experiment.conditioning, experiment.checkpoint)
        self.optimizer = PromptOptimizer(endpoint, tokenizer, Cache.of_user())

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The texts to draw; each goes to the log."""
        out = []
        for prompt, answer in zip(prompts, self.optimizer.all(prompts), strict=True):
            if isinstance(answer, OptimizerError):
                log.warning("%s is drawn as it is: %s", repr(title(prompt)), answer)
            else:
                log.info("%s is drawn as: %s", repr(title(prompt)), answer.text)
            out.append(prompt if isinstance(answer, OptimizerError) else answer.text)
        return out

    def whole(
        self, cascade: Cascade, prompts: Sequence[Prompt], runtime: Runtime
    ) -> tuple[Cascade, list[Prompt]]:
        """(cascade, prompts): rewritten, in its configs too, so that its record repeats the run.

        The main rank asks for all.
        """
        from sat.config.cascade import Cascade
        from sat.parallel.collectives import from_main

        texts: list[str] = from_main(
            self.texts([prompt.text for prompt in prompts]) if runtime.is_main else []
        )
        stages = []
        for stage in cascade.stages:
            experiment = stage.experiment
            sampling = replace(experiment.sampling, prompt=texts, prompt_file=None)
            stages.append(replace(stage, experiment=replace(experiment, sampling=sampling)))
        rewritten = [replace(prompt, text=text) for prompt, text in zip(prompts, texts, strict=True)]
        return Cascade(stages, cascade.keep), rewritten
