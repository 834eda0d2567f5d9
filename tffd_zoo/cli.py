"""From a typed dataclass to a command: its fields are the flags, its docstrings the help, its errors one line."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

ConfigT = TypeVar("ConfigT")

# What a user can cause and mend: shown as one line. Anything else is our bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError)


def run_cli(main: Callable[[ConfigT], None], config: type[ConfigT], args: Sequence[str] | None = None) -> None:
    """Parse `args` (default: the command line) into `config` with tyro and call `main` on it.

    Exits with 2 and one line on stderr for a `ValueError` or `OSError`, with 130 after Ctrl-C.
    """
    import tyro

    parsed = tyro.cli(config, args=args, description=config.__doc__)
    guard(lambda: main(parsed))


def guard(action: Callable[[], object]) -> None:
    """Run `action`; turn what a user can mend into one line and a non-zero exit code."""
    try:
        action()
    except USER_ERRORS as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "; free some space and run the same command again: nothing that was finished is lost" if full else ""
        print(f"error: {error}{mend}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
