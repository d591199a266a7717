"""Errors as sentences for people."""

from __future__ import annotations

# Their text is a sentence for the user; anything else is shown with its kind.
_PLAIN_ERRORS = (ValueError, OSError, RuntimeError, ArithmeticError)


def describe(error: BaseException) -> str:
    """``error`` in one clear line (or, for a list of problems, one line each)."""
    text = str(error).strip()
    kind = type(error).__name__
    if kind in ("OutOfMemoryError", "MemoryError"):
        first = text.splitlines()[0] if text else kind
        return (
            f"out of memory: {first} Try a smaller --height and --width, sampling.dtype=bf16, "
            f"memory.text_encoder=free or memory.decode_tile=64"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if not text:
        return kind
    return text if isinstance(error, _PLAIN_ERRORS) else f"{kind}: {text}"
