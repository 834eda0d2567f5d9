"""A recipe's name is checked when a run starts: it becomes a folder."""

from __future__ import annotations

import pytest
from run_records import TFFD

from tffd_zoo.recipe import vary


@pytest.mark.parametrize("name", ["../../x", "", ".hidden", "a/b", "a b", "a\nb"])
def test_a_name_that_is_no_folders_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name the run's folder"):
        vary(TFFD, name)
