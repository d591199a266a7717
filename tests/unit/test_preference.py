"""Human preference: statistics against scipy and hand-worked values, votes on disk, the server's answers."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sat.apps.evaluate.pictures import PromptList, plain
from sat.apps.preference.server import Server
from sat.apps.preference.study import Pair, Study, fingerprint, order, pairs_of
from sat.apps.preference.votes import Vote, VoteFile, agreement, outcome, read, summary, wilson
from sat.cli.evaluate import main
from sat.data.records import DataError

TEXTS = ("a red apple", "the <sun> & moon", "a dog")
COLOURS = {"A": "red", "B": "blue"}


def votes(*rows: tuple[str, str, str]) -> list[Vote]:
    """Votes of (rater, pair, choice)."""
    return [Vote(rater, pair, "quality", choice, "a", 1.0) for rater, pair, choice in rows]


@pytest.mark.parametrize(("wins", "trials"), [(7, 10), (0, 5), (5, 5), (154, 200)])
def test_wilsons_interval_is_scipys(wins: int, trials: int) -> None:
    expected = scipy.stats.binomtest(wins, trials).proportion_ci(0.95, "wilson")
    assert wilson(wins, trials) == pytest.approx((expected.low, expected.high))


def test_ties_count_half_or_are_left_out() -> None:
    found = outcome(votes(*[("x", f"{i}_0", c) for i, c in enumerate(["a"] * 5 + ["tie"] * 4 + ["b"] * 1)]))
    assert found.tally == (5, 4, 1)
    assert found.half == pytest.approx(0.7)
    assert found.decided == pytest.approx(5 / 6)
    assert found.prompts == 10
    ties = outcome(votes(("x", "0_0", "tie"), ("x", "1_0", "tie")))
    assert (ties.half, ties.decided, ties.wilson, tuple(ties.half_interval)) == (0.5, None, None, (0.5, 0.5))


def test_the_bootstrap_resamples_prompts_and_is_scipys() -> None:
    rng = np.random.default_rng(3)
    shares = rng.integers(0, 5, 40) / 4  # of 40 prompts with four votes each, correlated within
    rows = [
        ("x", f"{p}_{i}", "a" if i < share * 4 else "b") for p, share in enumerate(shares) for i in range(4)
    ]
    found = outcome(votes(*rows))
    peer = scipy.stats.bootstrap((shares,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    assert tuple(found.half_interval) == pytest.approx(tuple(peer.confidence_interval), abs=0.01)
    assert found.half_interval == found.decided_interval
    naive = wilson(found.tally.wins, found.tally.total)
    assert found.half_interval.high - found.half_interval.low > 1.3 * (naive.high - naive.low)


def test_alpha_of_a_worked_example() -> None:
    """Krippendorff 2011, section C's data by two raters without gaps: 12 questions, nominal."""
    one, two = "aaaabbbbttta", "aabtbbbbttaa"
    names = {"a": "a", "b": "b", "t": "tie"}
    found = agreement(
        votes(
            *[
                (rater, f"{i}_0", names[c])
                for rater, row in (("x", one), ("y", two))
                for i, c in enumerate(row)
            ]
        )
    )
    alike = sum(a == b for a, b in zip(one, two, strict=True)) / 12
    counts = [(one + two).count(letter) for letter in "abt"]
    chance = sum(n * (n - 1) for n in counts) / (24 * 23)
    assert found.same == pytest.approx(alike)
    assert found.alpha == pytest.approx(1 - (1 - alike) / (1 - chance))
    assert found.questions == 12


def test_alpha_with_gaps_is_that_of_the_coincidence_matrix() -> None:
    rng = np.random.default_rng(0)
    rows = [(r, f"{p}_0", str(rng.choice(["a", "b", "tie"], p=[0.6, 0.3, 0.1])))
            for p in range(30) for r in "vwxyz" if rng.random() < 0.6]  # fmt: skip
    matrix = dict.fromkeys(itertools.product(("a", "b", "tie"), repeat=2), 0.0)
    by_pair: dict[str, list[str]] = {}
    for _, pair, choice in rows:
        by_pair.setdefault(pair, []).append(choice)
    for values in by_pair.values():
        for one, two in itertools.permutations(values, 2):
            matrix[one, two] += 1 / (len(values) - 1)
    total = sum(matrix.values())
    margin = {c: sum(v for (a, _), v in matrix.items() if a == c) for c in ("a", "b", "tie")}
    observed = sum(v for (a, b), v in matrix.items() if a != b) / total
    expected = sum(margin[a] * margin[b] for a, b in matrix if a != b) / (total * (total - 1))
    assert agreement(votes(*rows)).alpha == pytest.approx(1 - observed / expected)


def test_agreement_needs_two_raters_and_two_answers() -> None:
    assert agreement(votes(("x", "0_0", "a"), ("y", "1_0", "a"))) == (None, None, 0)
    assert agreement(votes(("x", "0_0", "a"), ("y", "0_0", "a"))) == (None, 1.0, 1)
    text = "\n".join(summary(votes(("x", "0_0", "a"), ("y", "0_0", "b")), "ours", "theirs"))
    assert "ours won 1, tied 0, lost 1 of 2 votes on 1 prompts" in text
    assert "votes: x 1, y 1" in text
    assert summary([], "a", "b") == ["no votes yet"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, colour in COLOURS.items():
        for index, text in enumerate(TEXTS):
            info = PngInfo()
            info.add_text("prompt", text)
            info.add_text("model", f"secret {name}")
            folder = tmp_path / name / f"{index}_x"
            folder.mkdir(parents=True)
            Image.new("RGB", (24, 16), colour).save(folder / "000000000.png", pnginfo=info)
    return tmp_path / "A", tmp_path / "B"


def test_pairs_are_prompts_that_both_folders_have(folders, tmp_path) -> None:
    a, b = folders
    pairs, notes = pairs_of(a, b, None)
    assert [(p.name, p.prompt.text, p.a.parts[-3], p.b.parts[-3]) for p in pairs] == [
        (f"{i}_0", text, "A", "B") for i, text in enumerate(TEXTS)
    ]
    assert notes == []
    (b / "2_x").rename(b / "7_x")
    pairs, notes = pairs_of(a, b, None)
    assert len(pairs) == 2
    assert [f"{name}: 1 prompts have pictures here alone, such as number {i}; left out" in note
            for name, i, note in ((a, 2, notes[0]), (b, 7, notes[1]))] == [True, True]  # fmt: skip
    (b / "1_x" / "000000000.png").unlink()
    (b / "1_x" / "other.jpg").write_bytes((a / "1_x" / "000000000.png").read_bytes())
    with pytest.raises(DataError, match="have no prompt in common"):
        pairs_of(a, b, PromptList((), ()))
    shown, _ = pairs_of(a, b, plain(["shown to raters", "whatever was drawn"]))
    assert [pair.prompt.text for pair in shown] == ["shown to raters", "whatever was drawn"]


def test_other_prompts_are_told_unless_texts_are_given(folders) -> None:
    a, b = folders
    info = PngInfo()
    info.add_text("prompt", "a big red apple on a table")
    Image.new("RGB", (24, 16)).save(b / "0_x" / "000000000.png", pnginfo=info)
    with pytest.raises(
        DataError, match="prompt 0 is 'a red apple' in .* and 'a big red apple .*--prompts FILE"
    ):
        pairs_of(a, b, None)
    Image.new("RGB", (24, 16)).save(b / "1_x" / "000000000.png")
    Image.new("RGB", (24, 16)).save(a / "1_x" / "000000000.png")
    assert len(pairs_of(a, b, plain(TEXTS))[0]) == 3


def test_orders_and_sides_differ_between_raters_and_stay(folders) -> None:
    pairs, _ = pairs_of(*folders, None)
    many = [Pair(f"{i}_0", pairs[0].prompt, pairs[0].a, pairs[0].b) for i in range(60)]
    one, two = (order(many, ["alignment", "quality"], rater, 0) for rater in ("ann", "bob"))
    assert one == order(many, ["alignment", "quality"], "ann", 0) != two
    assert 35 < sum(item.left == "a" for item in one) < 85
    assert [item.name for item in one[:2]] == [f"{one[0].pair.name}/alignment", f"{one[0].pair.name}/quality"]
    assert all(x.left == y.left for x, y in zip(one[::2], one[1::2], strict=True))
    assert sum(x.left != y.left for x in one for y in two if x.name == y.name) > 30
    assert order(many, ["quality"], "ann", 1) != order(many, ["quality"], "ann", 0)


ABOUT = {"a": "A", "b": "B", "pairs": "123", "questions": ["quality"], "seed": 0}


def test_votes_survive_a_cut_line_and_later_ones_count(tmp_path) -> None:
    path = tmp_path / "new" / "votes.jsonl"
    with VoteFile(path, ABOUT) as file:
        for choice in ("a", "b"):
            file.add(Vote("ann", "0_0", "quality", choice, "b", 2.5))
        file.add(Vote("bö b", "0_0", "quality", "tie", "a", 1.0))
        with pytest.raises(DataError, match="another page is writing votes to it"):
            VoteFile(path, ABOUT)
    with path.open("ab") as raw:
        raw.write(b'{"rater": "ann", "pa')
    assert [vote.choice for vote in read(path, ABOUT)] == ["b", "tie"]
    with VoteFile(path, ABOUT) as file:
        file.add(Vote("ann", "1_0", "quality", "a", "a", 1.0))
    assert [(v.rater, v.pair, v.choice) for v in read(path, ABOUT)] == [
        ("ann", "0_0", "b"), ("bö b", "0_0", "tie"), ("ann", "1_0", "a"),
    ]  # fmt: skip
    assert len(path.read_text("utf-8").splitlines()) == 5
    with pytest.raises(DataError, match="about other pictures, other questions or with another seed"):
        VoteFile(path, ABOUT | {"seed": 1})
    path.write_text(json.dumps(ABOUT) + '\n{"rater": "x"}\n')
    with pytest.raises(DataError, match="line 2: not a vote"):
        read(path, ABOUT)


def test_votes_of_many_threads_are_all_there(tmp_path) -> None:
    with VoteFile(tmp_path / "v.jsonl", ABOUT) as file:

        def add(rater: int) -> None:
            for pair in range(25):
                file.add(Vote(f"r{rater}", f"{pair}_0", "quality", "a", "a", 0.0))

        threads = [threading.Thread(target=add, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read(tmp_path / "v.jsonl", ABOUT)) == 200


class Client:
    """Speaks to a study's server as a page does."""

    def __init__(self, server: Server) -> None:
        self.port = server.server_address[1]

    def __call__(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, dict(reply.headers), content

    def task(self, **body: object) -> dict:
        status, _, content = self("POST", "/task", {"rater": "ann"} | body)
        assert status == 200, content
        return json.loads(content)


@pytest.fixture
def client(folders, tmp_path) -> Iterator[Client]:
    pairs, _ = pairs_of(*folders, None)
    with (
        VoteFile(tmp_path / "votes.jsonl", ABOUT) as file,
        Server(Study(pairs, ["alignment", "quality"], 0, file), 0) as server,
    ):
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield Client(server)
        server.shutdown()


def colour(client: Client, address: str) -> str:
    status, headers, content = client("GET", address)
    assert (status, headers["Content-Type"]) == (200, "image/png")
    picture = Image.open(BytesIO(content))
    assert b"secret" not in content and not picture.info
    return {(255, 0, 0): "a", (0, 0, 255): "b"}[picture.getpixel((0, 0))]


def test_a_rater_is_led_through_all_questions_and_can_go_back(client, tmp_path) -> None:
    wanted, seen = iter(("left", "right", "tie", "left", "right", "left")), []
    task = client.task()
    while "item" in task:
        place = next(wanted)
        shown = {side: colour(client, task[side]) for side in ("left", "right")}
        assert set(shown.values()) == {"a", "b"}
        seen.append((task["item"], task["text"], "tie" if place == "tie" else shown[place], shown["left"]))
        assert task["answer"] is None and task["done"] == len(seen) - 1
        status, _, content = client(
            "POST", "/vote", {"rater": " ann ", "item": task["item"], "place": place, "seconds": 1.234}
        )
        assert status == 200
        task = json.loads(content)
    assert task == {"done": 6, "of": 6, "at": 6, "finished": True}
    kept = [(f"{v.pair}/{v.question}", v.choice, v.left) for v in read(tmp_path / "votes.jsonl", ABOUT)]
    assert kept == [(item, choice, left) for item, _, choice, left in seen]
    assert {text for _, text, _, _ in seen} == set(TEXTS)

    last = client.task(at=5)
    assert (last["item"], last["answer"]) == (seen[5][0], "left")
    client("POST", "/vote", {"rater": "ann", "item": last["item"], "place": "tie"})
    assert [v.choice for v in read(tmp_path / "votes.jsonl", ABOUT)][5] == "tie"
    assert client.task(rater="bob")["done"] == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/picture/../votes.jsonl", None, {}, 404),
        ("GET", "/picture/%2e%2e/%2e%2e/etc/passwd", None, {}, 404),
        ("GET", "/../../pyproject.toml", None, {}, 404),
        ("GET", "/A/0_x/000000000.png", None, {}, 404),
        ("GET", "/", None, {"Host": "evil.example:80"}, 403),
        ("POST", "/task", {"rater": "x"}, {"Origin": "http://evil.example"}, 403),
        ("POST", "/task", {"rater": "x"}, {"Content-Type": "text/plain"}, 400),
        ("POST", "/task", {"rater": "  "}, {}, 400),
        ("POST", "/task", {"rater": "x" * 41}, {}, 400),
        ("POST", "/task", {"rater": "a\u0000b"}, {}, 400),
        ("POST", "/task", [1], {}, 400),
        ("POST", "/task", b"{", {}, 400),
        ("POST", "/task", b"x" * 5000, {}, 400),
        ("POST", "/task", {"rater": "x", "at": "1"}, {}, 400),
        ("POST", "/vote", {"rater": "x", "item": "9_9/quality", "place": "left"}, {}, 400),
        ("POST", "/vote", {"rater": "x", "item": "0_0/quality", "place": "a"}, {}, 400),
        ("POST", "/vote", {"rater": "x", "item": "0_0/quality", "place": "left", "seconds": -1}, {}, 400),
        ("POST", "/else", {"rater": "x"}, {}, 404),
    ],
)
def test_what_a_page_does_not_ask_is_refused(client, tmp_path, method, path, body, headers, status) -> None:
    answered, _, content = client(method, path, body, **headers)
    assert answered == status
    assert "error" in json.loads(content)
    assert read(tmp_path / "votes.jsonl", ABOUT) == []


def test_the_page_holds_nothing_from_elsewhere(client) -> None:
    status, headers, content = client("GET", "/")
    assert status == 200
    text = content.decode()
    assert "NONCE" not in text and "http" not in text.replace('"use strict"', "")
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_the_command_tells_what_is_wrong_and_sums_up(folders, tmp_path, capsys) -> None:
    a, b = folders
    path = tmp_path / "votes.jsonl"
    words = ["preference", str(a), str(b), "--votes", str(path), "--summary"]
    pairs, _ = pairs_of(a, b, None)
    about = {
        "a": "A",
        "b": "B",
        "pairs": fingerprint(pairs),
        "questions": ["alignment", "quality"],
        "seed": 0,
    }
    with VoteFile(path, about) as file:
        for rater, choice in itertools.product(("ann", "bob"), ("a", "a", "tie")):
            index = len(file.votes) % 3
            for question in ("alignment", "quality"):
                file.add(Vote(rater, f"{index}_0", question, choice, "a", 1.0))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "A against B" in out and "average win rate of A: " in out and "Krippendorff's alpha" in out
    for more, code, message in (
        (["--questions", "taste"], 2, "--questions taste: expected some of alignment, quality"),
        (["--port", "99999"], 2, "--port 99999: expected 0 to 65535"),
        (["--seed", "1"], 1, "name another file with --votes"),
        (["--prompts", str(tmp_path / "gone")], 2, "gone does not exist"),
    ):
        assert main([*words, *more]) == code
        assert message in capsys.readouterr().err
    assert main(["preference", str(a), str(a), "--votes", str(path)]) == 2
