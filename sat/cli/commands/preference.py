"""The work behind ``evaluate preference``: pair the pictures, serve the page, say what the votes say."""

from __future__ import annotations

import argparse
import logging
import sys

from sat.apps.evaluate.pictures import read_list
from sat.apps.preference.pairs import QUESTIONS, fingerprint, pairs_of
from sat.apps.preference.server import Server, Study
from sat.apps.preference.statistics import summary
from sat.apps.preference.votes import VoteFile, read
from sat.cli.main_guard import UsageError

log = logging.getLogger(__name__)


def work(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C, then print the summary; the exit code."""
    questions = list(dict.fromkeys(name.strip() for name in args.questions.split(",") if name.strip()))
    if not questions or not set(questions) <= set(QUESTIONS):
        raise UsageError(f"--questions {args.questions}: expected some of {', '.join(QUESTIONS)}")
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port {args.port}: expected 0 to 65535")
    if args.a.resolve() == args.b.resolve():
        raise UsageError(f"{args.a} is compared with itself: name two folders")
    pairs, notes = pairs_of(args.a, args.b, None if args.prompts is None else read_list(args.prompts))
    for note in notes:
        log.warning("%s", note)
    a, b = (path.resolve().name for path in (args.a, args.b))
    a, b = (a, b) if a != b else (str(args.a), str(args.b))
    about = {"a": a, "b": b, "pairs": fingerprint(pairs), "questions": questions, "seed": args.seed}
    if args.summary:
        print("\n".join(summary(read(args.votes, about), a, b)))
        return 0
    with VoteFile(args.votes, about) as votes:
        _serve(Study(pairs, questions, args.seed, votes), args.port)
        print("\n".join(summary(list(votes.votes.values()), a, b)))
    return 0


def _serve(study: Study, port: int) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    try:
        server = Server(study, port)
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; it may be in use, 0 picks a free one") from error
    count = len(study.pairs) * len(study.questions)
    with server:
        print(f"{server.address} asks {count} questions of each rater; Ctrl-C ends", flush=True)
        print(f"votes go to {study.votes.path}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
