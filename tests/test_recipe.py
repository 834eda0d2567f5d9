"""What a recipe refuses when it is written down, before a run starts."""

from __future__ import annotations

import pytest
from run_records import TFFD

from tffd_zoo.recipe import differences, vary


@pytest.mark.parametrize("name", ["../../x", "", ".hidden", "a/b", "a b", "a\nb"])
def test_a_name_that_is_no_folders_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name the run's folder"):
        vary(TFFD, name)


@pytest.mark.parametrize("weights", ["last_ema", "best_ema"])
def test_a_moving_average_that_is_not_kept_is_not_exported(weights: str) -> None:
    with pytest.raises(ValueError, match=rf"--weights {weights} are a moving average.*--ema-decay.*or say --weights"):
        vary(TFFD, "test", run={"weights": weights}, optim={"ema_decay": None})
    averaged = vary(TFFD, "test", run={"weights": weights}, optim={"ema_decay": 0.9})
    assert not differences(averaged.to_dict(), vary(averaged, "test", run={"weights": "last"}).to_dict()), "one run"
