"""Loss-weight schedules: values by hand at the corners, floats and tensors alike, and settings that cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tffd_zoo.schedules import LossWeight

IMAGENET: dict[str, Any] = {"epochs": 100, "warmup_epochs": 5}


@pytest.mark.parametrize(("epoch", "weight"), [(0, 0), (5, 0.25), (19, 0.95), (20, 1), (239.9, 1)])
def test_the_warm_up_is_linear_in_the_fractional_epoch_and_stays_at_one(epoch, weight):
    assert LossWeight(epochs=240)(float(epoch)) == pytest.approx(weight)


@pytest.mark.parametrize(
    ("epoch", "weight"), [(2.5, 0.5), (5, 1), (29.99, 1), (30, 0.9), (59.9, 0.9), (60, 0.81), (90, 0.729), (100, 0.729)]
)
def test_edt_takes_a_tenth_off_every_thirty_of_a_hundred_epochs(epoch, weight):
    assert LossWeight(**IMAGENET, decay="edt")(float(epoch)) == pytest.approx(weight)


@pytest.mark.parametrize("epochs", [1, 13, 15, 30, 90, 100, 240])
def test_edt_steps_at_exactly_three_tenths_of_a_run_of_any_length(epochs):
    weight = LossWeight(epochs, warmup_epochs=0, decay="edt")
    for step in (1, 2, 3):
        boundary = 3 * epochs * step / 10
        assert weight(boundary) == pytest.approx(0.9**step)
        assert weight(boundary - 1e-3) == pytest.approx(0.9 ** (step - 1))
        assert weight(torch.tensor(boundary)).item() == pytest.approx(0.9**step)


@pytest.mark.parametrize(("epoch", "weight"), [(2.5, 0.5), (5, 1), (30, 1), (37.5, 0.75), (45, 0.5), (60, 0), (99, 0)])
def test_off_holds_to_thirty_percent_of_the_run_and_is_gone_at_sixty(epoch, weight):
    assert LossWeight(**IMAGENET, decay="off")(float(epoch)) == pytest.approx(weight)


def test_a_warm_up_longer_than_the_decay_s_start_multiplies_it():
    assert LossWeight(epochs=100, warmup_epochs=60, decay="off")(45.0) == pytest.approx(0.75 * 0.5)


@pytest.mark.parametrize(("epoch", "weight"), [(0, 1 / 20), (0.99, 1 / 20), (1, 2 / 20), (18.5, 19 / 20), (19, 1)])
def test_whole_epochs_count_from_one_and_hold_the_weight_within_an_epoch(epoch, weight):
    assert LossWeight(epochs=240, whole_epochs=True)(float(epoch)) == pytest.approx(weight)


def test_without_a_warm_up_the_weight_is_full_from_the_first_step():
    weight = LossWeight(epochs=240, warmup_epochs=0)
    assert weight(0.0) == 1
    assert weight(torch.tensor(0.0)).item() == 1


@pytest.mark.parametrize("decay", ["none", "edt", "off"])
@pytest.mark.parametrize("whole_epochs", [False, True])
@pytest.mark.parametrize("warmup_epochs", [0, 7])
def test_a_tensor_gives_what_a_float_gives(decay, whole_epochs, warmup_epochs):
    weight = LossWeight(50, warmup_epochs, decay, whole_epochs)
    for epoch in torch.arange(0, 50, 0.37, dtype=torch.float64):
        result = weight(epoch)
        assert isinstance(result, torch.Tensor)
        assert result.shape == ()
        assert result.item() == pytest.approx(weight(epoch.item()), abs=1e-12)
        assert isinstance(weight(epoch.item()), float)


@pytest.mark.parametrize("decay", ["none", "edt", "off"])
def test_python_never_reads_a_tensor_s_value(decay):
    weight = LossWeight(**IMAGENET, decay=decay, whole_epochs=True)
    assert weight(torch.tensor(3.0, device="meta")).device.type == "meta"  # a meta tensor has no value to read
    compiled = torch.compile(weight.__call__, backend="eager", fullgraph=True)
    assert compiled(torch.tensor(45.0)) == weight(torch.tensor(45.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": math.inf}, "epochs=inf"),
        ({"epochs": math.nan}, "epochs=nan"),
        ({"epochs": 10, "warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"epochs": 10, "warmup_epochs": math.nan}, "warmup_epochs=nan"),
        ({"epochs": 10, "decay": "cosine"}, "choose one of none, edt, off"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossWeight(**settings)


@pytest.mark.parametrize("epoch", [-0.1, math.nan])
def test_an_epoch_outside_the_run_is_refused(epoch):
    with pytest.raises(ValueError, match="epochs count from 0"):
        LossWeight(epochs=10)(epoch)
