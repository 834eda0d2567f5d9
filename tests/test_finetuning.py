"""Fine-tuning: released weights under a new head, slower or frozen layers, and names that promise weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_export import small_export
from timm.optim import create_optimizer_v2
from torch import nn

from tffd_zoo.export_record import verify_export
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, RunConfig, vary
from tffd_zoo.tasks import CANONICAL, DistillationTask, TfFDTask
from tffd_zoo.training import train
from tffd_zoo.training.build import check_network, freeze_layers, keep_frozen, make_network

BASE = Recipe(
    name="finetune",
    model="tffd_resnet20.ce_c100",
    pretrained=True,
    data=DataConfig(source="digits", image_size=8),
    optim=OptimConfig(epochs=1, batch_size=128, lr=0.05, weight_decay=5e-4),
    tffd=CANONICAL,
    run=RunConfig(max_steps=3),
)


def recipe(**changes: Any) -> Recipe:
    return vary(BASE, "finetune", **changes)


def test_the_body_has_the_released_weights_and_the_head_fits_the_data() -> None:
    released = timm.create_model("tffd_resnet20.ce_c100", pretrained=True).state_dict()
    model = make_network(BASE, [f"digit {i}" for i in range(10)])
    for name, tensor in model.state_dict().items():
        if name.startswith("head."):
            assert tensor.shape[0] == 10
        else:
            assert torch.equal(tensor, released[name]), name
    its_classes = timm.create_model("tffd_resnet20.ce_c100", pretrained=True).pretrained_cfg["label_names"]
    same_classes = make_network(BASE, its_classes)
    assert all(torch.equal(tensor, released[name]) for name, tensor in same_classes.state_dict().items())
    as_many_others = make_network(BASE, [f"another {name}" for name in its_classes])
    assert not torch.equal(as_many_others.state_dict()["head.fc.weight"], released["head.fc.weight"])
    fresh = make_network(recipe(pretrained=False, model="tffd_resnet20"), its_classes[:10])
    assert not torch.equal(fresh.state_dict()["stem.conv.weight"], released["stem.conv.weight"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"pretrained": False},
            r"names the weights 'ce_c100'; add --pretrained .* or train tffd_resnet20 from scratch",
        ),
        ({"pretrained": False, "model": "hf-hub:org/name"}, "hf-hub:org/name names weights; add --pretrained"),
        ({"model": "tffd_vgg13"}, "tffd_vgg13 has no weights"),
        ({"model": "tffd_resnet20.c10"}, r"has no weights 'c10'; choose one of tffd_resnet20\.c100"),
        ({"pretrained": False, "model": "tffd_resnet21"}, "did you mean"),
    ],
)
def test_a_name_that_promises_other_weights_than_the_recipe_wants_is_refused(
    changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_network(recipe(**changes))


@pytest.mark.parametrize("with_tffd", [False, True])
def test_layers_decay_under_a_task_as_they_do_for_the_model_alone(with_tffd: bool) -> None:
    model = timm.create_model("tffd_resnet20", num_classes=10)
    settings: dict[str, Any] = {"opt": "sgd", "lr": 0.1, "layer_decay": 0.5, "layer_decay_min_scale": 0.01}

    def scales(module: Any) -> dict[int, float]:
        groups = create_optimizer_v2(module, **settings).param_groups
        return {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}

    alone = scales(model)
    assert min(alone.values()) == 0.01
    assert alone[id(model.head.fc.weight)] == 1.0
    task = TfFDTask(model, epochs=1, batches_per_epoch=1) if with_tffd else DistillationTask(model)
    assert scales(task) == alone


def test_the_body_can_learn_at_one_lower_rate() -> None:
    model = timm.create_model("resnet18", num_classes=10)
    task = DistillationTask(model)
    optimizer = create_optimizer_v2(task, opt="sgd", lr=1.0, layer_decay=0.1, layer_decay_min_scale=0.1)
    scale_of = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert scale_of[id(parameter)] == (1.0 if name.startswith("fc.") else 0.1), name


def test_freezing_takes_the_stem_and_then_the_stages() -> None:
    model = timm.create_model("resnet18", num_classes=10).train()
    freeze_layers(model, 2)
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    keep_frozen(model)
    assert not model.layer1[0].bn1.training
    assert model.layer2[0].bn1.training
    freeze_layers(model, 5)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {"fc.weight", "fc.bias"}
    with pytest.raises(ValueError, match="--freeze 6 is out of range: the head of this model stands on 5 layer groups"):
        freeze_layers(model, 6)


def test_freezing_the_stem_of_a_vision_transformer_leaves_its_blocks_in_training_mode() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=10).train()
    freeze_layers(model, 1)
    assert not model.pos_embed.requires_grad
    keep_frozen(model)
    assert not model.patch_embed.proj.training
    assert all(module.training for module in model.blocks.modules())


def test_lambdas_are_chosen_with_what_is_frozen_in_evaluation_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    choose = DistillationTask.choose_lambdas

    def spy(task: DistillationTask, *args: Any, **kwargs: Any) -> dict[str, float]:
        norms = [module for module in task.get_eval_model().modules() if isinstance(module, nn.BatchNorm2d)]
        seen.append((norms[0].training, norms[-1].training))
        return choose(task, *args, **kwargs)

    monkeypatch.setattr(DistillationTask, "choose_lambdas", spy)
    start = small_export(tmp_path / "start") / "export"
    run = {"output": tmp_path / "finetuned", "max_steps": 1}
    train(recipe(model=f"local-dir:{start}", optim={"freeze": 2}, tffd={"share_intra": 0.05}, run=run))
    assert seen == [(False, True)]


def test_a_run_from_an_export_leaves_frozen_layers_to_the_bit_and_says_where_it_started(tmp_path: Path) -> None:
    start = small_export(tmp_path / "start") / "export"
    folder = train(
        recipe(
            model=f"local-dir:{start}", optim={"freeze": 2, "layer_decay": 0.9}, run={"output": tmp_path / "finetuned"}
        )
    )
    before, after = load_file(start / "model.safetensors"), load_file(folder / "model.safetensors")
    frozen = [name for name in before if name.startswith(("stem.", "stages.0."))]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    learnt = [name for name in before if name.endswith("conv1.weight") and name not in frozen]
    assert learnt
    assert not any(torch.equal(before[name], after[name]) for name in learnt)
    info = verify_export(folder)
    assert info.name == "tffd_resnet20.ft_digits"
    assert "started from the weights of `local-dir:export`" in (folder / "README.md").read_text()
    assert str(tmp_path) not in (folder / "recipe.json").read_text()
