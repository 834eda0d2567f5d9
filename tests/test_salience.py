"""Salience: numbers by hand, NumPy oracles, memory layouts and precisions, and agreement between processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import on_two_processes
from torch import nn

from tffd_zoo import _lean
from tffd_zoo.salience import bn_scale, entropy, histogram, hrank, lp, spread, stage_salience

SHAPES = [(5, 6, 8), (7, 4, 4), (3, 1, 1)]  # (C, H, W) of three stages


def relu_features(samples: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, *shape, generator=generator).relu() for shape in SHAPES]


# --- oracles: one channel at a time, in double precision --------------------------------------------------------------


def lp_oracle(maps: np.ndarray, p: int) -> float:
    return float(np.mean([np.sum(np.abs(m) ** p) ** (1 / p) for m in maps]))


def spread_oracle(maps: np.ndarray) -> float:
    return float(np.mean([np.mean(m / max(np.linalg.norm(m), 1e-12)) for m in maps]))


def entropy_oracle(maps: np.ndarray) -> float:
    counts, _ = np.histogram(maps, bins=10)
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares))) if maps.min() < maps.max() else 0.0


def hrank_oracle(maps: np.ndarray) -> float:
    return float(np.mean([np.linalg.matrix_rank(m.astype(np.float32)) for m in maps]))


METRICS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., float]]] = {
    "l1": (lambda features: lp(features, p=1), lambda maps: lp_oracle(maps, 1)),
    "l2": (lambda features: lp(features, p=2), lambda maps: lp_oracle(maps, 2)),
    "spread": (spread, spread_oracle),
    "entropy": (entropy, entropy_oracle),
    "hrank": (hrank, hrank_oracle),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("samples", [1, 4, 130])  # 130: entropy adds up its packed counters 63 at a time
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_metric_equals_its_oracle_in_either_memory_layout(name, samples, layout):
    metric, oracle = METRICS[name]
    for features in relu_features(samples):
        features[:, 0] = 0  # a dead channel
        scores = metric(features.to(memory_format=layout))
        expected = [oracle(maps) for maps in features.double().transpose(0, 1).numpy()]
        assert scores.dtype == torch.float32
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5, atol=1e-6)


# --- values by hand ---------------------------------------------------------------------------------------------------


def maps(*values: list[float]) -> torch.Tensor:
    """One channel; every list is the 1 x W map of one sample."""
    return torch.tensor(values).view(len(values), 1, 1, -1)


def test_lp_is_the_mean_over_samples_of_the_map_s_norm():
    assert lp(maps([3.0, -4.0], [0.0, 1.0])).item() == (5 + 1) / 2
    assert lp(maps([3.0, -4.0], [0.0, 1.0]), p=1).item() == (7 + 1) / 2


def test_spread_is_the_mean_of_maps_of_unit_length_and_a_map_of_zeros_counts_zero():
    assert spread(maps([3.0, 4.0])).item() == pytest.approx((0.6 + 0.8) / 2)
    assert spread(maps([3.0, 4.0], [0.0, 0.0])).item() == pytest.approx(0.7 / 2)
    assert spread(maps([1e3, 1e3])) > spread(maps([1e6, 0.0]))  # spread counts, strength does not


def test_entropy_of_evenly_filled_bins_is_the_logarithm_of_their_number():
    assert entropy(maps(list(range(10)))).item() == pytest.approx(math.log(10))
    assert entropy(maps([0.0, 0.0, 1.0, 1.0])).item() == pytest.approx(math.log(2))
    assert entropy(maps([0.0, 1.0, 2.0, 3.0]), bins=2).item() == pytest.approx(math.log(2))
    assert entropy(maps([0.0, 0.0, 0.0, 1.0])).item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))


def test_a_constant_channel_has_no_entropy():
    assert entropy(maps([7.0, 7.0], [7.0, 7.0])).item() == 0


def test_entropy_bins_a_channel_by_its_own_range_over_all_samples():
    features = torch.cat([maps([0.0, 1.0], [9.0, 10.0]), maps([0.0, 100.0], [0.0, 100.0])], dim=1)
    # Bins of width 1 hold one 0, one 1, and 9 and 10 together, since the last holds the maximum; of width 10, 2 and 2.
    expected = [2 * 0.25 * math.log(4) + 0.5 * math.log(2), math.log(2)]
    np.testing.assert_allclose(entropy(features).numpy(), expected, rtol=1e-6)


def test_hrank_is_the_mean_rank():
    eye, ones, zeros = torch.eye(4), torch.ones(4, 4), torch.zeros(4, 4)
    features = torch.stack([torch.stack([eye, ones, zeros]), torch.stack([eye, eye, zeros])])
    assert hrank(features).tolist() == [4, 2.5, 0]


def test_bn_scale_is_the_size_of_gamma():
    norm = nn.BatchNorm2d(3)
    nn.init.constant_(norm.weight, -0.5)
    assert bn_scale(norm).tolist() == [0.5, 0.5, 0.5]
    assert not bn_scale(norm).requires_grad


# --- precision, gradient, compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["lp", "spread", "entropy", "hrank"])
def test_half_precision_features_are_scored_in_float32(metric, monkeypatch):
    monkeypatch.setattr(_lean, "CHUNK", 1)  # an image at a time
    features = [200 * feature.half() for feature in relu_features(3)]  # their squares overflow in half precision
    expected = stage_salience([feature.float() for feature in features], metric)
    for half, full in zip(stage_salience(features, metric), expected, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full)


@pytest.mark.parametrize("metric", ["lp", "spread", "entropy", "hrank"])
def test_salience_carries_no_gradient(metric):
    features = [feature.requires_grad_() for feature in relu_features(2)]
    assert not any(score.requires_grad for score in stage_salience(features, metric))


@pytest.mark.parametrize("metric", ["lp", "spread", "entropy"])
def test_salience_compiles_into_one_graph(metric):
    features = relu_features(70)
    compiled = torch.compile(stage_salience, backend="eager", fullgraph=True)
    for score, expected in zip(compiled(features, metric), stage_salience(features, metric), strict=True):
        torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("metric", ["lp", "spread", "entropy"])
def test_salience_never_waits_for_a_value(metric):
    scores = stage_salience([feature.to("meta") for feature in relu_features(2)], metric)  # meta: there are no values
    assert [tuple(score.shape) for score in scores] == [(5,), (7,), (3,)]


# --- all stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "single"), [("lp", lp), ("spread", spread), ("entropy", entropy), ("hrank", hrank)])
def test_stage_salience_scores_every_stage_as_the_metric_does(metric, single):
    features = relu_features(4)
    for score, feature in zip(stage_salience(features, metric), features, strict=True):
        torch.testing.assert_close(score, single(feature))


def test_stage_salience_passes_p_on():
    features = relu_features(4)
    assert torch.equal(stage_salience(features, "lp", p=1)[0], lp(features[0], p=1))


def test_stage_salience_reads_the_scale_of_every_stage_s_norm():
    norms = [nn.BatchNorm2d(shape[0]) for shape in SHAPES]
    for value, norm in enumerate(norms):
        nn.init.constant_(norm.weight, -value)
    scores = stage_salience(relu_features(2), "bn_scale", norms=norms)
    assert [score.unique().tolist() for score in scores] == [[0], [1], [2]]


@pytest.mark.parametrize("metric", ["lp", "spread", "entropy", "hrank"])
def test_images_limits_the_samples_scored(metric):
    features = relu_features(6)
    for limited, first in zip(
        stage_salience(features, metric, images=2),
        stage_salience([feature[:2] for feature in features], metric),
        strict=True,
    ):
        assert torch.equal(limited, first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "l2"}, "unknown salience 'l2'; choose one of lp, spread, entropy, bn_scale, hrank"),
        ({"metric": "lp", "p": 3}, "p=1 and p=2, not p=3"),
        ({"metric": "hrank", "images": 0}, "images=0"),
        ({"metric": "bn_scale"}, "each of the 3 stages and got none"),
        ({"metric": "bn_scale", "norms": [nn.BatchNorm2d(5)]}, "each of the 3 stages and got 1"),
        ({"metric": "bn_scale", "norms": [nn.BatchNorm2d(5, affine=False)] * 3}, "affine=True"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        stage_salience(relu_features(2), **arguments)


def test_a_number_of_bins_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="1 or more bins, not in 0"):
        entropy(relu_features(2)[0], bins=0)


@pytest.mark.parametrize("samples", [1, 62, 63, 64, 150], ids="{} samples".format)
def test_the_packed_histogram_counts_as_the_plain_one(samples):
    values = torch.randn(samples, 5, 3, 2, generator=torch.Generator().manual_seed(samples))
    values[:, 1] = 7.0  # a constant channel
    low, high = values.amin((0, 2, 3)), values.amax((0, 2, 3))
    packed = _lean.histogram(values, low, high, 10)
    assert torch.equal(packed, histogram(values, low, high, 10))
    assert packed[1].tolist() == [samples * 6] + 9 * [0]
    edges = [np.linspace(float(a), float(b), 11) for a, b in zip(low, high, strict=True)]
    assert packed[0].tolist() == np.histogram(values[:, 0].double().numpy(), edges[0])[0].tolist()


# --- two processes ----------------------------------------------------------------------------------------------------

UNEVEN_SHARES = (5, 2)
EVEN_SHARES = (4, 4)
REDUCTIONS = {"lp": 1, "spread": 1, "entropy": 2, "bn_scale": 0, "hrank": 1}


def whole_batch(samples: int) -> list[torch.Tensor]:
    return [feature + 0.5 for feature in relu_features(samples)]  # no zeros, which an empty share must not add


def score_own_share(folder: Path) -> None:
    """One of two processes: scores its share of each batch and saves the scores and the number of all-reduces."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    reductions = 0
    all_reduce = dist.all_reduce

    def counting_all_reduce(*args, **kwargs):
        nonlocal reductions
        reductions += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting_all_reduce
    norms = [nn.BatchNorm2d(shape[0]) for shape in SHAPES]
    results = {}
    for metric in REDUCTIONS:
        reductions = 0
        share = [feature.split(UNEVEN_SHARES)[rank] for feature in whole_batch(sum(UNEVEN_SHARES))]
        scores = stage_salience(share, metric, norms=norms)
        results[metric] = (scores, reductions)
        share = [feature.split(EVEN_SHARES)[rank] for feature in whole_batch(sum(EVEN_SHARES))]
        for images in (3, 6):  # of the whole batch: a part of the first share; all of it and a part of the second
            results[metric, images] = stage_salience(share, metric, norms=norms, images=images)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results_of_two_processes(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("gloo")
    on_two_processes(score_own_share, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("metric", REDUCTIONS)
def test_two_processes_score_an_unevenly_split_batch_as_one_process_scores_the_whole(results_of_two_processes, metric):
    norms = [nn.BatchNorm2d(shape[0]) for shape in SHAPES]
    expected = stage_salience(whole_batch(sum(UNEVEN_SHARES)), metric, norms=norms)
    (first, reductions), (second, _) = (results[metric] for results in results_of_two_processes)
    for mine, yours, whole in zip(first, second, expected, strict=True):
        assert torch.equal(mine, yours)
        torch.testing.assert_close(mine, whole)
    assert reductions == REDUCTIONS[metric]


@pytest.mark.parametrize("metric", REDUCTIONS)
@pytest.mark.parametrize("images", [3, 6])
def test_images_counts_through_the_shares_of_all_processes(results_of_two_processes, metric, images):
    norms = [nn.BatchNorm2d(shape[0]) for shape in SHAPES]
    expected = stage_salience(whole_batch(sum(EVEN_SHARES)), metric, norms=norms, images=images)
    for results in results_of_two_processes:
        for score, whole in zip(results[metric, images], expected, strict=True):
            torch.testing.assert_close(score, whole)
