"""Requests that a server must survive: malformed, concurrent, cancelled half-way, all at once.

``python -m tests.attack.requests --count 500 --seed 0`` starts the small model on a free port of 127.0.0.1,
prints a line for each failure, and totals. Every request has to end in a picture or in an error of OpenAI's
form, the server has to draw afterwards, and its log may hold no traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import random
import signal
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

GENERATIONS = "/v1/images/generations"
GOOD, REFUSED, ANY = {200, 429}, {400, 401, 404, 405, 408, 413, 415}, set(range(200, 500))
PNG = b"\x89PNG\r\n\x1a\n"


class Case(NamedTuple):
    """One request: its bytes, the statuses that are right, and after what its client leaves (None: never)."""

    name: str
    sent: bytes
    right: set[int]
    leaves: float | None = None
    pictures: int = 0


class Failure(NamedTuple):
    """A request that was not answered as it has to be."""

    case: Case
    why: str

    def __str__(self) -> str:
        return f"FAIL {self.case.name}: {self.why}; sent {self.case.sent[:200]!r}"


def request(
    body: bytes | dict[str, object] = b"",
    method: str = "POST",
    path: str = GENERATIONS,
    token: str = "",
    **headers: str,
) -> bytes:
    """The bytes of one HTTP request; headers that are empty are left out."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Connection": "close",
        "Authorization": f"Bearer {token}" if token else "",
        "Content-Length": str(len(data)),
    }
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogateescape") + data


NUMBERS = (
    "0",
    "-1",
    "9" * 400,
    "9" * 5000,
    "-" + "9" * 4299,
    "NaN",
    "-Infinity",
    "1e400",
    "1.5",
    '"3"',
    "[]",
    "{}",
    "true",
    "9223372036854775808",
    "1e2",
    "01",
    "0x10",
    "--1",
    "1_0",
    "٣",
)
PROMPTS: tuple[object, ...] = (
    "",
    " \n",
    "a\0b",
    "x" * 4001,
    "x" * 70_000,
    3,
    None,
    [],
    {"a": 1},
    True,
    ["a"],
)
BODIES = (
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"a"',
    b'{"prompt": "\xff\xfe"}',
    '{"prompt": "a"}'.encode("utf-16"),
    b"[" * 100,
    b"[" * 30_000,
    b'{"a":' * 10_000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "user": ' + b"[" * 150 + b"]" * 150 + b"}",
    b'{"prompt": "a",}',
    b"{'prompt': 'a'}",
    b'{"prompt": "a"} x',
    b"\0" * 50,
    b"\xef\xbb\xbf\xff",
    b'{"' + b"k" * 60_000 + b'": 1}',
    b"x" * 100_000,
)
PATHS = (
    "/v1",
    "/v1/",
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/chat/completions",
    "/v1/models/none",
    "/v2/x",
    "/v1/models/%00",
    "/v1/%ff%fe",
    "/v1/../etc/passwd",
    "/v1//images/generations",
    "/images/generations",
    "/nothing",
    "/pictures/..%2f..%2fetc%2fpasswd?key=x",
    "/pictures/0_a/000000000.png?key=%ff",
    "/v1/" + "a" * 5000,
    "/%",
)
METHODS = ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "BREW", "post")
RAW = (
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"\0" * 200 + b"\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0\r\n\r\n",
    b"POST /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"POST " + GENERATIONS.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST " + GENERATIONS.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
)


def cases(seed: int, token: str, sizes: tuple[str, ...]) -> Iterator[Case]:  # noqa: C901 - its kinds
    """Requests without end, the same for the same seed."""
    pick = random.Random(seed)

    def good(**more: object) -> dict[str, object]:
        return {
            "prompt": pick.choice(("a red apple", "ein Haus", "猫", "a\tb")),
            "seed": pick.randrange(2**31),
            "steps": 1,
            **more,
        }

    def number() -> Case:
        name, value = (
            pick.choice(("n", "seed", "steps", "guidance", "size", "partial_images")),
            pick.choice(NUMBERS),
        )
        text = json.dumps({"prompt": "a", "steps": 1})[:-1].replace(
            '"steps": 1', '"user": "x"' if name == "steps" else '"steps": 1'
        )
        return Case(
            f"{name}={value[:20]}", request(f'{text}, "{name}": {value}}}'.encode(), token=token), ANY
        )

    def well() -> Case:
        n = pick.choice((1, 1, 1, 2, 3))
        form = pick.choice(("url", "b64_json", None))
        body = good(n=n, size=pick.choice((*sizes, "auto", None)), response_format=form)
        body |= pick.choice(
            ({}, {"quality": "auto", "stream": False}, {"output_format": "png", "background": "auto"})
        )
        return Case("good", request(body, token=token), GOOD, pictures=n)

    def prompt() -> Case:
        name = pick.choice(("prompt", "prompt", "negative_prompt"))
        value = pick.choice(PROMPTS)
        return Case(f"{name} {str(value)[:20]!r}", request(good(**{name: value}), token=token), ANY)

    def field() -> Case:
        name, value = pick.choice(
            (
                ("colour", 1),
                ("x" * 3000, 1),
                ("size", "1x1"),
                ("size", "9" * 400 + "x1"),
                ("size", "large"),
                ("size", "64X64"),
                ("model", "dall-e-3"),
                ("model", "m" * 9000),
                ("response_format", "gif"),
                ("quality", "hd"),
                ("stream", True),
                ("output_format", "webp"),
                ("user", 3),
                ("prompt\0", "a"),
                ("seed", -1),
                ("n", 10**6),
                ("steps", 10**9),
            )
        )
        return Case(f"{name[:20]}={str(value)[:20]}", request(good(**{name: value}), token=token), REFUSED)

    def changed() -> Case:
        text = bytearray(json.dumps(good()).encode())
        for _ in range(pick.randrange(1, 4)):
            text[pick.randrange(len(text))] = pick.randrange(256)
        return Case("changed bytes", request(bytes(text), token=token), ANY)

    def leaving() -> Case:
        body = request(good(n=pick.choice((1, 4)), steps=pick.choice((1, 50, 200))), token=token)
        return Case("client leaves", body, ANY, leaves=pick.choice((0.0, 0.02, 0.3)))

    def half() -> Case:
        body = request(good(), token=token)
        return Case("half a request", body[: pick.randrange(1, len(body))], ANY, leaves=0.05)

    def header() -> Case:
        name, value = pick.choice(
            (
                ("Content_Type", "text/plain"),
                ("Content_Type", ""),
                ("Content_Type", "multipart/form-data; boundary=x"),
                ("Content_Encoding", "gzip"),
                ("Authorization", "Bearer x"),
                ("Authorization", ""),
                ("Authorization", "Basic " + token),
                ("Host", "evil.example"),
                ("Authorization", "Bearer ü"),
                ("Content_Type", "application/jsonx"),
            )
        )
        right = REFUSED if token or name != "Authorization" else ANY
        return Case(f"{name}: {value[:20]}", request(good(), token=token, **{name: value}), right)

    kinds: list[Callable[[], Case]] = [
        well,
        well,
        well,
        number,
        number,
        prompt,
        field,
        changed,
        leaving,
        half,
        header,
        lambda: Case("body", request(pick.choice(BODIES), token=token), REFUSED),
        lambda: Case(
            "path", request(b"{}", pick.choice(("GET", "POST")), pick.choice(PATHS), token), {400, 404, 405}
        ),
        lambda: Case(
            "method",
            request(b"", pick.choice(METHODS), pick.choice((GENERATIONS, "/v1/models")), token),
            {200, 400, 405},
        ),
        lambda: Case("raw", pick.choice(RAW), REFUSED),
    ]
    while True:
        yield pick.choice(kinds)()


async def answer(url: str, case: Case, patience: float) -> tuple[int, dict[str, str], bytes] | None:
    """Status, headers and body of the answer; None where the client left before it came."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 26)
    try:
        writer.write(case.sent)
        if case.leaves is not None:
            await asyncio.sleep(case.leaves)
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            return None
        with contextlib.suppress(ConnectionError):  # it may answer before it has read everything
            await writer.drain()
        whole = await asyncio.wait_for(reader.read(), patience)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    head, _, body = whole.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}
    return int(first.split()[1]), headers, body


def fault(case: Case, status: int, headers: dict[str, str], body: bytes) -> str | None:
    """Why this is no answer to ``case``; None where it is one."""
    if status not in case.right:
        return f"status {status}, expected one of {sorted(case.right)[:8]}: {body[:200]!r}"
    if status == 429 and "retry-after" not in headers:
        return "429 without Retry-After"
    if case.sent.startswith(b"HEAD "):
        return None
    if status >= 400:
        try:
            error = json.loads(body)["error"]
            if (
                set(error) != {"message", "type", "param", "code"}
                or "\n" in error["message"]
                or len(error["message"]) > 1000
            ):
                return f"not one line in OpenAI's form: {body[:300]!r}"
        except (ValueError, KeyError, TypeError):
            return f"status {status} is not in OpenAI's form: {body[:200]!r}"
    elif case.pictures:
        data = json.loads(body)["data"]
        if len(data) != case.pictures or len({item["seed"] for item in data}) != len(data):
            return f"{len(data)} pictures, expected {case.pictures}"
        if any(
            "b64_json" in item and not base64.b64decode(item["b64_json"]).startswith(PNG) for item in data
        ):
            return "no PNG"
    return None


async def attack(
    url: str,
    token: str,
    count: int,
    seed: int,
    *,
    sizes: tuple[str, ...] = (),
    together: int = 50,
    patience: float = 300,
) -> tuple[list[Failure], Counter[str]]:
    """Send ``count`` requests, ``together`` at a time; the failures, and how many ended in which way."""
    failures, ends, gate = list[Failure](), Counter[str](), asyncio.Semaphore(together)

    async def one(case: Case) -> None:
        async with gate:
            try:
                got = await answer(url, case, patience)
                why = None if got is None else fault(case, *got)
                ends["left" if got is None else str(got[0])] += 1
            except Exception as error:
                why = f"no answer: {type(error).__name__}: {error}"
                ends["none"] += 1
            if why is not None:
                failures.append(Failure(case, why))

    made = cases(seed, token, sizes)
    await asyncio.gather(*(one(next(made)) for _ in range(count)))
    return failures, ends


async def closing(url: str, token: str, stop: Callable[[], None], waiting: int = 8) -> list[Failure]:
    """Have ``stop`` end the server while ``waiting`` requests are there: each gets a picture or 503."""
    slow = Case(
        "waits at the end", request({"prompt": "a", "n": 8, "steps": 200}, token=token), {200, 429, 503}
    )
    tasks = [asyncio.ensure_future(answer(url, slow, 60)) for _ in range(waiting)]
    await asyncio.sleep(0.7)
    stop()
    failures, statuses = list[Failure](), set[int]()
    for got in await asyncio.gather(*tasks, return_exceptions=True):
        why = repr(got) if got is None or isinstance(got, BaseException) else fault(slow, *got)
        statuses |= set() if got is None or isinstance(got, BaseException) else {got[0]}
        failures += [] if why is None else [Failure(slow, why)]
    if not failures and 503 not in statuses:
        failures.append(Failure(slow, f"nobody got 503, but {sorted(statuses)}"))
    return failures


def main() -> int:
    """Attack a server of its own; 1 if anything failed."""
    from tests.web import TOKEN, serving

    reader = argparse.ArgumentParser(prog="python -m tests.attack.requests", description=__doc__)
    reader.add_argument("--count", type=int, default=500)
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--signal", choices=("SIGTERM", "SIGINT"), default="SIGTERM")
    args = reader.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(
            Path(folder) / "out", "--base", "configs/tiny.yaml", "--api", "parallel.device=cpu"
        ) as server,
    ):
        started = time.monotonic()
        failures, ends = asyncio.run(attack(server.url, TOKEN, args.count, args.seed, sizes=("64x64",)))
        again = Case(
            "after all", request({"prompt": "a red apple", "steps": 1}, token=TOKEN), {200}, pictures=1
        )
        last = asyncio.run(answer(server.url, again, 120))
        why = fault(again, *last) if last is not None else "no answer"
        failures += [] if why is None else [Failure(again, why)]
        attacked = time.monotonic() - started
        failures += asyncio.run(
            closing(server.url, TOKEN, lambda: server.process.send_signal(getattr(signal, args.signal)))
        )
        ended = time.monotonic()
        code = server.process.wait(60)
        log = server.log.read_text("utf-8", "replace")
        exits = time.monotonic() - ended
    for failure in failures:
        print(failure)
    if "Traceback" in log:
        print(f"FAIL the log holds a traceback:\n{log[log.index('Traceback') :][:3000]}")
    kinds = ", ".join(f"{name}: {number}" for name, number in sorted(ends.items()))
    print(
        f"{args.count} requests in {attacked:.0f} s ({kinds}); {len(failures)} failed; "
        f"{args.signal}: code {code} {exits:.1f} s after the last answer; log: {len(log.splitlines())} lines"
    )
    return int(bool(failures) or "Traceback" in log)


if __name__ == "__main__":
    raise SystemExit(main())
