"""The command ``cogview3``: one word for each command of :mod:`sat.cli`; also ``python -m cogview3``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from cogview3 import overwritten

COMMANDS = {
    "sample": "draw pictures for prompts",
    "train": "train, fine-tune or distil a model",
    "convert": "turn a checkpoint into another format; verify one",
    "prepare": "make training data and look at it",
    "evaluate": "draw and score a list of prompts; ask people",
    "plot": "plot training runs, denoising, attention, data, benchmarks",
    "web": "draw in a browser, and over HTTP",
    "prompt": "have a language model rewrite prompts",
    "doctor": "look at the machine, the packages and folders of runs",
}
HELP = """\
usage: cogview3 COMMAND [options]

{commands}

  cogview3 sample --prompt "a red apple"    draws with the small model that comes with the package
  cogview3 COMMAND --help                   options and examples of one command
  cogview3 --version
  source <(cogview3 completion bash)        names of commands and options on Tab; also zsh, fish

Several processes: torchrun --standalone --nproc_per_node N -m cogview3 COMMAND ...
Exit codes: 0 done, 1 failed, 2 wrong arguments or config, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` begins with; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if (reason := overwritten()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    if words[:1] == ["help"] and len(words) == 2 and words[1] in COMMANDS:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        lines = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
        print(HELP.format(commands=lines))
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from sat import __version__

        print(f"cogview3 {__version__}")
        return 0
    if words[0] == "completion":
        return completion(words[1:])
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, 1)
        hint = f": did you mean {near[0]!r}?" if near else f": expected {', '.join(COMMANDS)}"
        hint += " (its options follow it)" if words[0].startswith("-") else ""
        print(f"usage: cogview3 COMMAND [options]\ncogview3: error: {words[0]!r}{hint}", file=sys.stderr)
        return 2
    _tell_neighbour()
    sys.argv = [f"cogview3 {words[0]}", *words[1:]]
    code: int = import_module(f"sat.cli.{words[0]}").main()
    return code


BASH = """\
_cogview3() {{
    local words="{commands}"
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
    if [[ $COMP_CWORD == 1 || ${{COMP_WORDS[COMP_CWORD]}} == -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
    fi
}}
complete -o default -F _cogview3 cogview3"""
"""Anything but a command or an option is completed as a file's name."""


def completion(words: Sequence[str]) -> int:
    """Print the script that completes commands and options in a shell; the exit code."""
    if list(words) not in (["bash"], ["zsh"], ["fish"]):
        print("usage: cogview3 completion bash | zsh | fish", file=sys.stderr)
        return 2
    options = {name: import_module(f"sat.cli.{name}").parser().options() for name in COMMANDS}
    if words[0] == "fish":
        for name, what in COMMANDS.items():
            print(f"complete -c cogview3 -n __fish_use_subcommand -a {name} -d '{what}'")
            for option in sorted(o for o in options[name] if o.startswith("--")):
                print(f"complete -c cogview3 -n '__fish_seen_subcommand_from {name}' -l {option[2:]}")
        return 0
    if words[0] == "zsh":
        print("autoload -Uz bashcompinit && bashcompinit")
    cases = (f'        {name}) words="{" ".join(sorted(given))}" ;;' for name, given in options.items())
    print(BASH.format(commands=" ".join(COMMANDS), options="\n".join(cases)))
    return 0


def _tell_neighbour() -> None:
    """Say that SwissArmyTransformer, whose files lie in the same folder, does not work beside ours."""
    ours = Path(__file__).resolve().parents[1] / "sat"
    if (ours / "mpu").is_dir():
        print(
            f"warning: SwissArmyTransformer was installed into {ours} too: its programs now import this "
            "package. Do: install it in an environment of its own (docs/install.md)",
            file=sys.stderr,
        )


def run() -> NoReturn:
    """The installed command: :func:`main`, then the end of the process."""
    code = main()
    if sys.argv[0] == "cogview3 sample":
        from sat.cli.main_guard import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
