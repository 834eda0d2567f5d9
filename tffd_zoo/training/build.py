"""The parts of a run, each from the section of the recipe that sets it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from timm import create_model
from timm.data import Mixup
from timm.loss import create_classification_loss
from timm.models import group_parameters, parse_model_name, split_model_name_tag
from timm.optim import create_optimizer_v2, get_optimizer_class
from torch import nn
from torch.optim import Optimizer

from ..data import (
    EVAL_SPLITS,
    ImageSource,
    ImageSpec,
    Loader,
    NoSuchSplit,
    StreamedSource,
    TrainSource,
    eval_loader,
    holdout,
    open_source,
    open_streamed,
    train_loader,
)
from ..data.image_source import some_of
from ..data.loaders import Workers
from ..data.memory import AUGMENTS
from ..data.workers import workers_beside
from ..loading import check_architecture, check_model_name, label_names, load_model, order_logits, size_arguments
from ..processes import Processes
from ..recipe import Compilation, DataConfig, OptimConfig, Recipe
from ..small_maps import speed_up_small_maps
from ..stages import find_stages, stage_activations
from ..tasks import DistillationTask, Setting, TeacherConfig
from ..threads import cores_per_process


def check_trackers(names: Sequence[str], accelerator: Accelerator) -> None:
    """Refuse trackers that are not installed: accelerate would leave them out and say nothing.

    Raises:
        ValueError: names them.
    """
    found = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    missing = [name for name in names if name not in found and name != "all"]
    if missing:
        raise ValueError(
            f"tracker {', '.join(missing)} is not installed; install it, or leave --trackers out: metrics.jsonl in the "
            "folder of the run has every figure"
        )


def open_sources(config: DataConfig) -> tuple[TrainSource, ImageSource]:
    """The images to train on and those to evaluate on.

    Both number the classes alike: those of training first, as training has them, then those that it has no image of.

    Raises:
        ValueError: the two share no class, or streaming is asked for with what needs every image first.
    """
    columns: dict[str, Any] = {
        "image_column": config.image_column,
        "label_column": config.label_column,
        "revision": config.revision,
    }

    def source(split: str | Sequence[str]) -> ImageSource:
        return open_source(config.source, split, skip_unreadable=config.skip_unreadable, **columns)

    train_source: TrainSource
    if config.streaming:
        for flag, needs in (("holdout", "labels"), ("skip_unreadable", "pixels")):
            if getattr(config, flag):
                raise ValueError(
                    f"--{flag.replace('_', '-')} needs the {needs} of all images first, and --streaming reads them "
                    "while it trains; leave one of them out"
                )
        train_source = open_streamed(config.source, config.train_split, **columns)
    else:
        train_source = source(config.train_split)
    if train_source.num_classes < 2:
        raise ValueError(
            f"{train_source.describe()}: one class ({train_source.label_names[0]}) leaves nothing to tell apart; give "
            "--data a folder whose subfolders are the classes, or hold those"
        )
    if config.holdout:
        assert isinstance(train_source, ImageSource)
        # One split for all seeds of a study: what is compared is judged on the same images.
        return holdout(train_source, config.holdout)
    try:
        eval_source = source(config.eval_split or EVAL_SPLITS)
    except NoSuchSplit as error:
        raise ValueError(
            f"{error}; name the split to evaluate on with --eval-split, or hold training images out with --holdout N"
        ) from error
    names, theirs = train_source.label_names, eval_source.label_names
    if not set(names) & set(theirs):
        raise ValueError(
            f"splits {train_source.split} and {eval_source.split} of {config.source} share no class ({some_of(names)}; "
            f"{some_of(theirs)}); name a labelled split with --eval-split, or hold training images out with --holdout N"
        )
    names += tuple(name for name in theirs if name not in names)
    return train_source.with_classes(names), eval_source.with_classes(names)


def check_network(recipe: Recipe) -> None:
    """Refuse a name that stands for no network, for weights that the recipe does not ask for, or for none that it does.

    Raises:
        ValueError: names the mend.
    """
    if recipe.pretrained:
        check_model_name(recipe.model)
        return
    check_architecture(recipe.model)
    source, model_id = parse_model_name(recipe.model)
    architecture, tag = split_model_name_tag(model_id)
    if source is not None:
        raise ValueError(f"{recipe.model} names weights; add --pretrained to start from them")
    if tag:
        raise ValueError(
            f"{recipe.model} names the weights {tag!r}; add --pretrained to start from them, or train {architecture} "
            "from scratch"
        )


def check_image_size(recipe: Recipe) -> None:
    """Refuse a size of images that the network cannot take, and say which it can.

    Raises:
        ValueError: says what the network said.
    """
    size, model = recipe.data.image_size, None
    if size is None:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model = create_model(recipe.model, **size_arguments(recipe.model, size)).eval()
            model(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        patches: Any = getattr(model, "patch_embed", None)
        side = max(getattr(patches, "patch_size", None) or (0,))
        other = f"give a multiple of {side}, such as {side * max(1, round(size / side))}" if side else "try another"
        raise ValueError(
            f"{recipe.model} cannot take images of {size} px ({' '.join(str(error).split())}); {other}, or leave "
            "--image-size out for its own size"
        ) from error


def make_network(recipe: Recipe, classes: Sequence[str]) -> nn.Module:
    """The network to train: with fresh weights, or with its released ones and a new head where the classes differ.

    Args:
        recipe: names the model.
        classes: names of the classes to learn; as many others are other classes.
    """
    size = recipe.data.image_size
    if not recipe.pretrained:
        return create_model(recipe.model, num_classes=len(classes), **size_arguments(recipe.model, size))
    model: Any = load_model(recipe.model, len(classes), size)
    if label_names(model) not in (None, tuple(classes)):
        model.reset_classifier(len(classes))
    return model


def freeze_layers(model: nn.Module, groups: int) -> None:
    """Take the first of timm's coarse layer groups, the stem and then the stages, out of the training.

    Raises:
        ValueError: the model does not say what its groups are, or nothing but frozen ones would be left.
    """
    if not groups:
        return
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"{type(model).__name__} has no layer groups to freeze; leave --freeze out")
    matcher: Any = model.group_matcher
    group_of = group_parameters(model, matcher(coarse=True), reverse=True)
    head = max(group_of.values())
    if not 0 < groups <= head:
        raise ValueError(f"--freeze {groups} is out of range: the head of this model stands on {head} layer groups")
    for name, parameter in model.named_parameters():
        if group_of[name] < groups:
            parameter.requires_grad_(False)


def keep_frozen(model: nn.Module) -> None:
    """Put what is frozen back in evaluation mode: its BatchNorm statistics stand still as its weights do."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.training = False  # not eval(): a ViT has its position embeddings beside all of its blocks


def memory_format(recipe: Recipe, processes: Processes) -> torch.memory_format:
    """The layout that the recipe asks for, or the faster one.

    On CPU that is channels_last for every convolutional network that the benchmark measures, by 5 to 25 %; on
    GPU it pays with mixed precision. FSDP takes no weights in it.

    Raises:
        ValueError: channels_last is asked of FSDP.
    """
    channels_last, sharded = recipe.run.channels_last, processes.distributed_type == DistributedType.FSDP
    if sharded and channels_last:
        raise ValueError("FSDP shards no weights that lie in channels_last; leave --channels-last out")
    if channels_last is None:
        channels_last = not sharded and (processes.device.type != "cuda" or recipe.run.precision != "no")
    return torch.channels_last if channels_last else torch.contiguous_format


def image_spec(recipe: Recipe, model: nn.Module) -> ImageSpec:
    """Preprocessing: the model's own, at the recipe's image size when it names one, as training sees the images."""
    size = recipe.data.image_size
    spec = ImageSpec.from_model(model, **({"input_size": (3, size, size)} if size else {}))
    return spec.matching(AUGMENTS[recipe.data.augment])


class Loaders(NamedTuple):
    """Batches of this process."""

    train: Loader
    eval: Loader


def make_loaders(
    recipe: Recipe,
    spec: ImageSpec,
    train_source: TrainSource,
    eval_source: ImageSource,
    layout: torch.memory_format,
    accelerator: Accelerator,
    seconds_per_image: Callable[[], float] | None = None,
) -> Loaders:
    """Training and evaluation batches for this process.

    Args:
        seconds_per_image: what a training image takes; asked only where decoding has to keep up with it.
    """
    data, batch_size = recipe.data, recipe.optim.batch_size

    def workers(fraction: float) -> Workers:
        """As many as keep up where an image takes `fraction` of its time in training."""
        if data.workers is not None or seconds_per_image is None:
            return data.workers
        cores, on_cpu = cores_per_process(accelerator.num_processes), accelerator.device.type == "cpu"
        return lambda decoding: workers_beside(decoding, fraction * seconds_per_image(), cores, on_cpu)

    shared: dict[str, Any] = {
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "in_memory": data.in_memory,
        "device": accelerator.device,
        "memory_format": layout,
    }
    augment = dataclasses.replace(
        AUGMENTS[data.augment], padding_mode=data.padding_mode, auto_augment=data.auto_augment
    )
    train_batches = train_loader(
        train_source,
        spec,
        batch_size,
        recipe.run.seed,
        augment=augment,
        drop_last=data.drop_last,
        pair_classes=any(method.pairs_classes for method in recipe.methods),
        workers=workers(1.0),
        **shared,
    )
    # Of a training step the forward pass is about a third.
    eval_batches = eval_loader(eval_source, spec, max(batch_size, 250), workers=workers(1 / 3), **shared)
    return Loaders(train_batches, eval_batches)


def check_batch_of_one(recipe: Recipe, model: nn.Module, spec: ImageSpec, batches: Loader) -> None:
    """Refuse a batch of one image before it comes up where it leaves a BatchNorm one value per channel.

    Raises:
        ValueError: names the mend.
    """
    if batches.smallest_batch > 1 or recipe.run.sync_bn:
        return
    trial = copy.deepcopy(model).train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(torch.zeros(1, *spec.input_size))
    except ValueError as error:
        mend = "another --batch-size" if recipe.optim.batch_size == 1 else "--drop-last or another --batch-size"
        raise ValueError(f"{recipe.model} cannot train on a batch of one image ({error}); use {mend}") from error


def make_mixup(recipe: Recipe, source: TrainSource, processes: int) -> Mixup | None:
    """timm's mixup and CutMix; with both, each batch draws one of them."""
    optim = recipe.optim
    if not (optim.mixup or optim.cutmix):
        return None
    for method in recipe.methods:
        if method.one_class:
            raise ValueError(f"mixup and CutMix blend images of two classes, and {method.label} asks for one: choose")
    last = 0 if recipe.data.drop_last else len(source) % (optim.batch_size * processes)
    if optim.batch_size % 2 or last % (2 * processes):
        raise ValueError("mixup and CutMix pair the images of a batch: use an even --batch-size and --drop-last")
    return Mixup(optim.mixup, optim.cutmix, label_smoothing=optim.label_smoothing, num_classes=source.num_classes)


# --- the task ---------------------------------------------------------------------------------------------------------


def compile_step(task: DistillationTask, what: Compilation | None) -> None:
    """Compile of the training step of `task` what a recipe's `--compile` says."""
    if what == "losses":
        task.compile_losses()
    elif what:
        task.compile()


def make_optimizer(optim: OptimConfig, task: nn.Module, processes: Processes) -> Optimizer:
    """timm's optimizer, one pass over weights, gradients and moments where torch has one (`fused`; for no shards)."""
    kind = get_optimizer_class(optim.opt.split("_")[-1], bind_defaults=False)  # of lookahead_sgd, sgd
    fuses = "fused" in inspect.signature(kind).parameters and processes.distributed_type != DistributedType.FSDP
    return create_optimizer_v2(
        task,
        opt=optim.opt,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        filter_bias_and_bn=not optim.decay_norm_and_bias,
        layer_decay=optim.layer_decay,
        layer_decay_min_scale=optim.layer_decay_min,
        **({"fused": True} if fuses else {}),
    )


def make_task(
    recipe: Recipe, model: nn.Module, spec: ImageSpec, source: TrainSource, batches_per_epoch: int
) -> DistillationTask:
    """The training task of a recipe: cross-entropy and the losses of its methods.

    Raises:
        ValueError: a method that cannot be had with this model or these images.
    """
    criterion = make_criterion(recipe)
    common: dict[str, Any] = {
        "criterion": criterion,
        "batches_per_epoch": batches_per_epoch,
        "measure_every": recipe.run.measure_every,
    }
    if not recipe.methods:
        return DistillationTask(model, **common)  # plain training works on models without stages too
    for method in recipe.methods:
        if method.all_labels and isinstance(source, StreamedSource):
            raise ValueError(
                f"{method.label} starts from the labels of all images, and --streaming reads those while it trains; "
                "choose one"
            )
    chosen_stages = recipe.tffd.stages if recipe.tffd else None
    setting = Setting(
        model=model,
        stages=find_stages(model, chosen_stages),
        chosen_stages=chosen_stages,
        pre_activation=any(method.pre_activation for method in recipe.methods),
        input_size=spec.input_size,
        image_stats=(spec.mean, spec.std),
        num_classes=source.num_classes,
        epochs=recipe.optim.epochs,
        batches_per_step=recipe.optim.accumulate,
        criterion=criterion,
        labels=None if isinstance(source, StreamedSource) else source.labels,
        second_network=lambda config: second_network(config, recipe, source),
    )
    taps = stage_activations(model, setting.stages, spec.input_size) if setting.pre_activation else ()
    objectives = [method.build(setting) for method in recipe.methods]
    return DistillationTask(model, objectives, stages=setting.stages, taps=taps, **common)


def make_criterion(recipe: Recipe) -> nn.Module:
    """The classification loss."""
    soft_targets = bool(recipe.optim.mixup or recipe.optim.cutmix)
    # With soft targets mixup has already smoothed them.
    smoothing = 0.0 if soft_targets else recipe.optim.label_smoothing
    return create_classification_loss(smoothing=smoothing, soft_targets=soft_targets)


def second_network(config: TeacherConfig, recipe: Recipe, source: TrainSource) -> nn.Module:
    """The network that teaches: trained, or fresh where it is trained alongside.

    Raises:
        ValueError, OSError: it cannot be had, or does not know the student's classes.
    """
    if config.paradigm == "offline":
        network = load_teacher(config, source, recipe.data.image_size)
    else:
        network = fresh_teacher(recipe, config, source.num_classes)
    speed_up_small_maps(network)
    return network


def load_teacher(config: TeacherConfig, source: TrainSource, image_size: int | None = None) -> nn.Module:
    """A trained teacher, by name or from a weights file, for images of this size."""
    assert config.model is not None
    with torch.random.fork_rng(devices=[]):
        if config.weights is None:
            check_model_name(config.model)
            network = load_model(config.model, image_size=image_size)
        else:
            network = teacher_from_file(config.model, config.weights, source.num_classes, image_size)
        order_logits(config.model, network, source, only=True)
    return network


def teacher_from_file(model: str, weights: Path, num_classes: int, image_size: int | None = None) -> nn.Module:
    """`model` with the weights of a file, such as the weights/last.safetensors of a run, for images of this size.

    Those of a run name their classes; of others, `num_classes` must be right.
    """
    if not weights.is_file():
        raise FileNotFoundError(
            f"the teacher's weights {weights} are missing; train {model} first (for CIFAR-100: "
            f"recipes/train_cifar100.py plain --model {model} --seed 100), or give released weights by their tag: "
            "--teacher.model NAME.TAG --teacher.weights None"
        )
    try:
        with safe_open(weights, framework="pt") as file:
            names = json.loads((file.metadata() or {}).get("label_names", "null"))
    except SafetensorError:  # timm reads other kinds too
        names = None
    try:
        classes, size = len(names) if names else num_classes, size_arguments(model, image_size)
        network = create_model(model, num_classes=classes, checkpoint_path=str(weights), **size)
    except RuntimeError as error:  # how torch refuses weights
        raise ValueError(f"{weights} does not fit {model}: {' '.join(str(error).split())}") from error
    network.pretrained_cfg = {**network.pretrained_cfg, "label_names": names}
    return network


def fresh_teacher(recipe: Recipe, config: TeacherConfig, num_classes: int) -> nn.Module:
    """A teacher to be trained alongside, with weights that no student of this seed has."""
    seed = recipe.run.seed + 1000 if config.seed is None else config.seed
    if seed == recipe.run.seed:
        raise ValueError(
            f"teacher and student would both start from seed {seed}, and equal networks teach each other nothing; "
            "choose another --teacher.seed"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        name = config.model or recipe.model
        return create_model(name, num_classes=num_classes, **size_arguments(name, recipe.data.image_size))
