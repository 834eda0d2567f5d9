"""Feature losses: numbers by hand, NumPy oracles written from the papers' equations, alignment and refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tffd_zoo.feature_losses import FEATURE_LOSSES, ab, align, at, ickd, l2, sp

# --- oracles: loops over samples, channels and places, in double precision --------------------------------------------


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def l2_oracle(s: np.ndarray, t: np.ndarray) -> float:
    return float(np.mean([(a - b) ** 2 for a, b in zip(s.flat, t.flat, strict=True)]))


def ab_oracle(s: np.ndarray, t: np.ndarray, margin: float = 2.0) -> float:
    total = 0.0
    for a, b in zip(s.flat, t.flat, strict=True):
        if b > 0 and a <= margin:
            total += (a - margin) ** 2
        if b <= 0 and a > -margin:
            total += (a + margin) ** 2
    return total / s.size


def at_oracle(s: np.ndarray, t: np.ndarray) -> float:
    squares = []
    for a, b in zip(s, t, strict=True):
        q_s, q_t = (unit(np.mean(x**2, axis=0).ravel()) for x in (a, b))
        squares.append(np.mean((q_s - q_t) ** 2))
    return float(np.mean(squares))


def similarity_oracle(rows: np.ndarray) -> np.ndarray:
    return np.stack([unit(np.array([row @ other for other in rows])) for row in rows])


def sp_oracle(s: np.ndarray, t: np.ndarray) -> float:
    g_s, g_t = (similarity_oracle(x.reshape(len(x), -1)) for x in (s, t))
    return float(np.linalg.norm(g_s - g_t, "fro") ** 2 / len(s) ** 2)


def ickd_oracle(s: np.ndarray, t: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(s, t, strict=True):
        total += np.sum((similarity_oracle(a.reshape(len(a), -1)) - similarity_oracle(b.reshape(len(b), -1))) ** 2)
    return float(total / (s.shape[0] * s.shape[1]))


ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "l2": l2_oracle,
    "ab": ab_oracle,
    "at": at_oracle,
    "sp": sp_oracle,
    "ickd": ickd_oracle,
}


def feature(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- values -----------------------------------------------------------------------------------------------------------


def test_l2_by_hand():
    student = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    target = torch.tensor([[[[3.0, 2.0]]], [[[0.0, 4.0]]]])
    assert l2(student, target) == (4 + 0 + 0 + 16) / 4
    assert l2(student, target, reduction="sum") == (4 + 0 + 0 + 16) / 2  # over two samples


def test_ab_by_hand():
    student = torch.tensor([-3.0, -1.0, 0.5, 3.0]).view(1, 1, 2, 2)
    target = torch.tensor([-1.0, 0.0, 0.1, 9.0]).view(1, 1, 2, 2)
    assert ab(student, target) == (0 + 1**2 + 1.5**2 + 0) / 4
    assert ab(student, target, margin=1.0) == (0 + 0 + 0.5**2 + 0) / 4


def test_at_by_hand():
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2)  # attention (1, 0)
    target = torch.tensor([0.0, 5.0]).view(1, 1, 1, 2)  # attention (0, 1), whatever its strength or its channels
    assert at(student, target) == 1
    assert at(student, 7 * student) == 0


def test_sp_by_hand():
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 2, 1, 1)  # G = identity
    alike = torch.tensor([[1.0], [1.0]]).view(2, 1, 1, 1)  # G = ones, rows scaled to 1 / sqrt 2
    root = 2**-0.5
    assert sp(apart, alike).item() == pytest.approx((2 * (1 - root) ** 2 + 2 * root**2) / 4)


def test_ickd_by_hand():
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    alike = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).view(1, 2, 2, 2)
    root = 2**-0.5
    assert ickd(apart, alike).item() == pytest.approx((2 * (1 - root) ** 2 + 2 * root**2) / 2)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
@pytest.mark.parametrize("batch", [1, 5])
def test_every_loss_equals_its_oracle(name, batch):
    student, target = feature(batch, 3, 4, 6), feature(batch, 3, 4, 6, seed=1)
    expected = ORACLES[name](student.double().numpy(), target.double().numpy())
    value = FEATURE_LOSSES[name](student, target)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_the_student_s_gradient_is_the_oracle_s_slope_and_a_detached_target_gets_none(name):
    student, target = feature(3, 2, 2, 3).requires_grad_(), feature(3, 2, 2, 3, seed=1).requires_grad_()
    FEATURE_LOSSES[name](student, target.detach()).backward()
    assert target.grad is None

    s, t, step = student.detach().double().numpy(), target.detach().double().numpy(), 1e-5
    slopes = np.zeros_like(s)
    for place in np.ndindex(s.shape):
        nudge = np.zeros_like(s)
        nudge[place] = step
        slopes[place] = (ORACLES[name](s + nudge, t) - ORACLES[name](s - nudge, t)) / (2 * step)
    np.testing.assert_allclose(student.grad.numpy(), slopes, atol=1e-5)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_the_target_learns_too_where_it_is_not_detached(name):
    student, target = feature(2, 3, 2, 2).requires_grad_(), feature(2, 3, 2, 2, seed=1).requires_grad_()
    FEATURE_LOSSES[name](student, target).backward()
    if name == "ab":  # only the sign of its target counts
        assert target.grad is None
    else:
        assert target.grad.abs().max() > 0


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_features_of_zeros_give_a_finite_loss_and_gradient(name):
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = FEATURE_LOSSES[name](student, feature(2, 3, 4, 4))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_half_precision_features_and_autocast_leave_the_loss_in_float32(name):
    student, target = feature(4, 3, 4, 4).bfloat16(), feature(4, 3, 4, 4, seed=1).bfloat16()
    expected = FEATURE_LOSSES[name](student.float(), target.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = FEATURE_LOSSES[name](student, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


# --- alignment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "student", "target"),
    [
        ("l2", (2, 4, 3, 5), (2, 4, 3, 5)),
        ("ab", (2, 4, 3, 5), (2, 4, 3, 5)),
        ("at", (2, 4, 3, 5), (2, 6, 3, 5)),
        ("ickd", (2, 4, 9, 5), (2, 4, 3, 10)),
        ("sp", (2, 4, 9, 5), (2, 6, 3, 10)),
    ],
)
def test_align_pools_and_crops_only_what_the_loss_needs(name, student, target):
    shallow, deep = align(feature(2, 4, 9, 5), feature(2, 6, 3, 10), name)
    assert (tuple(shallow.shape), tuple(deep.shape)) == (student, target)
    assert FEATURE_LOSSES[name](shallow, deep).isfinite()


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (4, 2), (3, 5), (1, 1)])
def test_align_pools_the_larger_map_as_adaptive_average_pooling_does(size):
    large, small = feature(2, 3, 8, 8), feature(2, 3, *size, seed=1)
    for shallow, deep in ((large, small), (small, large)):
        aligned = align(shallow, deep, "l2")
        for before, after in zip((shallow, deep), aligned, strict=True):
            torch.testing.assert_close(after, F.adaptive_avg_pool2d(before, size))


def test_align_keeps_the_first_channels_of_the_wider_feature():
    narrow, wide = feature(2, 3, 4, 4), feature(2, 5, 4, 4, seed=1)
    assert torch.equal(align(narrow, wide, "l2")[1], wide[:, :3])
    assert torch.equal(align(wide, narrow, "ickd")[0], wide[:, :3])


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_align_leaves_features_of_one_shape_as_they_are_and_lets_the_gradient_through(name):
    student, target = feature(2, 3, 4, 4), feature(2, 3, 4, 4, seed=1)
    for before, after in zip((student, target), align(student, target, name), strict=True):
        assert after.data_ptr() == before.data_ptr()
    large = feature(2, 5, 8, 8).requires_grad_()
    FEATURE_LOSSES[name](*align(large, target, name)).backward()
    assert large.grad.abs().sum() > 0


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("l2", (2, 3, 4, 5)),
        ("l2", (2, 1, 4, 4)),
        ("ab", (2, 4, 4, 4)),
        ("at", (2, 3, 2, 2)),
        ("at", (1, 3, 4, 4)),
        ("ickd", (2, 4, 4, 4)),
        ("ickd", (1, 3, 4, 4)),
    ],
)
def test_features_that_a_loss_cannot_compare_are_refused_with_the_way_out(name, target):
    with pytest.raises(ValueError, match=rf"align\(student, target, '{name}'\)"):
        FEATURE_LOSSES[name](feature(2, 3, 4, 4), feature(*target))


def test_sp_refuses_two_different_batches():
    with pytest.raises(ValueError, match="2 and 3 samples"):
        sp(feature(2, 3, 4, 4), feature(3, 3, 4, 4))


def test_an_unknown_loss_or_reduction_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown feature loss 'l1'; choose one of l2, ab, at, sp, ickd"):
        align(feature(1, 1, 1, 1), feature(1, 1, 1, 1), "l1")
    with pytest.raises(ValueError, match="unknown reduction 'none'"):
        l2(feature(1, 1, 1, 1), feature(1, 1, 1, 1), reduction="none")
