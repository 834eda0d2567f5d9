"""DropBlock and Dropout where stages end: when, how much, exactly again on resume, and without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, RunConfig, vary
from tffd_zoo.stages import find_stages
from tffd_zoo.tasks import CANONICAL, DistillationTask, DropConfig, StageDrop, TfFDTask
from tffd_zoo.tasks.regularisers import drop_block
from tffd_zoo.training import build

SIZE = 8


def network(name: str = "tffd_resnet20", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs)


def a_batch(images: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, SIZE, SIZE, generator=generator), torch.randint(0, 10, (images,), generator=generator)


def a_task(config: DropConfig, tffd: bool = False) -> DistillationTask:
    """Four epochs of two batches."""
    model = network()
    stages = find_stages(model)
    drop = StageDrop(config, model, stages, epochs=4)
    if tffd:
        return TfFDTask(model, CANONICAL, epochs=4, batches_per_epoch=2, objectives=[drop])
    return DistillationTask(model, [drop], stages=stages, batches_per_epoch=2)


@pytest.mark.parametrize("size", [4, 5, 7, 8, 14, 16, 28, 32, 56])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_what_is_dropped_is_what_was_asked_for(size: int, probability: float) -> None:
    torch.manual_seed(size)
    maps = torch.ones(max(1, 60_000 // size**2), 8, size, size)
    dropped = drop_block(maps, probability, 7)
    assert (dropped == 0).float().mean().item() == pytest.approx(probability, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1, rel=1e-5), "what is left makes up for it"


def test_blocks_are_squares_that_lie_inside_the_map() -> None:
    torch.manual_seed(0)
    dropped = drop_block(torch.ones(400, 1, 6, 9), 0.02, 4) == 0
    alone = [mask[0] for mask in dropped if mask.sum() == 16]  # one block
    assert len(alone) > 20
    for mask in alone:
        rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
        assert (rows, columns) == (list(range(rows[0], rows[0] + 4)), list(range(columns[0], columns[0] + 4)))
    assert torch.stack(alone).any(0).all(), "every place can be hit"


def test_a_block_as_large_as_the_map_takes_all_of_it_or_nothing() -> None:
    torch.manual_seed(0)
    dropped = (drop_block(torch.ones(2000, 1, 3, 5), 0.3, 7) == 0).flatten(1)
    assert (dropped.all(1) | ~dropped.any(1)).all()
    assert dropped.any(1).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_blocks_are_dropped_from_the_first_two_stages_and_values_from_the_last() -> None:
    task, (images, targets) = a_task(DropConfig(drop_block=0.4, block_size=3, dropout=0.5)), a_batch()
    for _ in range(3):
        torch.manual_seed(2)
        result = task(images, targets)
    # the third of two batches an epoch: epoch 1 of 4
    model = network()
    for _ in range(2):  # BatchNorm moves on, but training mode does not read it
        model(images)
    torch.manual_seed(2)
    x = drop_block(model.stages[0](model.stem(images)), 0.4 * 1 / 4, 3)
    x = drop_block(model.stages[1](x), 0.4 * 1 / 4, 3)
    logits = model.forward_head(F.dropout(model.stages[2](x), 0.5))
    torch.testing.assert_close(result["output"], logits)
    assert result["loss"].item() == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert set(result) == {"loss", "output", "ce"}


def test_the_drop_probability_rises_from_0_over_the_run() -> None:
    task, batch = a_task(DropConfig(drop_block=0.1)), a_batch()
    seen = []
    for _ in range(10):
        result = task(*batch)
        seen.append(task.objectives[0].drop_prob)
        if len(seen) == 1:
            torch.testing.assert_close(result["output"], network()(batch[0]))
    assert seen == pytest.approx([0.1 * step / 8 for step in range(9)] + [0.1])


def test_a_block_is_no_larger_than_the_map() -> None:
    torch.manual_seed(0)
    task = a_task(DropConfig(drop_block=0.9, block_size=7))
    for _ in range(4):
        loss = task(*a_batch())["loss"]  # the second stage's maps are 4 by 4
    assert loss.isfinite()


def test_tffd_sees_the_features_that_the_next_stage_sees() -> None:
    task, (images, targets) = a_task(DropConfig(dropout=0.5), tffd=True), a_batch()
    seen: list[Tensor] = []
    original = task.objectives[0].forward
    task.objectives[0].forward = lambda view: seen.extend(view.features) or original(view)
    result = task(images, targets)
    assert {"intra", "inter"} <= set(result)
    zeros = [(feature == 0).float().mean().item() for feature in seen]
    plain = [(f == 0).float().mean().item() for f in network().forward_intermediates(images, indices=[1, 2, 3])[1]]
    assert zeros[:2] == plain[:2]
    assert zeros[2] == pytest.approx(1 - (1 - plain[2]) / 2, abs=0.05)


def test_inference_and_keys_are_those_of_the_plain_model_even_while_the_task_trains() -> None:
    task, (images, targets) = a_task(DropConfig(drop_block=0.5, block_size=3, dropout=0.5)), a_batch()
    for _ in range(3):
        task(images, targets)
    student = task.get_eval_model().eval()
    assert task.training
    plain = network().eval()
    plain.load_state_dict(student.state_dict(), strict=True)
    state = torch.get_rng_state()
    assert torch.equal(student(images), plain(images))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"


@pytest.mark.parametrize("tffd", [False, True])
def test_a_resumed_run_drops_what_the_whole_run_drops(tffd: bool) -> None:
    config, batch = DropConfig(drop_block=0.5, block_size=3, dropout=0.1), a_batch()
    whole = a_task(config, tffd)
    torch.manual_seed(3)
    for _ in range(3):
        whole(*batch)
    state, generator = {k: v.clone() for k, v in whole.state_dict().items()}, torch.get_rng_state()
    expected = [whole(*batch)["loss"] for _ in range(2)]
    assert expected[0] != expected[1]
    resumed = a_task(config, tffd)
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    assert [resumed(*batch)["loss"] for _ in range(2)] == expected


def test_the_compiled_task_drops_what_the_eager_one_drops() -> None:
    losses = []
    for compiled in (False, True):
        task = a_task(DropConfig(drop_block=0.5, block_size=3, dropout=0.1))
        if compiled:
            torch.compiler.reset()
            task.compile(backend="eager")
        torch.manual_seed(3)
        losses.append([task(*a_batch())["loss"].item() for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_network_without_maps_of_channels_is_refused() -> None:
    model = network("vit_tiny_patch16_224", img_size=32)
    stages = find_stages(model)
    task = DistillationTask(model, [StageDrop(DropConfig(dropout=0.5), model, stages, epochs=4)], stages=stages)
    with pytest.raises(ValueError, match=r"stage blocks\.11 .* choose a convolutional network"):
        task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))


def test_a_schedule_without_the_length_of_an_epoch_is_refused() -> None:
    model = network()
    stages = find_stages(model)
    task = DistillationTask(model, [StageDrop(DropConfig(drop_block=0.1), model, stages, epochs=4)], stages=stages)
    task(*a_batch())
    with pytest.raises(ValueError, match=r"batches_per_epoch=len\(train_loader\)"):
        task(*a_batch())


def test_dropping_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="leave drop out"):
        DropConfig()


# --- label smoothing and CutMix, the regularisers that act on targets -------------------------------------------------

RECIPE = Recipe(
    name="test",
    model="tffd_resnet20",
    data=DataConfig(source="digits", image_size=SIZE, augment="none", drop_last=True),
    optim=OptimConfig(epochs=2, batch_size=512, lr=0.05, weight_decay=5e-4),
    run=RunConfig(log_every=1),
)


def test_label_smoothing_moves_a_tenth_of_the_target_to_all_classes() -> None:
    logits, targets = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
    log_p = F.log_softmax(logits, dim=1)[0]
    smoothed = build.make_criterion(vary(RECIPE, "test", optim={"label_smoothing": 0.1}))
    expected = -(0.9 * log_p[0] + 0.1 * log_p.mean())
    assert smoothed(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert build.make_criterion(RECIPE)(logits, targets).item() == pytest.approx(-log_p[0].item(), rel=1e-6)


def test_cutmix_gives_targets_that_add_up_smoothed_once() -> None:
    recipe = vary(RECIPE, "test", optim={"cutmix": 1.0, "label_smoothing": 0.1})
    source, _ = build.open_sources(recipe.data)
    mixup = build.make_mixup(recipe, source, 1)
    assert mixup is not None
    _, targets = mixup(*a_batch(8))
    assert targets.shape == (8, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    logits = torch.randn(8, 10)
    expected = -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()
    torch.testing.assert_close(build.make_criterion(recipe)(logits, targets), expected)
