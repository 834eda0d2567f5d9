"""BYOT, CS-KD, Tf-KD and PS-KD against their papers' equations, written out a second time in numpy or by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import on_two_processes
from torch import Tensor

from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, vary
from tffd_zoo.stages import find_stages
from tffd_zoo.tasks import (
    BYOT,
    CSKD,
    PSKD,
    BYOTConfig,
    CSKDConfig,
    DistillationTask,
    Method,
    Objective,
    PSKDConfig,
    TfKD,
    TfKDConfig,
    View,
)
from tffd_zoo.training import build

SIZE, CLASSES, IMAGES = 8, 10, 12
LABELS = torch.arange(IMAGES) % CLASSES


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("tffd_resnet20", num_classes=CLASSES)


def a_batch(indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Images, classes and positions in a data set of `IMAGES` images."""
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return images[indices], LABELS[indices], torch.tensor(indices)


def a_view(
    logits: Tensor, targets: Tensor, features: list[Tensor] | None = None, positions: Tensor | None = None
) -> View:
    return View(torch.zeros(len(logits), 3, SIZE, SIZE), targets, logits, features or [], positions)


def softmax(logits: Tensor, temperature: float = 1.0) -> np.ndarray:
    z = logits.detach().numpy().astype(np.float64) / temperature
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def kl_oracle(q: np.ndarray, p: np.ndarray) -> float:
    return float((q * (np.log(q) - np.log(p))).sum(axis=1).mean())


def ce_oracle(logits: Tensor, targets: Tensor) -> float:
    return float(-np.log(softmax(logits)[np.arange(len(targets)), targets.numpy()]).mean())


# --- BYOT -------------------------------------------------------------------------------------------------------------


def test_byot_is_the_sum_over_shallow_branches_of_the_papers_three_losses() -> None:
    model = network()
    stages = find_stages(model)
    byot = BYOT(BYOTConfig(alpha=0.3, temperature=3.0, beta=1e-5), stages, CLASSES)
    task = DistillationTask(model, [byot], stages=stages)
    images, targets, _ = a_batch([0, 1, 2, 3])
    result = task(images, targets)

    fresh = network()
    logits = fresh(images)
    features = fresh.forward_intermediates(images, indices=[1, 2, 3])[1]
    deepest = features[-1].detach().double().numpy()
    ce = kd = hint = 0.0
    for stage in (0, 1):
        branch = byot.adapters[stage](features[stage])
        branch_logits = byot.classifiers[stage](branch.mean((2, 3)))
        ce += ce_oracle(branch_logits, targets)
        kd += 9 * kl_oracle(softmax(logits, 3.0), softmax(branch_logits, 3.0))
        pooled = branch.detach().double().numpy().mean(axis=(2, 3))
        hint += 128 * float(((pooled - deepest.mean(axis=(2, 3))) ** 2).sum(axis=1).mean())
    terms = {name: result[name].item() for name in ("byot_ce", "byot_kd", "byot_hint")}
    assert terms == pytest.approx({"byot_ce": ce, "byot_kd": kd, "byot_hint": hint}, rel=1e-4)
    total = ce_oracle(logits, targets) + 0.7 * ce + 0.3 * kd + 1e-5 * hint
    assert result["loss"].item() == pytest.approx(total, rel=1e-5)


def test_byots_deepest_classifier_teaches_and_does_not_learn_from_the_branches() -> None:
    stages = find_stages(network())
    byot = BYOT(BYOTConfig(), stages, CLASSES)
    shapes = [(4, c, SIZE // r, SIZE // r) for c, r in zip(stages.channels, stages.reductions, strict=True)]
    features = [torch.randn(shape, requires_grad=True) for shape in shapes]
    logits = torch.randn(4, CLASSES, requires_grad=True)
    torch.stack(list(byot(a_view(logits, LABELS[:4], features)).values())).sum().backward()
    assert logits.grad is None
    assert features[-1].grad is None
    assert all(feature.grad is not None and feature.grad.abs().sum() > 0 for feature in features[:-1])


def test_byots_branches_step_down_to_the_deepest_stage_one_bottleneck_a_stage() -> None:
    stages = find_stages(timm.create_model("tffd_vgg8"))
    byot = BYOT(BYOTConfig(), stages, CLASSES)
    assert [len(adapter) for adapter in byot.adapters] == [4, 3, 2, 1]
    assert byot.adapters[0](torch.randn(2, 64, 32, 32)).shape == (2, 512, 4, 4)


# --- CS-KD ------------------------------------------------------------------------------------------------------------


def test_cs_kd_draws_an_images_prediction_to_that_of_its_partner() -> None:
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = CSKD(CSKDConfig(temperature=4.0))(a_view(logits, LABELS[:6]))["cs_kd"]
    expected = 16 * kl_oracle(softmax(logits[3:], 4.0), softmax(logits[:3], 4.0))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[:3].abs().sum() > 0
    assert logits.grad[3:].abs().sum() == 0, "partners only teach"


def test_cross_entropy_leaves_the_partners_out() -> None:
    model = network()
    task = DistillationTask(model, [CSKD(CSKDConfig(weight=2.0))], stages=find_stages(model))
    images, targets, _ = a_batch([0, 1, 2, 10, 11, 3])
    result = task(images, targets)
    assert result["ce"].item() == pytest.approx(ce_oracle(network()(images)[:3], targets[:3]), rel=1e-5)
    assert result["loss"].item() == pytest.approx((result["ce"] + 2 * result["cs_kd"]).item(), rel=1e-6)
    with pytest.raises(ValueError, match="a batch of 5 images is not made of pairs"):
        task(images[:5], targets[:5])


# --- Tf-KD ------------------------------------------------------------------------------------------------------------


def test_tf_kd_replaces_a_share_of_cross_entropy_by_a_designed_teacher() -> None:
    model = network()
    task = DistillationTask(model, [TfKD(TfKDConfig())], stages=find_stages(model))
    images, targets, _ = a_batch([0, 1, 2, 3])
    result = task(images, targets)
    designed = np.full((4, CLASSES), 0.01 / 9)
    designed[np.arange(4), targets.numpy()] = 0.99
    softened = designed ** (1 / 20)
    softened /= softened.sum(axis=1, keepdims=True)
    expected = 400 * kl_oracle(softened, softmax(network()(images), 20.0))
    assert result["tf_kd"].item() == pytest.approx(expected, rel=1e-3)
    loss = 0.9 * result["ce"].item() + 0.1 * result["tf_kd"].item()
    assert result["loss"].item() == pytest.approx(loss, rel=1e-6)


# --- PS-KD ------------------------------------------------------------------------------------------------------------


def a_ps_kd_task(alpha: float = 0.8) -> DistillationTask:
    """Two epochs of two batches."""
    model = network()
    objective = PSKD(PSKDConfig(alpha), LABELS, CLASSES, epochs=2)
    return DistillationTask(model, [objective], stages=find_stages(model), batches_per_epoch=2)


def test_ps_kd_mixes_labels_with_the_predictions_of_the_epoch_before() -> None:
    task = a_ps_kd_task()
    first, second = a_batch([0, 5, 7, 2]), a_batch([1, 3, 4, 6])
    one_hot = F.one_hot(LABELS, CLASSES).double().numpy()
    said: dict[int, np.ndarray] = {}
    for batch, alpha in ((first, 0.4), (second, 0.4), (first, 0.8), (second, 0.8)):  # 0.8 t / 2
        result = task(*batch)
        p = softmax(result["output"])
        before = np.stack([said.get(i, one_hot[i]) for i in batch[2].tolist()])
        target = (1 - alpha) * one_hot[batch[2]] + alpha * before
        assert result["loss_weight/ps_kd"].item() == 1 / 2 * alpha / 0.4
        assert result["loss"].item() == pytest.approx(-(target * np.log(p)).sum(1).mean(), rel=1e-5)
        said |= dict(zip(batch[2].tolist(), p, strict=True))
    never_seen = [i for i in range(IMAGES) if i not in said]
    assert torch.equal(task.objectives[0].predictions[never_seen], F.one_hot(LABELS, CLASSES).float()[never_seen])


def test_ps_kd_remembers_training_alone() -> None:
    task = a_ps_kd_task()
    before = task.objectives[0].predictions.clone()
    task.eval()
    task(*a_batch([0, 1]))
    assert torch.equal(task.objectives[0].predictions, before)


def test_ps_kd_asks_for_the_images_positions() -> None:
    images, targets, _ = a_batch([0, 1])
    with pytest.raises(ValueError, match=r"positions=batch\.positions"):
        a_ps_kd_task()(images, targets)


def _remember_on_one_of_two() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    objective = PSKD(PSKDConfig(), LABELS, CLASSES, epochs=2)
    mine = torch.tensor([3, 4, 9] if rank == 0 else [0, 7])  # an uneven last batch
    objective._remember(mine, (mine[:, None] + torch.arange(CLASSES)).float())
    for image in (0, 3, 4, 7, 9):
        assert torch.equal(objective.predictions[image], image + torch.arange(CLASSES).float())
    assert torch.equal(objective.predictions[5], F.one_hot(LABELS, CLASSES)[5].float())
    dist.destroy_process_group()


def test_every_process_remembers_what_all_of_them_said() -> None:
    on_two_processes(_remember_on_one_of_two)


# --- state and export -------------------------------------------------------------------------------------------------

NEIGHBOURS: dict[str, Callable[[Any], Objective]] = {
    "byot": lambda stages: BYOT(BYOTConfig(), stages, CLASSES),
    "cs_kd": lambda stages: CSKD(CSKDConfig()),
    "tf_kd": lambda stages: TfKD(TfKDConfig()),
    "ps_kd": lambda stages: PSKD(PSKDConfig(), LABELS, CLASSES, epochs=3),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_learns_resumes_to_the_bit_and_leaves_a_plain_student(name: str) -> None:
    def start() -> tuple[DistillationTask, torch.optim.Optimizer]:
        model = network()
        stages = find_stages(model)
        task = DistillationTask(model, [NEIGHBOURS[name](stages)], stages=stages, batches_per_epoch=2)
        return task, torch.optim.SGD(task.parameters(), lr=0.01)

    def step(task: DistillationTask, optimizer: torch.optim.Optimizer, indices: list[int]) -> Tensor:
        loss = task(*a_batch(indices))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = [[0, 1, 10, 11], [2, 3, 4, 5], [0, 2, 10, 4], [1, 3, 11, 5], [0, 1, 10, 11]]
    whole = start()
    losses = [step(*whole, batch) for batch in batches[:3]]
    assert len(set(losses)) == 3
    state = {key: tensor.clone() for key, tensor in whole[0].state_dict().items()}
    expected = [step(*whole, batch) for batch in batches[3:]]
    resumed = start()
    resumed[0].load_state_dict(state)
    assert [step(*resumed, batch) for batch in batches[3:]] == expected
    assert whole[0].get_eval_model().state_dict().keys() == network().state_dict().keys()


# --- what is refused, and what a recipe makes of it -------------------------------------------------------------------


@pytest.mark.parametrize("objective", [TfKD(TfKDConfig()), PSKD(PSKDConfig(), LABELS, CLASSES, epochs=2)])
def test_blended_images_have_no_class_to_go_by(objective: Objective) -> None:
    with pytest.raises(ValueError, match="train without them"):
        objective(a_view(torch.zeros(2, CLASSES), torch.full((2, CLASSES), 0.1), positions=torch.arange(2)))


RECIPE = Recipe(
    name="test",
    model="tffd_resnet20",
    data=DataConfig(source="digits", image_size=SIZE, augment="none"),
    optim=OptimConfig(epochs=2, batch_size=512, lr=0.05, weight_decay=5e-4),
)


class _OneProcess:
    process_index, num_processes, device = 0, 1, torch.device("cpu")


def test_a_recipe_with_cs_kd_loads_pairs_of_a_class() -> None:
    recipe = vary(RECIPE, "test", cs_kd=CSKDConfig(), optim={"batch_size": 64})
    sources = build.open_sources(recipe.data)
    spec = build.image_spec(recipe, network())
    batches = build.make_loaders(recipe, spec, *sources, torch.contiguous_format, _OneProcess()).train  # type: ignore
    batch = next(iter(batches))
    assert torch.equal(batch.targets[:32], batch.targets[32:])
    assert not torch.isin(batch.positions[:32], batch.positions[32:]).all()
    assert len(batches) == math.ceil(1437 / 32)


@pytest.mark.parametrize("method", [CSKDConfig(), TfKDConfig(), PSKDConfig()])
def test_a_recipe_refuses_to_blend_images_whose_class_is_needed(method: Method) -> None:
    source, _ = build.open_sources(RECIPE.data)
    recipe = vary(RECIPE, "test", optim={"cutmix": 1.0}, **{method.label.lower().replace("-", "_"): method})
    with pytest.raises(ValueError, match=f"and {method.label} asks for one"):
        build.make_mixup(recipe, source, 1)
