"""A recipe's names are checked when a run starts: they become a folder, and a tag."""

from __future__ import annotations

import pytest
from run_records import TFFD

from tffd_zoo.recipe import vary


@pytest.mark.parametrize("name", ["../../x", "", ".hidden", "a/b", "a b", "a\nb"])
def test_a_name_that_is_no_folders_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name the run's folder"):
        vary(TFFD, name)


@pytest.mark.parametrize("tag", ["C100-v2/..", "", "c100-v2", "C100"])
def test_a_tag_that_could_not_be_released_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="cannot be released"):
        vary(TFFD, "tffd", tag=tag)
