"""What a user can mend is told in one line, whatever it quotes."""

from __future__ import annotations

import pytest

from tffd_zoo.cli import guard


def test_an_error_is_one_line_that_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("class 'a\x1b[2Jb\nc' is unknown")

    with pytest.raises(SystemExit) as left:
        guard(fail)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: class 'a\\x1b[2Jb\\nc' is unknown\n"
