"""Short prompts in any language as full English descriptions, written by a language model over HTTP.

The server is any that speaks OpenAI's chat completions; the ``openai`` package talks to it and is an extra.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast
from urllib.parse import urlsplit

from sat.apps.prompts.writing import AnswerError, Message, Words, messages, read_answer
from sat.errors import UserError
from sat.util.host import install, write_text

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)

MODEL = "gpt-5-mini"
"""Model where none is named."""
KEY, URL, NAME = "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"
"""Environment variables; the first two are the openai package's own."""
INSTALL = f"rewriting prompts needs the openai package: {install('prompts')}"
AT_ONCE = 4
"""Prompts that are rewritten at the same time."""


class OptimizerError(UserError, RuntimeError):
    """A prompt could not be rewritten."""

    exit_code = 1


class UnusableServerError(OptimizerError):
    """The language model cannot be reached at all: no key, no connection, no such model."""


class Counts(Protocol):
    """A tokenizer: its limit, and the part of a text beyond it."""

    max_length: int

    def truncation(self, text: str) -> str | None:
        """The end of ``text`` that does not fit, None if all of it does."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """Address of the language model. ``url`` None is OpenAI's; times in seconds; the key is never shown."""

    model: str = MODEL
    url: str | None = None
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 3

    @classmethod
    def found(cls, url: str | None = None, model: str | None = None, key: str | None = None) -> Endpoint:
        """The given values, completed from the environment."""
        env = os.environ.get
        return cls(model or env(NAME) or MODEL, url or env(URL) or None, key or env(KEY) or None)

    @property
    def shown(self) -> str:
        """The address without its secret parts."""
        parts = urlsplit(self.url or "https://api.openai.com/v1")
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def check(self) -> None:
        """Raise :class:`UnusableServerError` unless address and key can be used."""
        try:
            parts = urlsplit(self.url or "https://api.openai.com/v1")
            _ = parts.port  # read only here
        except ValueError as error:
            raise UnusableServerError(f"the server's address cannot be read: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            given = (self.url or "").rpartition("@")[2]
            raise UnusableServerError(
                f"the server's address is {given!r}: expected http://HOST or https://HOST/v1"
            )
        if parts.username or parts.password:
            raise UnusableServerError("the server's address holds a user or password: give a key instead")
        if not self.key:
            raise UnusableServerError(
                f"no API key for {self.shown}: set {KEY} in the environment (any word for a server without)"
            )


class Rewritten(NamedTuple):
    """A description, and the part of the answer that did not fit into the text encoder."""

    text: str
    dropped: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class Cache:
    """Answers on disk, a file each: asking again costs nothing and gives the same picture."""

    folder: Path

    @classmethod
    def of_user(cls) -> Cache:
        """In the user's cache folder."""
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(root) / "cogview3-sat" / "prompts")

    def get(self, key: str) -> str | None:
        """The answer under ``key``; None without one, or with a file that cannot be read."""
        try:
            found = json.loads(self._path(key).read_text("utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found, str) else None

    def put(self, key: str, prompt: str, answer: str) -> None:
        """Keep ``answer``; a folder that cannot be written is noted, nothing more."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(
                self._path(key), json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n"
            )
        except OSError as error:
            log.warning("rewritten prompts are not cached: %s: %s", self.folder, error.strerror or error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


class PromptOptimizer:
    """Rewrites prompts at one endpoint. ``tokenizer`` limits their length, ``cache`` spares requests."""

    def __init__(
        self, endpoint: Endpoint, tokenizer: Counts | None = None, cache: Cache | None = None
    ) -> None:
        self.endpoint, self.tokenizer, self.cache = endpoint, tokenizer, cache
        self.words = Words.within(None if tokenizer is None else tokenizer.max_length)
        self._client: OpenAI | None = None

    def messages(self, prompt: str) -> list[Message]:
        """The conversation that is sent for ``prompt``."""
        return messages(prompt, self.words)

    def __call__(self, prompt: str) -> Rewritten:
        """``prompt`` as a description; :class:`OptimizerError` says why there is none, in one line."""
        prompt = prompt.strip()
        if not prompt:
            raise OptimizerError("the prompt is empty: there is nothing to rewrite")
        conversation = self.messages(prompt)
        key = hashlib.sha256(json.dumps([self.endpoint.model, conversation]).encode()).hexdigest()[:32]
        known = self.cache.get(key) if self.cache is not None else None
        answer = known or self._answer(conversation)
        if known is None and self.cache is not None:
            self.cache.put(key, prompt, answer)
        text, dropped = shortened(answer, self.tokenizer)
        if dropped is not None and self.tokenizer is not None:
            log.warning(
                "the rewritten prompt is longer than the %d tokens the text encoder reads; cut: %r",
                self.tokenizer.max_length, dropped,
            )  # fmt: skip
        return Rewritten(text, dropped, known is not None)

    def all(self, prompts: Sequence[str]) -> list[Rewritten | OptimizerError]:
        """Every prompt rewritten, or its error, a few at a time; an unusable server gets no more requests."""
        unusable: list[OptimizerError] = []
        stop = Event()

        def one(prompt: str) -> Rewritten | OptimizerError:
            if stop.is_set():
                return unusable[0]
            try:
                return self(prompt)
            except UnusableServerError as error:
                unusable.append(error)
                stop.set()
                return error
            except OptimizerError as error:
                return error

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(one, prompts))

    def _answer(self, conversation: list[Message]) -> str:
        """The answer, read; once more where it broke off or is none (servers fail so under load)."""
        client, problem = self._open(), ""
        for _ in range(2):
            parts: list[str] = []
            refusal: list[str] = []
            finish: str | None = None
            with self._explained():  # streamed, so that the time-out is for a pause and not for all of it
                request = {"model": self.endpoint.model, "messages": cast(Any, conversation)}
                with client.chat.completions.create(**request, stream=True) as stream:
                    for chunk in stream:
                        for choice in chunk.choices[:1]:
                            parts.append(choice.delta.content or "")
                            refusal.append(choice.delta.refusal or "")
                            finish = choice.finish_reason or finish
            try:
                if finish == "content_filter" or any(refusal):
                    raise AnswerError(f"the model refused: {''.join(refusal)[:60] or 'content filter'!r}")
                if finish is not None or not any(parts):
                    return read_answer("".join(parts))
                problem = f"{self.endpoint.shown}: the answer broke off"
            except AnswerError as error:
                problem = f"{self.endpoint.model}: {error}"
        raise OptimizerError(problem)

    def _open(self) -> OpenAI:
        """The client, made once. It retries on 429, 5xx and time-outs, after longer and longer pauses."""
        self.endpoint.check()
        if self._client is None:
            try:
                from openai import OpenAI, Timeout
            except ImportError:
                raise UnusableServerError(INSTALL) from None
            self._client = OpenAI(
                api_key=self.endpoint.key,
                base_url=self.endpoint.url,
                timeout=Timeout(self.endpoint.timeout, connect=min(10.0, self.endpoint.timeout)),
                max_retries=self.endpoint.retries,
            )
        return self._client

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """The client's errors in one line each, without the key, which some servers repeat."""
        import openai

        where, name = self.endpoint.shown, self.endpoint.model
        try:
            yield
        except openai.APITimeoutError:
            raise OptimizerError(f"{where} does not answer within {self.endpoint.timeout:g} s") from None
        except openai.APIConnectionError as error:
            cause = self._hidden(str(error.__cause__ or error))
            raise UnusableServerError(f"cannot connect to {where}: {cause}") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise UnusableServerError(f"{where} refuses the API key ({KEY})") from None
        except openai.NotFoundError:
            raise UnusableServerError(f"{where} has no model {name!r} (or is not an OpenAI API)") from None
        except openai.RateLimitError as error:
            raise OptimizerError(f"{where}: too many requests: {self._reason(error)}") from None
        except openai.APIStatusError as error:
            raise OptimizerError(f"{where}: error {error.status_code}: {self._reason(error)}") from None
        except openai.OpenAIError as error:
            raise OptimizerError(f"{where}: {self._hidden(str(error))}") from None

    def _reason(self, error: Any) -> str:  # noqa: ANN401 - the client's, imported where it is used
        """The server's own message, without the key."""
        body = error.body if isinstance(error.body, dict) else {}
        return self._hidden(str(body.get("message") or error.message))

    def _hidden(self, text: str) -> str:
        line = " ".join(text.split())[:200]
        return line.replace(self.endpoint.key, "***") if self.endpoint.key else line


_SENTENCE = re.compile(r"[.!?][\"'\u201d]?(?=\s)")


def shortened(text: str, tokenizer: Counts | None) -> tuple[str, str | None]:
    """The beginning of ``text`` that the text encoder reads, and the rest (None if there is none).

    It ends with a sentence where that keeps most of it, else with a word.
    """
    dropped = None if tokenizer is None else tokenizer.truncation(text)
    if dropped is None:
        return text, None
    kept = text[: text.rindex(dropped)]
    if kept and not kept[-1].isspace():
        kept = kept.rpartition(" ")[0] or kept  # not within a word
    ends = [match.end() for match in _SENTENCE.finditer(kept)]
    if ends and ends[-1] >= 0.6 * len(kept):
        kept = kept[: ends[-1]]
    return kept.rstrip(), text[len(kept.rstrip()) :].strip()
