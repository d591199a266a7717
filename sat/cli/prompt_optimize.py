"""``prompt_optimize.py``: a short prompt in any language becomes a full English description."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sat.apps.prompts.optimizer import (
    KEY,
    MODEL,
    NAME,
    URL,
    Cache,
    Counts,
    Endpoint,
    OptimizerError,
    PromptOptimizer,
)
from sat.cli.arguments import sort_overrides
from sat.cli.main_guard import FAILED, UsageError, guard
from sat.sampling.prompts import check_text, read_prompt_file
from sat.util import log as logs

DESCRIPTION = """\
Rewrite prompts with a language model on any server that speaks OpenAI's API, as long English descriptions,
which image models follow best.

  python prompt_optimize.py --prompt "a red apple"
  python prompt_optimize.py --prompt-file prompts.txt --output descriptions.txt --base configs/plus.yaml
"""
EPILOG = f"""\
The key is read from {KEY} (--api-key shows it to everyone on the machine); {URL} and {NAME} stand for
--base-url and --model. sample.py --optimize-prompt does the same before it draws. Exit codes: 0 done, 1 no
answer, 2 wrong arguments.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = argparse.ArgumentParser(
        prog="prompt_optimize.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = out.add_argument
    what = out.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="what to rewrite; repeat for several")
    what.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file with one prompt a line")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the descriptions there, one a line",
    )
    add(
        "--base-url",
        metavar="URL",
        help=f"the server: http://127.0.0.1:8000/v1 (default: {URL}, OpenAI)",
    )
    add("--model", metavar="NAME", help=f"its language model (default: {NAME}, {MODEL})")
    add("--api-key", metavar="KEY", help=f"its key (better: {KEY} in the environment)")
    add("--base", nargs="+", action="extend", metavar="YAML", help="config whose tokenizer limits the length")
    add("--no-cache", action="store_true", help="ask again for what was asked before")
    add("--dry-run", action="store_true", help="print what would be sent, as JSON, and send nothing")
    add("--debug", action="store_true", help="debug log; tracebacks of errors")
    out.set_defaults(overrides=[])
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, ask, print; the exit code."""
    args = parser().parse_args(argv)
    sort_overrides(args)
    return guard(lambda: work(args), debug=args.debug)


def work(args: argparse.Namespace) -> int:
    """What the command does with parsed arguments."""
    logs.setup(debug=args.debug)
    prompts = list(args.prompt or []) or read_prompt_file(args.prompt_file)
    for index, prompt in enumerate(prompts):
        check_text(prompt, f"prompt {index}")
        if not prompt.strip():
            raise UsageError(f"prompt {index} is empty: there is nothing to rewrite")
    endpoint = Endpoint.found(args.base_url, args.model, args.api_key)
    cache = None if args.no_cache else Cache.of_user()
    optimizer = PromptOptimizer(endpoint, tokenizer(args.base, args.overrides), cache)
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
    _give(lines, args.output)
    return FAILED if failed else 0


def tokenizer(bases: Sequence[str] | None, overrides: Sequence[str] = ()) -> Counts | None:
    """The tokenizer of a config; nothing without one."""
    if not bases:
        return None
    from sat.config.cascade import load_cascade
    from sat.config.parts import find_tokenizer

    experiment = load_cascade(bases, list(overrides)).stages[0].experiment
    return find_tokenizer(experiment.conditioning, experiment.checkpoint)


def _give(lines: Sequence[str], output: Path | None) -> None:
    """Print the descriptions, or write them where ``output`` says."""
    if output is None:
        print("\n".join(lines))
        return
    from sat.util.files import write_text

    write_text(output, "\n".join(lines) + "\n")
    print(output)


if __name__ == "__main__":
    sys.exit(main())
