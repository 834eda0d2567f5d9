"""Training tasks: parity with an independent oracle, gradient shares, schedules, state, timm's contract."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from tffd_zoo import _lean
from tffd_zoo.losses import pair_channels
from tffd_zoo.salience import stage_salience
from tffd_zoo.schedules import LossWeight
from tffd_zoo.stages import find_stages
from tffd_zoo.tasks import CANONICAL, REFERENCE, DistillationTask, Objective, TfFDTask, View, Weight
from tffd_zoo.tasks.gradients import GradientNorms


def tiny(name: str = "tffd_resnet20", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs)


def a_batch(images: int = 8, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(images, 3, size, size, generator=generator),
        torch.randint(0, 10, (images,), generator=generator),
    )


UNSCHEDULED = replace(CANONICAL, warmup_fraction=0.0)


# --- parity of the reference setting ----------------------------------------------------------------------------------


def oracle_reference(features: list[np.ndarray]) -> tuple[float, float]:
    """Section 3 in numpy, float64: spread salience, halves paired in order, MSE; mean over 3 stages and 3 pairs."""
    intra = []
    for f in features:
        f = f.astype(np.float64)
        n, c, h, w = f.shape
        norms = np.sqrt((f**2).sum(axis=(2, 3), keepdims=True))
        score = (f / np.maximum(norms, 1e-12)).mean(axis=(0, 2, 3))
        order = np.argsort(-score, kind="stable")
        intra.append(((f[:, order[c // 2 :]] - f[:, order[: c // 2]]) ** 2).mean())
    inter = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        shallow, deep = features[i].astype(np.float64), features[j].astype(np.float64)
        n, c, h, w = shallow.shape
        step = h // deep.shape[2]
        pooled = shallow.reshape(n, c, h // step, step, w // step, step).mean(axis=(3, 5))
        inter.append(((pooled - deep[:, :c]) ** 2).mean())
    return float(np.mean(intra)), float(np.mean(inter))


def test_the_reference_setting_equals_an_independent_oracle_to_1e_6() -> None:
    model = tiny()
    images, targets = a_batch()
    task = TfFDTask(model, REFERENCE, epochs=240, batches_per_epoch=100)
    task.batches_seen.fill_(1234)
    task.load_state_dict(task.state_dict())
    result = task(images, targets)

    with torch.no_grad():
        _, features = model.forward_intermediates(images, indices=[1, 2, 3])
        intra, inter = oracle_reference([feature.numpy() for feature in features])
        ce = F.cross_entropy(result["output"], targets)
    weight = (12 + 1) / 20  # batch 1234 of 100 an epoch: the 13th epoch of 20
    assert result["intra"].item() == pytest.approx(intra, rel=1e-6)
    assert result["inter"].item() == pytest.approx(inter, rel=1e-6)
    assert result["loss_weight/intra"].item() == pytest.approx(weight, rel=1e-6)
    assert result["loss"].item() == pytest.approx(ce.item() + weight * (8e-4 * intra + 5e-4 * inter), rel=1e-6)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_one_forward_pass_gives_the_gradients_of_the_sum() -> None:
    images, targets = a_batch()
    model = tiny()
    TfFDTask(model, UNSCHEDULED)(images, targets)["loss"].backward()
    mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    from tffd_zoo.losses import inter_layer_loss, intra_layer_loss, pair_channels, stage_pairs

    twin = tiny().train()
    final, features = twin.forward_intermediates(images, indices=[1, 2, 3])
    teachers = [pair_channels(f.detach().flatten(2).norm(dim=2).mean(0)) for f in features]
    loss = F.cross_entropy(twin.forward_head(final), targets)
    loss = loss + 0.04 * intra_layer_loss(features, teachers) + 0.05 * inter_layer_loss(features, stage_pairs(3))
    loss.backward()
    theirs = [p.grad for p in twin.parameters() if p.grad is not None]
    assert len(mine) == len(theirs) > 50
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def norm_of(name: str, images: Tensor, targets: Tensor) -> float:
    """Norm of one loss's gradient on a fresh network."""
    model = tiny()
    TfFDTask(model, UNSCHEDULED).terms(images, targets)[0][name].backward()
    return float(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None) ** 0.5)


def test_gradient_shares_are_norms_on_the_models_parameters() -> None:
    images, targets = a_batch()
    result = TfFDTask(tiny(), UNSCHEDULED, measure_every=1)(images, targets)
    norm = {name: norm_of(name, images, targets) for name in ("ce", "intra", "inter")}
    assert result["grad_ratio/intra"].item() == pytest.approx(0.04 * norm["intra"] / norm["ce"], rel=1e-4)
    assert result["grad_ratio/inter"].item() == pytest.approx(0.05 * norm["inter"] / norm["ce"], rel=1e-4)


def test_measuring_changes_neither_loss_nor_gradients_nor_statistics() -> None:
    images, targets = a_batch()
    results = []
    for every in (0, 1):
        model = tiny()
        loss = TfFDTask(model, UNSCHEDULED, measure_every=every)(images, targets)["loss"]
        loss.backward()
        results.append((loss, *[p.grad for p in model.parameters()], *model.buffers()))
    for plain, measured in zip(*results, strict=True):
        assert torch.equal(plain, measured)


# --- lambdas chosen by a gradient share -------------------------------------------------------------------------------


def a_task_by_share(**changes: Any) -> DistillationTask:
    return TfFDTask(tiny(), replace(UNSCHEDULED, share_intra=0.05, share_inter=0.2, **changes))


def test_a_share_chooses_the_lambda_that_gives_it_by_the_mean_norms_of_the_first_steps() -> None:
    batches = [a_batch(4), a_batch(6), a_batch(8)]
    chosen = a_task_by_share().choose_lambdas(batches, steps=2)
    mean = {name: sum(norm_of(name, *batch) for batch in batches[:2]) / 2 for name in ("ce", "intra", "inter")}
    assert chosen["intra"] == pytest.approx(0.05 * mean["ce"] / mean["intra"], rel=1e-4)
    assert chosen["inter"] == pytest.approx(0.2 * mean["ce"] / mean["inter"], rel=1e-4)


def test_ten_steps_are_measured_and_no_more() -> None:
    read = []

    def batches() -> Any:
        for size in range(2, 20):
            read.append(size)
            yield a_batch(size)

    a_task_by_share().choose_lambdas(batches())
    assert len(read) == 10


def test_a_chosen_lambda_stays() -> None:
    task = a_task_by_share()
    chosen = task.choose_lambdas([a_batch()])
    optimizer = torch.optim.SGD(task.parameters(), lr=0.5)
    for _ in range(3):
        result = task(*a_batch())
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    assert task.lambdas.tolist() == pytest.approx([chosen["intra"], chosen["inter"]])
    assert task.choose_lambdas([a_batch(3)]) == {}, "there is nothing left to choose"


def test_choosing_leaves_nothing_behind_but_lambdas() -> None:
    task = a_task_by_share(salience_momentum=0.9, rank_every=2)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items() if name != "lambdas"}
    torch.manual_seed(7)
    task.choose_lambdas([a_batch(), a_batch(4)])
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(task.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in task.parameters())


def test_frozen_batch_norms_are_measured_as_training_has_them() -> None:
    def chosen(frozen: bool, mode: bool) -> float:
        task = TfFDTask(tiny(), replace(UNSCHEDULED, share_inter=0.05, lambda_intra=0.0))
        norms = [module for module in task.modules() if isinstance(module, nn.BatchNorm2d)]
        task.train(mode)
        if frozen:
            for norm in norms:
                norm.eval()
        (value,) = task.choose_lambdas([a_batch(4)]).values()
        assert task.training == mode
        assert all(norm.training == (mode and not frozen) for norm in norms)
        return value

    assert chosen(frozen=True, mode=True) != pytest.approx(chosen(frozen=False, mode=True), rel=0.01)
    assert chosen(frozen=False, mode=False) == pytest.approx(chosen(frozen=False, mode=True))


def test_micro_batches_give_the_lambda_of_the_undivided_batch() -> None:
    def chosen(accumulate: int) -> dict[str, float]:
        model = tiny("convnext_atto")  # no batch statistics, which each micro-batch would have of its own
        task = TfFDTask(model, replace(UNSCHEDULED, share_inter=0.05, lambda_intra=0.0))
        images, targets = a_batch(8, 32)
        parts = zip(images.chunk(accumulate), targets.chunk(accumulate), strict=True)
        return task.choose_lambdas(parts, accumulate=accumulate)

    assert chosen(4) == pytest.approx(chosen(1), rel=1e-4)


def test_training_before_the_choice_is_refused() -> None:
    task = a_task_by_share()
    with pytest.raises(
        ValueError, match=r"the weight of inter, intra .* call task\.choose_lambdas\(train_loader\) once"
    ):
        task(*a_batch())
    task.eval()
    assert task(*a_batch())["output"].isfinite().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("intra", "gradient of loss 'intra' .* has norm 0 over the first 1 steps.* give its lambda"),
        ("ce", "gradient of cross-entropy .* has norm 0"),
    ],
)
def test_a_loss_without_gradient_gets_no_lambda(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = a_task_by_share()
    whole = task.terms

    def terms(*batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        found, logits = whole(*batch)
        return {**found, name: 0 * found[name]}, logits

    monkeypatch.setattr(task, "terms", terms)
    with pytest.raises(ValueError, match=message):
        task.choose_lambdas([a_batch()])


def test_small_gradients_in_half_precision_are_measured_scaled() -> None:
    layer = nn.Linear(4, 3, bias=False)
    images = torch.tensor([[1.0, 2.0, 0.0, 2.0]])
    norms = GradientNorms(list(layer.parameters()))
    with torch.autocast("cpu", torch.float16):
        norms.add({"tiny": 1e-9 * layer(images).float().sum(), "huge": 1e3 * layer(images).float().sum()})
    # 1e-9 is nothing in float16, whose smallest number is 6e-8; each of the three rows gets the image, of norm 3
    measured = {name: norm.item() for name, norm in norms.norms().items()}
    assert measured["tiny"] == pytest.approx(1e-9 * 3 * 3**0.5, rel=1e-2)
    assert measured["huge"] == pytest.approx(1e3 * 3 * 3**0.5, rel=1e-2)


# --- the schedule and state -------------------------------------------------------------------------------------------


def test_the_loss_weight_follows_training_batches_alone() -> None:
    images, targets = a_batch(4)
    task = TfFDTask(tiny(), CANONICAL, epochs=24, batches_per_epoch=2)  # warm-up over 2 epochs, 4 batches
    weights = [task(images, targets)["loss_weight/inter"].item() for _ in range(3)]
    task.eval()
    assert task(images, targets)["loss_weight/inter"].item() == weights[-1]
    task.train()
    weights += [task(images, targets)["loss_weight/inter"].item() for _ in range(3)]
    assert weights == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])


def test_a_schedule_without_the_length_of_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="pass epochs="):
        TfFDTask(tiny(), CANONICAL)
    with pytest.raises(ValueError, match="batches_per_epoch"):
        TfFDTask(tiny(), CANONICAL, epochs=10)


@pytest.mark.parametrize(
    "changes",
    [
        {"salience_momentum": 0.9, "rank_every": 2},
        {"rank_every": 3},
        {"share_intra": 0.05},
        {"warmup_fraction": 0.5},
    ],
    ids=["averaged salience", "kept salience", "chosen lambda", "warm-up"],
)
def test_a_state_dict_resumes_the_task_to_the_bit(changes: dict[str, Any]) -> None:
    batches = [a_batch(4), a_batch(6), a_batch(8), a_batch(10)]

    def task() -> DistillationTask:
        return TfFDTask(tiny(), replace(UNSCHEDULED, **changes), epochs=2, batches_per_epoch=2)

    whole = task()
    whole.choose_lambdas(batches)
    for batch in batches[:2]:
        whole(*batch)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    expected = [whole(*batch)["loss"] for batch in batches[2:]]
    resumed = task()
    resumed.load_state_dict(state)
    for batch, loss in zip(batches[2:], expected, strict=True):
        assert torch.equal(resumed(*batch)["loss"], loss)


def ranked_by(task: DistillationTask, monkeypatch: pytest.MonkeyPatch, batches: list[Any]) -> list[Tensor]:
    """What the first stage's channels were ranked by in each batch."""
    from tffd_zoo.tasks import tffd

    seen: list[list[Tensor]] = []
    with monkeypatch.context() as patch:
        patch.setattr(tffd, "pair_channels", lambda s, ratio: seen.append(s.clone()) or pair_channels(s, ratio))
        for batch in batches:
            task(*batch)
    return seen[:: len(task.stages)]


def first_salience(batch: Any) -> Tensor:
    """Of the first stage of a fresh network, in training mode."""
    return stage_salience(tiny().train().forward_intermediates(batch[0], indices=[1])[1])[0]


@pytest.mark.parametrize("rank_every", [1, 2])
def test_salience_is_averaged_over_every_batch_and_ranked_by_now_and_then(
    rank_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [a_batch(size) for size in (4, 6, 8)]
    task = TfFDTask(tiny(), replace(UNSCHEDULED, salience_momentum=0.75, rank_every=rank_every))
    ranked = ranked_by(task, monkeypatch, batches)
    current = [first_salience(batch) for batch in batches]
    averages = [current[0]]
    for salience in current[1:]:
        averages.append(0.75 * averages[-1] + 0.25 * salience)
    torch.testing.assert_close(ranked, averages if rank_every == 1 else [averages[0], averages[0], averages[2]])


def test_channels_are_ranked_anew_only_every_so_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [a_batch(size) for size in (4, 6, 8, 10)]
    ranked = ranked_by(TfFDTask(tiny(), replace(UNSCHEDULED, rank_every=3)), monkeypatch, batches)
    first, last = first_salience(batches[0]), first_salience(batches[3])
    torch.testing.assert_close(ranked, [first, first, first, last])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    images, targets = a_batch(4)
    assert "inter" not in TfFDTask(tiny(), replace(UNSCHEDULED, lambda_inter=0.0))(images, targets)
    assert "intra" not in TfFDTask(tiny(), replace(UNSCHEDULED, lambda_intra=0.0))(images, targets)
    with pytest.raises(ValueError, match="nothing would be distilled"):
        TfFDTask(tiny(), replace(UNSCHEDULED, lambda_intra=0.0, lambda_inter=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"salience": "entropi"}, "unknown salience 'entropi'; choose one of lp, spread"),
        ({"intra_loss": "mse"}, "unknown feature loss 'mse'; choose one of l2"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CANONICAL, **changes)


def test_a_model_whose_stages_cannot_serve_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="two"):
        TfFDTask(tiny(), replace(UNSCHEDULED, stages=(3,)))


@pytest.mark.parametrize("metric", ["lp", "spread", "entropy", "bn_scale", "hrank"])
def test_every_salience_metric_trains(metric: str) -> None:
    task = TfFDTask(tiny(), replace(UNSCHEDULED, salience=metric, salience_images=2))
    result = task(*a_batch(4))
    result["loss"].backward()
    assert result["intra"] > 0


@pytest.mark.parametrize("loss", ["l2", "ab", "at", "sp", "ickd"])
def test_every_feature_loss_trains_within_and_between_stages(loss: str) -> None:
    model = tiny()
    task = TfFDTask(model, replace(UNSCHEDULED, intra_loss=loss, inter_loss=loss))
    result = task(*a_batch(4))
    result["loss"].backward()
    assert result["intra"] > 0
    assert result["inter"] > 0
    assert list(task.get_eval_model().state_dict()) == list(tiny().state_dict())


def test_ab_sees_features_before_the_activation_and_leaves_the_logits_alone() -> None:
    images, _ = a_batch(4)
    task = TfFDTask(tiny(), replace(UNSCHEDULED, intra_loss="ab"))
    logits, features = task.trainable_module(images)
    assert all(feature.min() < 0 for feature in features)
    torch.testing.assert_close(logits, tiny()(images))


def test_features_normalised_over_space_have_unit_maps_in_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[Tensor] = []

    def spy(features: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        norms.extend(feature.flatten(2).norm(dim=2) for feature in features)
        return features[0].sum()

    monkeypatch.setattr(_lean, "intra_layer_loss", spy)
    TfFDTask(tiny(), replace(UNSCHEDULED, normalise=True, lambda_inter=0.0))(*a_batch(4))
    alive = torch.cat([norm.flatten() for norm in norms])
    torch.testing.assert_close(alive[alive > 0], torch.ones_like(alive[alive > 0]))


# --- any timm model ---------------------------------------------------------------------------------------------------

FAMILIES = {
    "resnet": ("resnet10t", 64),
    "resnetv2": ("resnetv2_50", 64),
    "convnext": ("convnext_atto", 64),
    "efficientnet": ("efficientnet_b0", 64),
    "mobilenetv3": ("mobilenetv3_small_050", 64),
    "mobilenetv4": ("mobilenetv4_conv_small_035", 64),
    "regnet": ("regnetx_002", 64),
    "densenet": ("densenet121", 64),
    "vgg_bn": ("vgg11_bn", 64),
    "vit": ("vit_tiny_patch16_224", 224),
    "swin": ("swin_tiny_patch4_window7_224", 224),
    "maxvit": ("maxvit_rmlp_pico_rw_256", 256),
    "fastvit": ("fastvit_t8", 64),
    "repvgg": ("repvgg_a0", 64),
    "ghostnet": ("ghostnet_050", 64),
    "levit": ("levit_128s", 224),
    "efficientvit": ("efficientvit_b0", 64),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_timm_family_trains_with_tffd(family: str) -> None:
    name, size = FAMILIES[family]
    model = tiny(name)
    task = TfFDTask(model, UNSCHEDULED)
    result = task(*a_batch(2, size))
    result["loss"].backward()
    assert torch.isfinite(result["loss"])
    assert result["intra"] > 0
    assert result["inter"] > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    images = a_batch(1, size)[0]
    with torch.no_grad():
        torch.testing.assert_close(task.eval()(images, torch.zeros(1, dtype=torch.long))["output"], model(images))


# --- timm's contract --------------------------------------------------------------------------------------------------


def test_the_task_is_a_timm_training_task_with_plain_evaluation_weights() -> None:
    task = TfFDTask(tiny(), UNSCHEDULED)
    assert isinstance(task, TrainingTask)
    state = task.get_checkpoint_state()
    assert list(state["state_dict"]) == list(tiny().state_dict())
    task(*a_batch(4))
    other = TfFDTask(tiny(), UNSCHEDULED)
    state = task.get_checkpoint_state()
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    for mine, theirs in zip(task.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_timms_ema_and_optimizer_factory_take_the_task() -> None:
    from timm.optim import create_optimizer_v2

    task = TfFDTask(tiny(), UNSCHEDULED)
    task.setup_ema(decay=0.5)
    assert list(task.get_eval_model(ema=True).state_dict()) == list(tiny().state_dict())
    task.update_ema()
    groups = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, layer_decay=0.9).param_groups
    assert len({group["lr_scale"] for group in groups}) > 3


def test_a_compiled_task_gives_the_eager_loss_and_plain_keys() -> None:
    images, targets = a_batch(4)
    results = []
    for compiled in (False, True):
        model = tiny()
        task = TfFDTask(model, UNSCHEDULED)
        if compiled:
            task.compile(backend="aot_eager", fullgraph=True)
        result = task(images, targets)
        result["loss"].backward()
        results.append((result["loss"], *[p.grad for p in model.parameters()]))
        assert list(task.get_eval_model().state_dict()) == list(tiny().state_dict())
    for eager, compiled_value in zip(*results, strict=True):
        torch.testing.assert_close(compiled_value, eager, rtol=1e-4, atol=1e-6)


def test_compiled_losses_are_one_graph_beside_an_eager_network_and_give_the_eager_gradients() -> None:
    torch.compiler.reset()
    counter, results = CompileCounterWithBackend("aot_eager"), []
    for compiled in (False, True):
        model = tiny()
        task = TfFDTask(model, UNSCHEDULED, measure_every=2)
        if compiled:
            task.compile_losses(backend=counter, fullgraph=True)
        for batch in (a_batch(4), a_batch(4), a_batch(4)):  # the first and the third are measured: eager
            result = task(*batch)
            result["loss"].backward()
        results.append((result["loss"], result["grad_ratio/inter"], *[p.grad for p in model.parameters()]))
    assert counter.frame_count == 1
    assert not any(node.target in (torch.conv2d, F.conv2d) for node in counter.graphs[0].graph.nodes)
    for eager, compiled_value in zip(*results, strict=True):
        torch.testing.assert_close(compiled_value, eager, rtol=1e-4, atol=1e-6)


def test_neither_the_schedule_nor_another_epoch_recompiles_the_task() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    task = TfFDTask(tiny(), CANONICAL, epochs=2, batches_per_epoch=3)
    task.compile(backend=counter)
    batch, smaller_last_batch = a_batch(4), a_batch(3)
    graphs = []
    for each in (batch, batch, smaller_last_batch, batch, batch, smaller_last_batch):
        task(*each)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2, 2, 2]


def test_plain_training_asks_nothing_but_logits() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    images, targets = a_batch()
    result = DistillationTask(model)(images, targets)
    torch.testing.assert_close(result["loss"], F.cross_entropy(model(images), targets))
    assert set(result) == {"loss", "output", "ce"}


class _Constant(Objective):
    def __init__(self, scheduled: bool) -> None:
        super().__init__()
        self.weights = {"constant": Weight(2.0, schedule=LossWeight(2) if scheduled else None)}

    def forward(self, view: View) -> dict[str, Tensor]:
        return {"constant": view.logits.sum() * 0 + 1}


@pytest.mark.parametrize(("scheduled", "extra"), [(True, 0.0), (False, 2.0)])
def test_an_objective_may_stand_outside_the_schedule(scheduled: bool, extra: float) -> None:
    task = TfFDTask(tiny(), CANONICAL, epochs=2, batches_per_epoch=10, objectives=[_Constant(scheduled)])
    result = task(*a_batch(4))  # the first batch: w is 0
    assert (result["loss"] - result["ce"]).item() == pytest.approx(extra, abs=1e-5)


def test_objectives_need_stages() -> None:
    with pytest.raises(ValueError, match="stages=find_stages"):
        DistillationTask(tiny(), [_Constant(True)])
    assert set(DistillationTask(tiny(), [_Constant(False)], stages=find_stages(tiny())).weights) == {"constant"}


# --- in other hands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_task_comes_back_from_a_pickle_where_it_was(compiled: bool) -> None:
    task = TfFDTask(tiny(), CANONICAL, epochs=2, batches_per_epoch=3)
    if compiled:
        task.compile(backend="eager")
    task(*a_batch(4))
    file = io.BytesIO()
    torch.save(task, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(task)), torch.load(file, weights_only=False), copy.deepcopy(task)):
        result, expected = again(*a_batch(4)), copy.deepcopy(task)(*a_batch(4))
        assert result["loss_weight/intra"] == expected["loss_weight/intra"] > 0
        assert torch.equal(result["loss"], expected["loss"])


def test_a_compiled_or_wrapped_model_is_refused_with_the_way_to_compile_the_task() -> None:
    for wrapped in (torch.compile(tiny(), backend="eager"), nn.DataParallel(tiny())):
        with pytest.raises(ValueError, match=r"wraps the model.*task\.compile\(\)"):
            TfFDTask(wrapped, UNSCHEDULED)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"lambda_intra": 1e4}, ["intra", "drowns it"]),
        ({"lambda_inter": 1e-9}, ["inter", "does nothing"]),
        ({}, []),
        ({"lambda_inter": 0.0}, []),
    ],
)
def test_a_lambda_that_does_not_suit_the_model_is_told_once(
    settings: dict[str, Any], warns: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    task = TfFDTask(tiny(), replace(UNSCHEDULED, **settings))
    for _ in range(2):
        task(*a_batch(4))
    messages = [record.getMessage() for record in caplog.records if "cross-entropy" in record.getMessage()]
    assert len(messages) == bool(warns)
    assert all(word in message for message in messages for word in (*warns, "choose_lambdas"))


def test_a_lambda_chosen_by_a_share_is_nothing_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    task = TfFDTask(tiny(), replace(UNSCHEDULED, share_intra=1e-8, share_inter=1.0))
    task.choose_lambdas([a_batch(4)])
    task(*a_batch(4))
    assert not caplog.records


class _NextToNothing(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.weights = {"faint": Weight(share=0.05)}

    def forward(self, view: View) -> dict[str, Tensor]:
        return {"faint": 1e-9 * view.logits.square().mean()}


def test_a_weight_chosen_for_a_loss_that_starts_at_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    task = DistillationTask(tiny(), [_NextToNothing()], stages=find_stages(tiny()))
    (value,) = task.choose_lambdas([a_batch(4)]).values()
    assert value > 1e5
    assert "will drown cross-entropy; watch grad_ratio/faint" in caplog.text
