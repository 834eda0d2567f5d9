"""Learning from a second network: its features, its logits, what it leaves behind, and what it refuses."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tffd_zoo.logit_losses import kl, standardise
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, RunConfig, vary
from tffd_zoo.stages import find_stages
from tffd_zoo.tasks import (
    CANONICAL,
    AuxiliaryBranches,
    DistillationTask,
    FrozenTeacher,
    KDConfig,
    OnlineTeacher,
    TeacherConfig,
    TeacherDistillation,
    TfFDTask,
    View,
)
from tffd_zoo.training import build, train

SIZE = 8


def network(seed: int, name: str = "tffd_resnet20", **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=10, **kwargs)


def a_batch(images: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(images, 3, SIZE, SIZE, generator=generator),
        torch.randint(0, 10, (images,), generator=generator),
    )


OFFLINE = TeacherConfig(model="a teacher", warmup_fraction=0.0)
ONLINE = replace(OFFLINE, paradigm="online")
BRANCHES = TeacherConfig("branches", warmup_fraction=0.0)
LOGITS_ONLY = replace(OFFLINE, lambda_features=0.0)


def a_task(
    config: TeacherConfig,
    kd: KDConfig | None = None,
    teacher: nn.Module | None = None,
    student: Any = None,
    measure_every: int = 0,
) -> DistillationTask:
    """A student with seed 0, a teacher with seed 1, in epochs of two batches."""
    student = network(0) if student is None else student
    stages = find_stages(student)
    if teacher is None:
        other = network(1)
        if config.paradigm == "branches":
            teacher = AuxiliaryBranches(other, stages, (3, SIZE, SIZE))
        elif config.paradigm == "online":
            teacher = OnlineTeacher(other, stages)
        else:
            teacher = FrozenTeacher(other, stages)
    objective = TeacherDistillation(teacher, stages, replace(config, kd=kd), epochs=4)
    return DistillationTask(student, [objective], stages=stages, batches_per_epoch=2, measure_every=measure_every)


RECIPE = Recipe(
    name="test",
    model="tffd_resnet20",
    data=DataConfig(source="digits", image_size=SIZE, augment="none"),
    optim=OptimConfig(epochs=2, batch_size=512, lr=0.05, weight_decay=5e-4),
    run=RunConfig(log_every=1),
)


def task_of(recipe: Recipe) -> DistillationTask:
    source, _ = build.open_sources(recipe.data)
    model = network(0)
    return build.make_task(recipe, model, build.image_spec(recipe, model), source, 3)


def features_of(model: Any, images: Tensor) -> list[Tensor]:
    return model.forward_intermediates(images, indices=[1, 2, 3])[1]


def student_gradients(loss: Tensor, task: DistillationTask) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(task.get_eval_model().parameters()), allow_unused=True))


# --- losses between logits --------------------------------------------------------------------------------------------


def test_kl_at_a_temperature_is_what_pencil_and_paper_give() -> None:
    log3 = math.log(3)
    student, teacher = torch.tensor([[0.0, log3]]), torch.tensor([[log3, 0.0]])
    # q = (3/4, 1/4) against p = (1/4, 3/4): 3/4 ln 3 - 1/4 ln 3
    assert kl(student, teacher, 1.0).item() == pytest.approx(0.5 * log3)
    assert kl(2 * student, 2 * teacher, 2.0).item() == pytest.approx(4 * 0.5 * log3)
    both = kl(torch.cat([student, student]), torch.cat([teacher, student]), 1.0)
    assert both.item() == pytest.approx(0.25 * log3), "the mean over the batch"


def test_kl_refuses_other_classes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 10\) and \(2, 100\); choose a teacher with the student's classes"):
        kl(torch.zeros(2, 10), torch.zeros(2, 100))


def test_standardised_logits_have_mean_0_and_deviation_1_whatever_their_scale() -> None:
    expected = torch.tensor([[-1.0, 0.0, 1.0]])  # of (1, 2, 3) the mean is 2 and the sample's variance (1 + 0 + 1) / 2
    torch.testing.assert_close(standardise(torch.tensor([[1.0, 2.0, 3.0]])), expected)
    torch.testing.assert_close(standardise(torch.tensor([[-50.0, 0.0, 50.0]])), expected)


# --- a frozen teacher -------------------------------------------------------------------------------------------------


def test_a_frozen_teachers_features_are_matched_by_mean_squared_error() -> None:
    task, (images, targets) = a_task(replace(OFFLINE, lambda_features=0.5, warmup_fraction=0.5)), a_batch()
    for _ in range(3):
        result = task(images, targets)
    with torch.no_grad():
        ours, theirs = features_of(network(0), images), features_of(network(1).eval(), images)
        error = sum(((s.double() - t.double()) ** 2).mean() for s, t in zip(ours, theirs, strict=True)) / 3
    assert result["features"].item() == pytest.approx(error.item(), rel=1e-5)
    # the third of two batches an epoch is epoch 1, and the warm-up takes half of four epochs
    assert result["loss_weight/features"].item() == 0.5
    assert result["loss"].item() == pytest.approx(result["ce"].item() + 0.5 * 0.5 * error.item(), rel=1e-5)


def test_features_and_logits_come_from_one_pass_without_gradient_in_eval_mode() -> None:
    teacher = network(1)
    seen: list[tuple[bool, bool]] = []
    teacher.stem.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    task = a_task(OFFLINE, KDConfig(), FrozenTeacher(teacher, find_stages(teacher)))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    task.train()
    result = task(*a_batch())
    result["loss"].backward()
    assert seen == [(False, False)]
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert {"features", "kd"} <= set(result)
    assert "teacher_ce" not in result


def test_a_frozen_teacher_is_neither_saved_nor_trained_but_moves_with_the_task() -> None:
    task, plain = a_task(OFFLINE, KDConfig()), DistillationTask(network(0))
    own = {"lambdas", "batches_seen", "loss_weights"}
    assert {name.removeprefix("trainable_module.model.") for name in task.state_dict()} == own | {
        name.removeprefix("trainable_module.") for name in plain.state_dict()
    }
    assert len(list(task.parameters())) == len(list(plain.parameters()))
    images, targets = a_batch()
    double = task.double()(images.double(), targets)
    assert double["kd"].isfinite()


def test_a_teacher_gets_images_normalised_its_own_way() -> None:
    teacher = network(1, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)})
    own_mean, own_std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    mean, std = torch.tensor([0.4, 0.4, 0.5]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    frozen = FrozenTeacher(teacher, image_stats=((0.4, 0.4, 0.5), (0.2, 0.3, 0.4)))
    pixels = torch.rand(2, 3, SIZE, SIZE)
    logits, _ = frozen(View((pixels - mean) / std, torch.zeros(2), torch.zeros(2, 10), [], None))
    torch.testing.assert_close(logits, teacher((pixels - own_mean) / own_std), rtol=1e-4, atol=1e-5)


# --- logits -----------------------------------------------------------------------------------------------------------


def test_logit_distillation_is_hintons_term_outside_the_warm_up_of_tffd() -> None:
    student, (images, targets) = network(0), a_batch()
    stages = find_stages(student)
    kd = TeacherDistillation(FrozenTeacher(network(1)), stages, replace(LOGITS_ONLY, kd=KDConfig()), epochs=4)
    task = TfFDTask(student, CANONICAL, epochs=4, batches_per_epoch=2, objectives=[kd])
    result = task(images, targets)
    with torch.no_grad():
        p = F.softmax(network(0)(images).double() / 4, dim=1)
        q = F.softmax(network(1).eval()(images).double() / 4, dim=1)
        expected = 16 * (q * (q.log() - p.log())).sum(1).mean()
    assert result["loss_weight/intra"] == 0
    assert result["kd"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert result["loss"].item() == pytest.approx((result["ce"] + result["kd"]).item(), rel=1e-6)


def test_distillation_may_take_its_weight_from_cross_entropy() -> None:
    task = a_task(LOGITS_ONLY, KDConfig(weight=9.0, takes_ce=0.9))
    result = task(*a_batch())
    expected = 0.1 * result["ce"].item() + 9 * result["kd"].item()
    assert result["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_the_authors_warm_up_of_distillation_counts_whole_epochs_from_1() -> None:
    task, batch = a_task(LOGITS_ONLY, KDConfig(warmup_fraction=0.75, whole_epochs=True)), a_batch()
    weights = [task(*batch)["loss_weight/kd"].item() for _ in range(8)]  # two batches in each of four epochs
    assert weights == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1])


def test_standardised_distillation_does_not_ask_for_the_teachers_scale() -> None:
    terms = []
    for scale in (1.0, 7.0):
        teacher = network(1)
        with torch.no_grad():
            teacher.head.fc.weight *= scale
            teacher.head.fc.bias *= scale
        task = a_task(LOGITS_ONLY, KDConfig(standardise=True), FrozenTeacher(teacher))
        terms.append(task(*a_batch())["kd"].item())
    assert terms[0] == pytest.approx(terms[1], rel=1e-4)
    assert terms[0] > 0


# --- a teacher trained alongside --------------------------------------------------------------------------------------


def test_an_online_teacher_learns_by_its_own_cross_entropy_and_nothing_of_the_student() -> None:
    task, (images, targets) = a_task(ONLINE, KDConfig()), a_batch()
    result = task(images, targets)
    result["loss"].backward()
    alone = network(1)
    loss = F.cross_entropy(alone(images), targets)
    loss.backward()
    assert result["teacher_ce"].item() == pytest.approx(loss.item(), rel=1e-6)
    trained = task.objectives[0].teacher.network.model
    for mine, expected in zip(trained.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_the_student_learns_from_an_online_teacher_as_it_stands() -> None:
    images, targets = a_batch()
    task = a_task(ONLINE)
    terms, _ = task.terms(images, targets)
    assert all(gradient is None for gradient in student_gradients(terms["teacher_ce"], task))
    teacher = network(1)
    theirs = [feature.detach() for feature in features_of(teacher, images)]
    student = network(0)
    error = sum(F.mse_loss(s, t) for s, t in zip(features_of(student, images), theirs, strict=True)) / 3
    expected = torch.autograd.grad(error, list(student.parameters()), allow_unused=True)
    for mine, oracle in zip(student_gradients(terms["features"], task), expected, strict=True):
        assert (mine is None) == (oracle is None)
        if oracle is not None:
            torch.testing.assert_close(mine, oracle, rtol=1e-4, atol=1e-7)


def test_gradient_shares_are_measured_on_the_student_alone() -> None:
    task = a_task(replace(ONLINE, share_features=0.05), measure_every=1)
    task.choose_lambdas([a_batch()])
    result = task(*a_batch())
    assert result["grad_ratio/features"].item() == pytest.approx(0.05, rel=1e-5)
    assert result["grad_ratio/teacher_ce"] == 0


# --- the student's own average ----------------------------------------------------------------------------------------

AVERAGE = TeacherConfig("average", warmup_fraction=0.0, decay=0.75)


def test_the_average_follows_the_student_by_its_decay_once_a_step() -> None:
    task = task_of(vary(RECIPE, "test", teacher=AVERAGE, optim={"accumulate": 2}))
    optimizer = torch.optim.SGD(task.get_eval_model().parameters(), lr=0.1)
    average = task.objectives[0].teacher.network.model.head.fc.weight
    student = task.get_eval_model().head.fc.weight
    expected = student.detach().clone()
    for step in range(6):
        for _ in range(2):
            task(*a_batch())["loss"].backward()
        # timm: the weights themselves for two steps, then 1 - (1 + t) ** (-2 / 3) up to the decay
        decay = 0.0 if step < 2 else min(0.75, 1 - step ** (-2 / 3))
        expected = decay * expected + (1 - decay) * student.detach()
        torch.testing.assert_close(average, expected)
        optimizer.step()
        optimizer.zero_grad()


def test_the_average_teaches_in_training_mode_and_is_taught_nothing() -> None:
    task, (images, targets) = task_of(vary(RECIPE, "test", teacher=replace(AVERAGE, kd=KDConfig()))), a_batch()
    teacher = task.objectives[0].teacher.network.model
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)  # else it would be the student
    task.objectives[0].teacher.begin_batch = lambda batch: None
    copy = deepcopy(teacher).train()
    result = task(images, targets)
    ours, theirs = features_of(network(0), images), features_of(copy, images)
    error = sum(F.mse_loss(s, t) for s, t in zip(ours, theirs, strict=True)) / 3
    assert result["features"].item() == pytest.approx(error.item(), rel=1e-5)
    assert result["kd"].item() > 0
    result["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


# --- auxiliary branches -----------------------------------------------------------------------------------------------


def test_branches_are_the_later_stages_and_classifier_on_the_students_first_stage() -> None:
    task, (images, targets) = a_task(BRANCHES), a_batch()
    result = task(images, targets)
    student, copy = network(0), network(1)
    first, second, third = features_of(student, images)
    branch_second = copy.stages[1](first)
    branch_third = copy.stages[2](branch_second)
    ce = F.cross_entropy(copy.forward_head(branch_third), targets)
    error = (F.mse_loss(second, branch_second) + F.mse_loss(third, branch_third)) / 2
    assert result["teacher_ce"].item() == pytest.approx(ce.item(), rel=1e-6)
    assert result["features"].item() == pytest.approx(error.item(), rel=1e-5)
    left = {
        name.split(".")[0] + "." + name.split(".")[1] for name in task.objectives[0].teacher.network.model.state_dict()
    }
    assert left == {"stages.1", "stages.2", "head.fc"}


def test_branches_train_the_students_first_stage_and_leave_its_later_ones_alone() -> None:
    task = a_task(BRANCHES)
    terms, _ = task.terms(*a_batch())
    reached = {
        name.split(".")[1] if name.startswith("stages") else name.split(".")[0]
        for (name, _), gradient in zip(
            task.get_eval_model().named_parameters(), student_gradients(terms["teacher_ce"], task), strict=True
        )
        if gradient is not None
    }
    assert reached == {"stem", "0"}


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("convnext_atto", 32), ("tffd_wrn16_2", 8)])
def test_branches_grow_on_any_chain_of_stages(name: str, size: int) -> None:
    model = network(0, name)
    branches = AuxiliaryBranches(network(1, name), find_stages(model), (3, size, size))
    assert len(branches.stages) == len(find_stages(model)) - 1


def test_branches_of_a_network_whose_stages_read_more_than_features_are_refused() -> None:
    model = network(0, "vit_tiny_patch16_224", img_size=32)
    with pytest.raises(ValueError, match=r"cannot be run on the features of its stage blocks\.2.*such as a ResNet"):
        AuxiliaryBranches(model, find_stages(model), (3, 32, 32))


# --- state and export -------------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, tuple[TeacherConfig, KDConfig | None]] = {
    "offline": (replace(OFFLINE, warmup_fraction=0.5), None),
    "online": (replace(ONLINE, warmup_fraction=0.5), None),
    "branches": (replace(BRANCHES, lambda_features=0.1), None),
    "kd": (LOGITS_ONLY, KDConfig(standardise=True, warmup_fraction=0.5)),
    "features and kd": (OFFLINE, KDConfig()),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_learns_resumes_to_the_bit_and_leaves_a_plain_student(experiment: str) -> None:
    def start() -> tuple[DistillationTask, torch.optim.Optimizer]:
        task = a_task(*EXPERIMENTS[experiment])
        return task, torch.optim.SGD(task.parameters(), lr=0.01)

    def step(task: DistillationTask, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
        loss = task(*a_batch(seed=seed))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    whole = start()
    before = whole[0].get_eval_model().head.fc.weight.clone()
    for seed in (1, 2, 3):
        step(*whole, seed)
    assert not torch.equal(whole[0].get_eval_model().head.fc.weight, before)
    state = {name: tensor.clone() for name, tensor in whole[0].state_dict().items()}
    expected = [step(*whole, seed) for seed in (4, 5)]
    resumed = start()
    resumed[0].load_state_dict(state)
    assert [step(*resumed, seed) for seed in (4, 5)] == expected

    student = whole[0].get_eval_model().eval()
    plain = network(7)
    plain.load_state_dict(student.state_dict(), strict=True)
    images, _ = a_batch()
    assert torch.equal(plain.eval()(images), student(images))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_stages_that_do_not_match_are_named_with_what_would_serve() -> None:
    wide = network(1, "tffd_resnet8x4")
    with pytest.raises(
        ValueError,
        match=r"16 at 1/1, 32 at 1/2, 64 at 1/4 .* teacher's 64 at 1/1, 128 at 1/2, 256 at 1/4.*tffd_resnet110",
    ):
        a_task(OFFLINE, teacher=FrozenTeacher(wide, find_stages(wide)))
    logits = a_task(LOGITS_ONLY, KDConfig(), FrozenTeacher(wide))
    assert logits(*a_batch())["kd"].isfinite(), "its logits serve"


def test_a_teacher_that_would_teach_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="would teach nothing"):
        a_task(LOGITS_ONLY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "which network teaches"),
        ({"paradigm": "branches", "model": "resnet18"}, "leave its model 'resnet18' out"),
        ({"paradigm": "average", "seed": 3}, "leave its seed out"),
        ({"model": "resnet18", "decay": 0.9}, "belongs to the teacher 'average' alone"),
        ({"paradigm": "online", "model": "resnet18", "weights": Path("x")}, "leave its weights x out"),
        ({"model": "resnet18", "seed": 3}, "leave its seed out"),
    ],
)
def test_settings_of_a_teacher_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**settings)


# --- from a recipe ---------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    file = tmp_path / "teacher.safetensors"
    save_file(network(1).state_dict(), file)
    return file


def test_a_recipe_loads_its_teacher_from_a_weights_file(teacher_file: Path) -> None:
    teacher = TeacherConfig(model="tffd_resnet20", weights=teacher_file)
    task = task_of(vary(RECIPE, "test", teacher=replace(teacher, kd=KDConfig())))
    images, targets = a_batch()
    expected = a_task(replace(teacher, warmup_fraction=0.0), KDConfig())(images, targets)
    result = task(images, targets)
    assert torch.equal(result["features"], expected["features"])
    assert torch.equal(result["kd"], expected["kd"])


def test_a_teacher_without_weights_says_how_to_get_them(tmp_path: Path) -> None:
    teacher = TeacherConfig(model="tffd_resnet110", weights=tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="train tffd_resnet110 first"):
        task_of(vary(RECIPE, "test", teacher=teacher))
    with pytest.raises(ValueError, match="tffd_resnet44 has no weights"):
        task_of(vary(RECIPE, "test", teacher=TeacherConfig(model="tffd_resnet44")))


def test_a_teacher_of_other_classes_or_another_architecture_is_refused(tmp_path: Path, teacher_file: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher.safetensors does not fit tffd_resnet32"):
        task_of(vary(RECIPE, "test", teacher=TeacherConfig(model="tffd_resnet32", weights=teacher_file)))


def test_a_fresh_teacher_has_a_seed_of_its_own_and_leaves_the_global_one_alone() -> None:
    recipe = vary(RECIPE, "test", teacher=TeacherConfig("online", "tffd_resnet20"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    teacher = build.fresh_teacher(recipe, recipe.teacher, 10)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(teacher.head.fc.weight, network(1000).head.fc.weight)
    same = TeacherConfig("online", "tffd_resnet20", seed=0)
    with pytest.raises(ValueError, match="both start from seed 0"):
        build.fresh_teacher(recipe, same, 10)


@pytest.mark.parametrize(
    "teacher",
    [TeacherConfig("branches", share_features=0.05), TeacherConfig("average", lambda_features=0.1)],
    ids=["branches", "average"],
)
def test_a_run_with_a_teacher_alongside_stops_resumes_and_exports_the_student_alone(
    teacher: TeacherConfig, tmp_path: Path
) -> None:
    def run(folder: str, **changes: Any) -> Path:
        run = {"output": tmp_path / folder, "measure_every": 2, **changes}
        return train(vary(RECIPE, "test", teacher=teacher, run=run))

    export = run("whole")
    run("stopped", max_steps=4)
    run("stopped")
    last = [load_file(tmp_path / folder / "weights" / "last.safetensors") for folder in ("whole", "stopped")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in network(0).state_dict())
    assert load_file(export / "model.safetensors").keys() == network(0).state_dict().keys()
    model = timm.create_model(f"local-dir:{export}", pretrained=True)
    assert all(torch.equal(last[0][name], tensor) for name, tensor in model.state_dict().items())
