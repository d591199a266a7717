"""``prompt_optimize.py``: a short prompt in any language becomes a full English description."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sat.cli.arguments import Parser, add_messages, sort_overrides
from sat.cli.main_guard import guard

KEY, URL, NAME, MODEL = "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL", "gpt-5-mini"
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
    out = Parser.of("prompt_optimize.py", DESCRIPTION, EPILOG)
    out.usage = "%(prog)s --prompt TEXT [options]"
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
    add("--no-cache", action="store_true", help="send every prompt, also those that were rewritten before")
    add("--dry-run", action="store_true", help="print what would be sent, as JSON, and send nothing")
    add_messages(out)
    out.set_defaults(overrides=[])
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, ask, print; the exit code."""
    args = parser().parse_args(argv)
    sort_overrides(args)

    def work() -> int:
        from sat.cli.commands import prompt

        return prompt.work(args)

    return guard(work, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
