"""Writing a file whole or not at all, beside any number of other processes that write the same one."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowra.errors import LowraError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` that takes its place when the block ends without an error.

    The name is hidden, ends as `path` does and is unique to this call, on this and on other machines: on a shared file
    system two processes may have one number.
    Raises LowraError when the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.stem[:100]}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        number = system_error(error)
        if number is None and not isinstance(error, OSError):
            raise
        why = error if number is None else os.strerror(number)
        raise LowraError(f"Cannot write {path} ({why}); choose another folder.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def system_error(error: BaseException) -> int | None:
    """The system's number of an error, also where a library in Rust, such as safetensors, tells it in words."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8 and return its path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path
