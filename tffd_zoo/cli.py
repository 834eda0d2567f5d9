"""From a typed dataclass to a command: its fields are the flags, its docstrings the help, its errors one line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import inspect
import io
import itertools
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from .ranges import check_ranges

ConfigT = TypeVar("ConfigT")

# What a user can cause and mend: shown as one line. Anything else is our bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError)


def run_cli(main: Callable[[ConfigT], None], config: type[ConfigT], args: Sequence[str] | None = None) -> None:
    """Parse `args` (default: the command line) into `config` with tyro and call `main` on it.

    Exits with 2 and one line on stderr for a `ValueError` or `OSError`, with 130 after Ctrl-C.
    """

    def run() -> None:
        parsed = parse(config, args=args, description=config.__doc__)
        check_ranges(parsed)
        main(parsed)

    guard(run)


def parse(config: type[ConfigT], /, **options: Any) -> ConfigT:
    """`tyro.cli`, but what a dataclass says of its own values is the ValueError that it raised, not tyro's box."""
    import tyro

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(config, **options)
    except SystemExit as left:
        error: BaseException | None = left
        while error is not None:
            if isinstance(error, ValueError) and any(
                frame.name == "__post_init__" for frame in traceback.extract_tb(error.__traceback__)
            ):
                raise error from None
            error = error.__context__
        print(told.getvalue(), end="", file=sys.stderr)
        raise


def overview(config: Any) -> str:
    """The flags of a nested dataclass, one line each: the value in `config`, and as much of the help as fits.

    Sections that are None share one line.
    """
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plain = {name: value for name, value in sections.items() if not dataclasses.is_dataclass(value)}
    off = [name for name, value in plain.items() if value is None]
    width = shutil.get_terminal_size().columns
    lines = [*_flag_lines(type(config), {name: value for name, value in plain.items() if value is not None})]
    for name, section in sections.items():
        if name not in plain:
            prefix = f"{name}." if _flag_name(type(config), name) else ""
            values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
            title = " ".join((type(section).__doc__ or "").split())
            lines += ["", _cut(f"{name}: {title}", width), *_flag_lines(type(section), values, prefix)]
    return "\n".join([*lines, "", f"off: {', '.join(off)}"] if off else lines)


def _flag_lines(config: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    docs, width = _field_docs(config), shutil.get_terminal_size().columns
    for field, value in values.items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flag = f"  --{prefix}{_flag_name(config, field).replace('_', '-')} {shown}"
        yield _cut(f"{flag:<35} {docs[field]}", width)


def _cut(line: str, width: int) -> str:
    line = line.replace("\n    ", " ")
    return line if len(line) <= width else f"{line[: width - 4].rpartition(' ')[0]} ..."


def _flag_name(config: type, field: str) -> str:
    """The name that tyro gives the flags of a field; empty for a section whose flags have no prefix."""
    extras = getattr(get_type_hints(config, include_extras=True)[field], "__metadata__", ())
    return next((extra.name for extra in extras if getattr(extra, "name", None) is not None), field)


def _field_docs(config: type) -> dict[str, str]:
    """The docstring below every field of a dataclass."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: str(doc.value.value)
        for field, doc in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def printable(text: object) -> str:
    """`text` without what would steer a terminal: a name in someone's data may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def guard(action: Callable[[], object]) -> None:
    """Run `action`; turn what a user can mend into one line and a non-zero exit code."""
    try:
        action()
    except USER_ERRORS as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "; free some space and run the same command again: nothing that was finished is lost" if full else ""
        print(f"error: {printable(error)}{mend}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
