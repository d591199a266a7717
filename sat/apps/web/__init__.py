"""A web page and an HTTP API for one model, with a queue, in one process; and the rights to use them."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Access:
    """Rights to come in. ``password`` guards the page, ``token`` the API; neither is shown or written."""

    host: str = "127.0.0.1"
    share: bool = False
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    user: str = "user"

    @property
    def is_local(self) -> bool:
        """True if only this machine can reach it."""
        return self.host in LOOPBACK and not self.share

    def knows(self, user: str, password: str) -> bool:
        """True for the right user and password; takes as long whatever is wrong."""
        right = hmac.compare_digest(password.encode(), (self.password or "").encode())
        return hmac.compare_digest(user.encode(), self.user.encode()) and right and self.password is not None
