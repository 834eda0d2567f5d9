"""A recipe is one complete run: model, data, method, optimisation and the run itself, in one frozen dataclass.

The same dataclass is the command line (its fields are the flags, its docstrings the help) and the record that is saved
beside the weights. A variant is another recipe with a few fields replaced.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .cli import overview, parse
from .ranges import (
    COUNT,
    NOT_NEGATIVE,
    PART,
    PART_ABOVE_ZERO,
    PART_BELOW_ONE,
    PART_INSIDE,
    POSITIVE,
    SEED,
    check_ranges,
)
from .run_record import RunWeights
from .tasks import (
    METHODS,
    BYOTConfig,
    CSKDConfig,
    DropConfig,
    Method,
    PSKDConfig,
    TeacherConfig,
    TfFDConfig,
    TfKDConfig,
)

# Fields that change where and how a run is kept, not what it computes: a resumed run may differ in them.
OPERATIONAL = (
    "run.output", "run.log_every", "run.checkpoint_every", "run.keep_checkpoints", "run.trackers", "run.max_steps",
    "run.threads", "run.eval_every", "run.weights", "data.workers", "data.in_memory",
)  # fmt: skip

Precision = Literal["auto", "no", "fp16", "bf16"]
Compilation = bool | Literal["losses"]

# Values that leave a choice to the machine, whose answer the recorded recipe has, or to the data: data.json says how.
LEFT_OPEN = {"run.precision": "auto", "run.compile": None, "data.eval_split": None}


@dataclass(frozen=True)
class DataConfig:
    """Images and how they are fed."""

    source: Annotated[str, tyro.conf.arg(name="data")]
    """A Hub data set id, a folder of parquet files, an image folder, or 'digits' (ships with scikit-learn)."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str | None = None
    """Split to evaluate on; validation, or else test, when not given."""
    holdout: Annotated[int, NOT_NEGATIVE] = 0
    """Hold so many training images out, evenly over the classes, and evaluate on them in place of the evaluation split:
    for choosing settings."""
    image_column: str | None = None
    """Column of the images; found by its name or type when not given."""
    label_column: str | None = None
    """Column of the labels; found by its name or type when not given."""
    revision: str | None = None
    """Revision of a Hub data set."""
    streaming: bool = False
    """Fetch the training images while training, each process its own, from parquet on the Hub or in a folder: for data
    that fits on no disk. They are shuffled by row groups and in a buffer; the evaluation split is downloaded whole."""
    skip_unreadable: bool = False
    """Leave unreadable images out instead of stopping at them."""
    image_size: Annotated[int | None, COUNT] = None
    """Train and evaluate at this size; the model's own when not given."""
    augment: Literal["pad_crop_flip", "pad_crop_turns", "rrc_flip", "none"] = "pad_crop_flip"
    """Pad 4, crop and flip (small images); the same, flipped in every other epoch; random resized crop and flip; or
    nothing."""
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    """How pad_crop_flip pads."""
    auto_augment: Literal["trivial", "rand", "augmix"] | None = None
    """Also change colours and shapes, each image anew: by TrivialAugment, RandAugment or AugMix."""
    in_memory: bool | None = None
    """Decode all images once into memory; chosen by size when not given."""
    workers: Annotated[int | None, NOT_NEGATIVE] = None
    """Processes that decode images, when they are not in memory; when not given, as many as timed to keep up."""
    drop_last: bool = False
    """Leave out the smaller last batch of an epoch."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation."""

    epochs: Annotated[int, COUNT]
    """Length of the run; the schedules scale with it."""
    batch_size: Annotated[int, COUNT]
    """Images per step and process."""
    lr: Annotated[float, POSITIVE]
    """Learning rate at the global batch size."""
    weight_decay: Annotated[float, NOT_NEGATIVE]
    """Weight decay."""
    opt: str = "momentum"
    """timm's name of the optimizer; 'momentum' is SGD with classic momentum, 'sgd' with Nesterov's."""
    momentum: Annotated[float, PART_BELOW_ONE] = 0.9
    """Momentum of the optimizers that have one."""
    decay_norm_and_bias: bool = True
    """Apply weight decay to BatchNorm parameters and biases too."""
    sched: Literal["multistep", "cosine", "linear", "constant"] = "multistep"
    """Learning-rate schedule; 'cosine' and 'linear' end at zero."""
    milestones: Annotated[tuple[float, ...], PART] = (0.625, 0.75, 0.875)
    """Where 'multistep' decays, as parts of the run: 150, 180 and 210 of 240 epochs."""
    decay_rate: Annotated[float, POSITIVE] = 0.1
    """Factor of 'multistep' at each milestone."""
    lr_warmup_epochs: Annotated[float, NOT_NEGATIVE] = 0.0
    """Epochs over which the learning rate rises linearly, inside the run."""
    layer_decay: Annotated[float | None, PART_ABOVE_ZERO] = None
    """Multiply the learning rate by this once for each of timm's layer groups below the head."""
    layer_decay_min: Annotated[float, PART] = 0.0
    """Never below this part: with both at 0.1 the whole body learns at a tenth of the head's rate."""
    freeze: Annotated[int, NOT_NEGATIVE] = 0
    """Freeze so many of timm's coarse layer groups, BatchNorm statistics too: 1 is the stem, 2 stem and first stage."""
    accumulate: Annotated[int, COUNT] = 1
    """Batches whose gradients are averaged into one step."""
    clip_grad: Annotated[float | None, POSITIVE] = None
    """Clip the norm of the gradient."""
    label_smoothing: Annotated[float, PART_BELOW_ONE] = 0.0
    """Label smoothing of the cross-entropy."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.0
    """Mixup's alpha; 0 is off."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
    """CutMix's alpha; 0 is off."""
    ema_decay: Annotated[float | None, PART_INSIDE] = None
    """Keep an exponential moving average of the weights, with this decay."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"--milestones {' '.join(map(str, self.milestones))} go back in time; put them in order")
        if self.lr_warmup_epochs > self.epochs:
            raise ValueError(
                f"--lr-warmup-epochs {self.lr_warmup_epochs:g} is longer than the run of {self.epochs} epochs; shorten "
                "it, to 0 for none"
            )


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    output: Path | None = None
    """Folder of the run; runs/<name>-<model>-s<seed> when not given. The same command resumes what it finds there."""
    seed: Annotated[int, SEED] = 0
    """Seed of the weights, the order of the images and their augmentation."""
    precision: Precision = "auto"
    """Mixed precision; 'auto' times a few steps and takes bf16 where the device has it and is faster with it, else
    float32."""
    compile: Compilation | None = None
    """Compile the training step, half a minute on CPU, or of it only the losses of Tf-FD; when not given, a long run
    compiles what it gains by."""
    threads: Annotated[int | None, COUNT] = None
    """Threads of each process; when not given OMP_NUM_THREADS, or else the cores divided by the processes that share
    them."""
    channels_last: bool | None = None
    """Memory layout; when not given, channels_last on CPU and with mixed precision."""
    sync_bn: bool = False
    """Synchronise BatchNorm statistics over the processes."""
    checkpoint_every: Annotated[int, COUNT] = 500
    """Steps between checkpoints; there is one after every epoch too."""
    keep_checkpoints: Annotated[int, COUNT] = 2
    """Newest checkpoints kept."""
    log_every: Annotated[int, COUNT] = 50
    """Steps between lines of the metrics file."""
    eval_every: Annotated[int, COUNT] = 1
    """Epochs between evaluations; there is one after the last epoch too."""
    measure_every: Annotated[int, NOT_NEGATIVE] = 0
    """Measure gradient shares every so many batches, as a diagnostic; 0 never. Such a batch costs about three."""
    max_steps: Annotated[int | None, COUNT] = None
    """Stop after so many steps, the schedules unchanged."""
    trackers: tuple[str, ...] = ()
    """Accelerate trackers by name, such as tensorboard or wandb."""
    weights: RunWeights = "last"
    """Weights to export: after the last epoch or of the best evaluation, or their moving averages."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Recipe:
    """One complete run."""

    name: str
    """Name of the recipe, for folders and records."""
    model: str
    """Any timm model; with --pretrained also hf-hub:org/name or local-dir:FOLDER."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")]
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")]
    pretrained: bool = False
    """Start from the model's weights, those of its tag (resnet50.a1_in1k) or its first; the head is new where the
    classes are others."""
    tffd: TfFDConfig | None = None
    """Tf-FD; None trains without it."""
    teacher: TeacherConfig | None = None
    """A second network to learn from."""
    byot: BYOTConfig | None = None
    """Be Your Own Teacher."""
    cs_kd: CSKDConfig | None = None
    """Class-wise self-distillation; half of every batch are partners, so double the batch size."""
    tf_kd: TfKDConfig | None = None
    """Teacher-free distillation by regularisation."""
    ps_kd: PSKDConfig | None = None
    """Progressive self-distillation."""
    drop: DropConfig | None = None
    """DropBlock and Dropout."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"--name {self.name!r} cannot name the run's folder: letters, digits, '.', '_' and '-', such as tffd-2"
            )
        if self.run.compile == "losses" and not (self.tffd and self.tffd.fuses):
            raise ValueError(
                "--compile losses saves passes over the features in Tf-FD by l2, ab or at, which this recipe is "
                "without: say True to compile all of a step, False for nothing, or leave --compile out"
            )
        if self.run.weights.endswith("_ema") and self.optim.ema_decay is None:
            raise ValueError(
                f"--weights {self.run.weights} are a moving average, and none is kept; add --ema-decay, such as 0.999, "
                f"or say --weights {self.run.weights.removesuffix('_ema')}"
            )

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return self.run.output or Path("runs") / f"{self.name}-{re.sub('[/:]+', '_', self.model)}-s{self.run.seed}"

    @property
    def methods(self) -> list[Method]:
        """The sections that teach beside the labels; none is plain training."""
        return [method for name in METHODS if (method := getattr(self, name)) is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def vary(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    """`recipe` under another name with a few fields changed: `vary(base, "long", optim={"epochs": 480}, tffd=None)`.

    A mapping changes fields of that section; any other value replaces it.
    """
    sections = {
        section: dataclasses.replace(getattr(recipe, section), **change) if isinstance(change, Mapping) else change
        for section, change in changes.items()
    }
    return dataclasses.replace(recipe, name=name, **sections)


DERIVED = {"tag"}
"""What earlier versions recorded and is now worked out from the rest."""


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the fields that make two recipes (as dicts) different runs.

    A switch that one of them lacks is off there: the other was written by a newer version. What one of them leaves open
    is no difference.
    """
    found = []
    for key in sorted({*mine, *theirs} - DERIVED):
        name, a, b = f"{prefix}{key}", mine.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif name in LEFT_OPEN and LEFT_OPEN[name] in (a, b):
            continue
        elif (a != b if key in mine and key in theirs else a or b) and name not in OPERATIONAL:
            found.append(f"{name}: {b} there, {a} here")
    return found


def recipe_from_cli(presets: Mapping[str, Recipe], description: str, args: Sequence[str] | None = None) -> Recipe:
    """`[PRESET] [--flag value ...]`: the named preset (the first when not given) with typed overrides.

    `--help` shows the flags a line each, `--help-all` is tyro's: every word, with types and choices.

    Raises:
        ValueError: for a preset that does not exist.
    """
    args = list(sys.argv[1:] if args is None else args)
    preset = args.pop(0) if args and not args[0].startswith("-") else next(iter(presets))
    if preset not in presets:
        close = difflib.get_close_matches(preset, presets) or presets
        raise ValueError(f"unknown preset '{preset}'; choose one of {', '.join(close)} (--help has them all)")
    if "-h" in args or "--help" in args:
        print(f"{description.strip()}\n\nThe flags, as preset '{preset}' has them; --help-all explains them in full.\n")
        print(overview(presets[preset]))
        raise SystemExit(0)
    return parse(
        Recipe,
        args=["--help" if arg == "--help-all" else arg for arg in args],
        default=presets[preset],
        description=description.strip(),
        config=(tyro.conf.AvoidSubcommands,),
    )
