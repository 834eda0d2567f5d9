"""The studies that compare.py runs: which recipes, each against which twin, over which seeds.

To add one, add it here. A row says its name, what sets it apart, the fields that differ from its twin, and its twin;
the recipe follows. A row that several studies have is run once for all of them.

The pilot and the zoo are judged on the test images. The others choose: on 5,000 images held out of the training set.
Published figures stand beside ours to hold them against; all are from runs of about 240 epochs with other recipes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tffd_zoo.recipe import vary
from tffd_zoo.run_record import RunWeights
from tffd_zoo.tasks import (
    CANONICAL,
    REFERENCE,
    BYOTConfig,
    CSKDConfig,
    DropConfig,
    KDConfig,
    PSKDConfig,
    TeacherConfig,
    TfFDConfig,
    TfKDConfig,
)

from .. import train_cifar100
from .report import Published, Row, Study

POSTER = "Tf-FD's ECCV 2022 poster; its base and KD rows are CRD's, from another recipe than its Tf-FD rows"
CHART = "the same poster, read off its chart of feature losses"
TABLE1 = "Table 1 of Tf-FD's supplement, ECCV 2022"
STANDARDISED = "Sun et al., logit standardisation, CVPR 2024, arXiv 2403.01427"
RESNET18 = "ResNet-18, not ResNet-20: one code base with all of these methods"
PUBLIC_ZOO = "a public CIFAR-100 zoo, 200 epochs, cosine, no distillation"
CRD = "CRD's table, ICLR 2020"

BASE = 69.06
TFFD = Published(70.62, POSTER, base=BASE)

TOO_SHORT = (
    "Nothing here repeats the gain that was published for 240 epochs, and nothing refutes it: 15 epochs are too few."
)
SCREENED = (
    "Two epochs, and most recipes once: a single difference of less than some three points shows nothing. They reward "
    "what learns fast. Methods that make the task harder (CutMix, DropBlock), that give their loss more weight as the "
    "run goes on (PS-KD) or whose teacher starts from nothing (online) look worse than they need be at 240, and frozen "
    "teachers had two epochs as well."
)
CONTROLLED = (
    "The share was controlled in these runs: lambda followed it from the first batch to the last, where today a share "
    "only chooses lambda at the start. Cross-entropy's gradient fades as a network learns, so such a lambda grows, in "
    "15 epochs about eightfold: what these rows lose is the control's doing too, not that of Tf-FD alone."
)

# --- the pilot: the test images ---------------------------------------------------------------------------------------

# A schedule that gets far in few epochs: warm-up and cosine, Nesterov.
SHORT = vary(
    train_cifar100.PLAIN,
    "short",
    optim={"epochs": 15, "batch_size": 128, "lr": 0.2, "opt": "sgd", "sched": "cosine", "lr_warmup_epochs": 2.0},
    run={"compile": True, "precision": "no"},
)
SHARES = TfFDConfig(share_intra=0.05, share_inter=0.05)

PILOT = Study(
    "pilot",
    "does Tf-FD help ResNet-20 on CIFAR-100 in a short run?",
    SHORT,
    (
        Row("short-plain", "cross-entropy alone", published=Published(BASE, POSTER)),
        Row("short-reference", "Tf-FD at the author's weights", {"tffd": REFERENCE}, "short-plain", published=TFFD),
        Row("short-share", "Tf-FD, gradient shares of 5 %", {"tffd": SHARES}, "short-plain"),
    ),
    seeds=(0, 1),
    note=f"{TOO_SHORT}\n\n{CONTROLLED}",
)

# --- screens: two epochs, most with one seed --------------------------------------------------------------------------

# Compilation would take as long as it saves in so short a run; bf16 saves two fifths of the time on a CPU that has it.
SCREEN = vary(
    SHORT,
    "screen",
    optim={"epochs": 2, "lr_warmup_epochs": 0.4},
    data={"holdout": 5000},
    run={"compile": False, "precision": "bf16"},
)


def share(**changes: Any) -> dict[str, Any]:
    """Tf-FD at shares of 5 %, with some of its settings changed."""
    return {"tffd": replace(SHARES, **changes)}


# These two are repeated: how far apart their seeds are is the scale for everything that ran once.
PLAIN = Row("screen-plain", "cross-entropy alone", published=Published(BASE, POSTER), seeds=(0, 1, 2))
SHARE = Row(
    "screen-share",
    "Tf-FD: lp, l2, all pairs, shares of 5 %",
    share(),
    "screen-plain",
    published=TFFD,
    seeds=(0, 1, 2),
)

SALIENCE = Study(
    "salience",
    "which salience should choose the channels that teach?",
    SCREEN,
    (
        PLAIN,
        SHARE,
        Row("screen-salience-spread", "spread of the maps, as the author's code", share(salience="spread"), PLAIN.name),
        Row("screen-salience-entropy", "entropy of the activations", share(salience="entropy"), PLAIN.name),
        Row("screen-salience-bn_scale", "scale of the BatchNorm", share(salience="bn_scale"), PLAIN.name),
        Row(
            "screen-salience-hrank",
            "rank of the maps, 8 images every 50 steps",
            share(salience="hrank", salience_images=8, rank_every=50),
            PLAIN.name,
        ),
        Row(
            "screen-salience-ema",
            "lp averaged over steps, paired every 50",
            share(salience_momentum=0.99, rank_every=50),
            PLAIN.name,
        ),
    ),
    note=f"{SCREENED}\n\n{CONTROLLED}",
)

LOSSES = Study(
    "losses",
    "which feature loss, at one gradient share?",
    SCREEN,
    (
        PLAIN,
        SHARE,
        Row(
            "screen-loss-ab",
            "activation boundaries",
            share(intra_loss="ab", inter_loss="ab"),
            PLAIN.name,
            published=Published(70.44, CHART, BASE),
        ),
        Row(
            "screen-loss-at",
            "attention maps",
            share(intra_loss="at", inter_loss="at"),
            PLAIN.name,
            published=Published(70.69, CHART, BASE),
        ),
        Row(
            "screen-loss-sp",
            "similarity within the batch",
            share(intra_loss="sp", inter_loss="sp"),
            PLAIN.name,
            published=Published(70.75, CHART, BASE),
        ),
        Row(
            "screen-loss-ickd",
            "correlation of channels; seeds 1 and 2 were added because seed 0 came out highest",
            share(intra_loss="ickd", inter_loss="ickd"),
            PLAIN.name,
            published=Published(70.82, CHART, BASE),
            seeds=(0, 1, 2),
        ),
        Row("screen-inter-at", "attention maps between stages only", share(inter_loss="at"), PLAIN.name),
        Row("screen-inter-sp", "similarity between stages only", share(inter_loss="sp"), PLAIN.name),
    ),
    note=f"{SCREENED}\n\n{CONTROLLED}",
)

TEACHER110 = Row("screen-teacher-resnet110", "the frozen teacher, resnet110", {"model": "tffd_resnet110"}, seeds=(100,))
TEACHER20 = Row("screen-teacher-resnet20", "the frozen teacher, resnet20", seeds=(100,))


def features_of(paradigm: Any, model: str | None = None) -> dict[str, Any]:
    """Another network's features, at the gradient share of Tf-FD's losses: no source gives their weight."""
    return {"teacher": TeacherConfig(paradigm, model, share_features=0.05)}


TEACHERS = Study(
    "teachers",
    "are a network's own features as good a teacher as another network's?",
    SCREEN,
    (
        TEACHER110,
        TEACHER20,
        replace(PLAIN, published=Published(BASE, TABLE1)),
        SHARE,
        Row(
            "screen-offline-resnet110",
            "features of a frozen ResNet-110",
            features_of("offline", "tffd_resnet110"),
            PLAIN.name,
            TEACHER110.name,
            Published(70.72, TABLE1, BASE),
        ),
        Row(
            "screen-offline-resnet20",
            "features of a frozen ResNet-20",
            features_of("offline", "tffd_resnet20"),
            PLAIN.name,
            TEACHER20.name,
            Published(70.42, TABLE1, BASE),
        ),
        Row(
            "screen-online-resnet110",
            "features of a ResNet-110 in training",
            features_of("online", "tffd_resnet110"),
            PLAIN.name,
            published=Published(70.94, TABLE1, BASE),
        ),
        Row(
            "screen-online-resnet20",
            "features of a ResNet-20 in training",
            features_of("online", "tffd_resnet20"),
            PLAIN.name,
            published=Published(70.48, TABLE1, BASE),
        ),
        Row(
            "screen-branches",
            "auxiliary branches on the first stage",
            features_of("branches"),
            PLAIN.name,
            published=Published(70.04, TABLE1, BASE),
        ),
    ),
    note=f"{SCREENED}\n\n{CONTROLLED}",
)


def logits(**settings: Any) -> dict[str, Any]:
    """The logits of the frozen ResNet-110 alone."""
    return {"teacher": TeacherConfig("offline", "tffd_resnet110", lambda_features=0.0, kd=KDConfig(**settings))}


KD = Row(
    "screen-kd-resnet20",
    "cross-entropy and the teacher's logits",
    logits(),
    PLAIN.name,
    TEACHER110.name,
)
PLUS = Study(
    "plus",
    "does Tf-FD add to the logits of a teacher?",
    SCREEN,
    (
        TEACHER110,
        PLAIN,
        SHARE,
        KD,
        Row(
            "screen-kd-crd-resnet20",
            "the same in CRD's proportions",
            logits(weight=0.9, takes_ce=0.9),
            PLAIN.name,
            TEACHER110.name,
            Published(70.67, POSTER, BASE),
        ),
        Row(
            "screen-kd-std-resnet20",
            "standardised logits, temperature 4, weight 1",
            logits(standardise=True),
            PLAIN.name,
            TEACHER110.name,
        ),
        Row(
            "screen-kd-std9-resnet20",
            "standardised logits as published: 0.1 CE + 9 KL at temperature 2",
            logits(weight=9.0, temperature=2.0, standardise=True, takes_ce=0.9),
            PLAIN.name,
            TEACHER110.name,
            Published(71.48, STANDARDISED, BASE),
        ),
        Row(
            "screen-tffd-kd-resnet20",
            "Tf-FD+, the logits too",
            share(),
            KD.name,
            TEACHER110.name,
            Published(71.56, POSTER, 70.67),
        ),
        Row(
            "screen-reference-kd-resnet20",
            "Tf-FD+ at the author's weights",
            {"tffd": REFERENCE, **logits(warmup_fraction=REFERENCE.warmup_fraction, whole_epochs=True)},
            KD.name,
            TEACHER110.name,
        ),
    ),
    note=f"{SCREENED}\n\n{CONTROLLED}",
)

REGULARISERS = Study(
    "regularisers",
    "does Tf-FD add to common regularisers?",
    SCREEN,
    (
        PLAIN,
        SHARE,
        Row(
            "screen-dropblock",
            "DropBlock on the first two groups",
            {"drop": DropConfig(drop_block=0.1)},
            PLAIN.name,
        ),
        Row("screen-tffd-dropblock", "and Tf-FD", share(), "screen-dropblock"),
        Row("screen-dropout10", "Dropout 0.1", {"drop": DropConfig(dropout=0.1)}, PLAIN.name),
        Row("screen-tffd-dropout10", "and Tf-FD", share(), "screen-dropout10"),
        Row("screen-dropout50", "Dropout 0.5", {"drop": DropConfig(dropout=0.5)}, PLAIN.name),
        Row("screen-tffd-dropout50", "and Tf-FD", share(), "screen-dropout50"),
        Row("screen-label-smoothing", "label smoothing 0.1", {"optim": {"label_smoothing": 0.1}}, PLAIN.name),
        Row("screen-tffd-label-smoothing", "and Tf-FD", share(), "screen-label-smoothing"),
        Row("screen-cutmix", "CutMix", {"optim": {"cutmix": 1.0}}, PLAIN.name),
        Row("screen-tffd-cutmix", "and Tf-FD", share(), "screen-cutmix"),
    ),
    note=f"{SCREENED} DropBlock dropped more of small maps than it was asked to when it ran.\n\n{CONTROLLED}",
)

NEIGHBOURS = Study(
    "neighbours",
    "how does Tf-FD stand among methods that need no teacher either?",
    SCREEN,
    (
        PLAIN,
        SHARE,
        Row(
            "screen-byot",
            "Be Your Own Teacher",
            {"byot": BYOTConfig()},
            PLAIN.name,
            published=Published(77.88, RESNET18, 76.24),
        ),
        # A batch of CS-KD is pairs: as many images as ever to learn, and their partners.
        Row(
            "screen-cs-kd",
            "class-wise self-distillation",
            {"cs_kd": CSKDConfig(), "optim": {"batch_size": 256}},
            PLAIN.name,
            published=Published(78.66, RESNET18, 76.24),
        ),
        Row("screen-tf-kd", "distillation from a designed teacher", {"tf_kd": TfKDConfig()}, PLAIN.name),
        Row(
            "screen-ps-kd",
            "progressive self-distillation",
            {"ps_kd": PSKDConfig()},
            PLAIN.name,
            published=Published(79.31, RESNET18, 76.24),
        ),
        replace(REGULARISERS.row("screen-label-smoothing"), published=Published(78.72, RESNET18, 76.24)),
        replace(REGULARISERS.row("screen-cutmix"), published=Published(80.17, RESNET18, 76.24)),
    ),
    note=f"{SCREENED} BYOT's hint weighed far more than its paper's when it ran.\n\n{CONTROLLED}",
)

ABLATIONS = Study(
    "ablations",
    "which parts of Tf-FD matter?",
    SCREEN,
    (
        PLAIN,
        SHARE,
        Row("screen-intra", "within stages only", share(lambda_inter=0.0, share_inter=None), PLAIN.name),
        Row("screen-inter", "between stages only", share(lambda_intra=0.0, share_intra=None), PLAIN.name),
        Row("screen-neighbours", "pairs of neighbouring stages", share(pairs="neighbours"), PLAIN.name),
        Row("screen-attached", "no stop-gradient on salient channels", share(detach_salient=False), PLAIN.name),
        Row("screen-reference", "the author's weights and salience", {"tffd": REFERENCE}, PLAIN.name),
        Row("screen-share-1", "shares of 1 %", share(share_intra=0.01, share_inter=0.01), PLAIN.name),
        Row("screen-share-20", "shares of 20 %", share(share_intra=0.2, share_inter=0.2), PLAIN.name),
        Row("screen-normalise", "features of unit norm over space", share(normalise=True), PLAIN.name),
        Row(
            "screen-deep-salient",
            "the salient channels of deep stages teach",
            share(deep_channels="salient"),
            PLAIN.name,
        ),
        Row(
            "screen-deep-mean",
            "means of channels of deep stages teach",
            share(deep_channels="group_mean"),
            PLAIN.name,
        ),
        Row("screen-early-decay", "losses off at 60 % of the run", share(decay="off"), PLAIN.name),
    ),
    note=f"{SCREENED}\n\n{CONTROLLED}",
)

# --- the zoo's recipe -------------------------------------------------------------------------------------------------

# Pairs have to agree in their arithmetic, which a run that chose for itself by the clock need not.
FLOAT32 = {"precision": "no", "compile": True}
BF16 = {"precision": "bf16", "compile": False}
EVERY_FIFTH = {**BF16, "eval_every": 5}

# Every row but the first is one change away from it; the moving average is measured in each run, beside the weights.
BUDGET = Study(
    "budget",
    "which recipe gets the most out of 20 epochs?",
    vary(
        SHORT,
        "budget",
        optim={"epochs": 20, "sched": "linear", "lr_warmup_epochs": 1.0, "ema_decay": 0.999},
        data={"holdout": 5000, "augment": "pad_crop_turns"},
        run=EVERY_FIFTH,
    ),
    (
        Row("budget", "rate 0.2, linear to zero, batch 128, weight decay 5e-4, flips in turns"),
        Row("budget-lr40", "rate 0.4", {"optim": {"lr": 0.4}}, "budget"),
        Row("budget-batch64", "batch 64, rate 0.1", {"optim": {"batch_size": 64, "lr": 0.1}}, "budget"),
        Row("budget-wd10", "weight decay 1e-3", {"optim": {"weight_decay": 1e-3}}, "budget"),
        Row("budget-cosine", "cosine to zero", {"optim": {"sched": "cosine"}}, "budget"),
        Row("budget-smooth5", "label smoothing 0.05", {"optim": {"label_smoothing": 0.05}}, "budget"),
        Row("budget-wd2", "weight decay 2e-4", {"optim": {"weight_decay": 2e-4}}, "budget"),
        Row("budget-warmup3", "warm-up of 3 epochs", {"optim": {"lr_warmup_epochs": 3.0}}, "budget"),
        Row("budget-smooth10", "label smoothing 0.1", {"optim": {"label_smoothing": 0.1}}, "budget"),
        Row("budget-flips", "flips drawn in every epoch", {"data": {"augment": "pad_crop_flip"}}, "budget"),
        Row("budget-lr10", "rate 0.1", {"optim": {"lr": 0.1}}, "budget"),
        Row("budget-batch256", "batch 256, rate 0.4", {"optim": {"batch_size": 256, "lr": 0.4}}, "budget"),
    ),
    note=(
        "The zoo's recipe is the first row. Seeds of one recipe lie about as far apart as these rows (sd of "
        "[precision](../precision/README.md)), so none is known to be better than it, and small batches are slower."
    ),
)

# ResNet-18 at 64 px has 40 times the parameters: 25 epochs end at a training loss of 0.46 and 67 % of the test images.
BUDGET18 = Study(
    "budget18",
    "which recipe gets the most out of 12 epochs of ResNet-18 at 64 px, which overfits?",
    vary(
        train_cifar100.ZOO_PLAIN,
        "budget18",
        model="tffd_resnet18",
        optim={"epochs": 12},
        data={"holdout": 5000, "image_size": 64},
        run=EVERY_FIFTH,
    ),
    (
        Row("budget18", "the zoo's recipe: rate 0.2, linear to zero, batch 128, padded crops, flips in turns"),
        Row("budget18-cutmix", "CutMix", {"optim": {"cutmix": 1.0}}, "budget18"),
        Row("budget18-crops", "resized crops, flips drawn anew", {"data": {"augment": "rrc_flip"}}, "budget18"),
        Row("budget18-lr10", "rate 0.1", {"optim": {"lr": 0.1}}, "budget18"),
        Row("budget18-lr40", "rate 0.4", {"optim": {"lr": 0.4}}, "budget18"),
        Row("budget18-mixup", "mixup, alpha 0.2", {"optim": {"mixup": 0.2}}, "budget18"),
        Row("budget18-smooth10", "label smoothing 0.1", {"optim": {"label_smoothing": 0.1}}, "budget18"),
    ),
    note=(
        "What makes the task harder gains with the length of a run: a regulariser that costs nothing at 12 epochs may "
        "pay at 40."
    ),
)


def regularised(base: str) -> tuple[Row, ...]:
    """What keeps long runs of a large network from overfitting, each beside the row `base`."""
    return (
        Row(
            f"{base}-trivial",
            "TrivialAugment and label smoothing 0.1",
            {"optim": {"label_smoothing": 0.1}, "data": {"auto_augment": "trivial"}},
            base,
        ),
        Row(
            f"{base}-mixup",
            "mixup, alpha 0.2, and label smoothing 0.1",
            {"optim": {"label_smoothing": 0.1, "mixup": 0.2}},
            base,
        ),
    )


BUDGET18_25 = Study(
    "budget18-25",
    "which regulariser pays at 25 epochs of ResNet-18 at 64 px?",
    vary(BUDGET18.base, "budget18-25", optim={"epochs": 25}),
    (
        Row("budget18-25", "the zoo's recipe"),
        *regularised("budget18-25"),
    ),
    note=(
        "After the last epoch the two are as close as seeds of one recipe can be. ResNet-18's pair of 40 epochs in "
        "[students](../students/README.md) has TrivialAugment: its training loss is the higher and its held-out NLL "
        "the lower one, so that more epochs have more to give. Its pair of 80 has mixup, whose moving average was the "
        "better network."
    ),
)

# VGG8's 40 epochs end at a training loss of 0.24, and the NLL of its moving average rises over the last five.
BUDGET_VGG8 = Study(
    "budget-vgg8",
    "which regulariser pays at 25 epochs of VGG8, which overfits?",
    vary(
        train_cifar100.ZOO_PLAIN,
        "budget-vgg8",
        model="tffd_vgg8",
        optim={"epochs": 25},
        data={"holdout": 5000},
        run=EVERY_FIFTH,
    ),
    (
        Row("budget-vgg8", "the zoo's recipe"),
        Row("budget-vgg8-smooth10", "label smoothing 0.1", {"optim": {"label_smoothing": 0.1}}, "budget-vgg8"),
        *regularised("budget-vgg8"),
    ),
    note=(
        "VGG8's pair of 60 epochs in [students](../students/README.md) has label smoothing alone. The two that change "
        "the images as well end at a much higher training loss, and may pay in runs that are longer still."
    ),
)

# --- does Tf-FD help? at fixed lambda, by the zoo's recipe ------------------------------------------------------------


def settings_on(base: str) -> tuple[Row, ...]:
    """Plain training, its plainest rival and settings of Tf-FD, for the study whose rows are named after `base`."""
    twin = f"{base}-plain"

    def tffd(name: str, what: str, config: TfFDConfig) -> Row:
        return Row(f"{base}-{name}", what, {"tffd": config}, twin)

    between = replace(CANONICAL, lambda_intra=0.0)
    copyless = TfFDConfig(lambda_intra=0.004, lambda_inter=0.0, normalise=True, ratio=0.9, salience_momentum=0.99)
    return (
        Row(twin, "cross-entropy alone"),
        Row(f"{base}-smooth", "label smoothing 0.1", {"optim": {"label_smoothing": 0.1}}, twin),
        tffd("reference", "Tf-FD at the author's weights", REFERENCE),
        tffd("l2-004", "l2, lambda 0.004", replace(CANONICAL, lambda_intra=0.004, lambda_inter=0.004)),
        tffd("l2-04", "l2, lambda 0.04", replace(CANONICAL, lambda_intra=0.04, lambda_inter=0.04)),
        tffd("inter-004", "l2 between stages only, lambda 0.004", replace(between, lambda_inter=0.004)),
        tffd("inter-04", "l2 between stages only, lambda 0.04", replace(between, lambda_inter=0.04)),
        tffd(
            "ickd",
            "ICKD between stages only, lambda 0.3, off at 60 % of the run",
            replace(between, lambda_inter=0.3, inter_loss="ickd", decay="off"),
        ),
        tffd("copyless", "within stages without copying: unit norm, a tenth learns, averaged salience", copyless),
        Row(f"{base}-average", "features of its own moving average", {"teacher": TeacherConfig("average")}, twin),
        Row(
            f"{base}-average-kd",
            "features and logits of its own moving average",
            {"teacher": TeacherConfig("average", kd=KDConfig())},
            twin,
        ),
    )


TFFD20 = Study(
    "tffd20",
    "does Tf-FD help ResNet-20, which underfits?",
    vary(train_cifar100.ZOO_PLAIN, "tffd20", optim={"epochs": 15}, data={"holdout": 5000}, run=EVERY_FIFTH),
    settings_on("tffd20"),
    seeds=(0, 1, 2),
    note=(
        "The moving average is a thousand steps behind, three epochs of these fifteen, and so it is the worse network "
        "when the learning rate falls to zero (second table): a teacher that holds its student back."
    ),
    decides=True,
)
TFFD18 = Study(
    "tffd18",
    "does Tf-FD help ResNet-18 at 32 px, which overfits?",
    vary(
        train_cifar100.ZOO_PLAIN,
        "tffd18",
        model="tffd_resnet18",
        optim={"epochs": 20},
        data={"holdout": 5000, "image_size": 32},
        run=EVERY_FIFTH,
    ),
    settings_on("tffd18"),
    seeds=(0, 1, 2),
    note=(
        "As a teacher the moving average is of three epochs ago here too, and the worse network at the end (second "
        "table); see [tffd20](../tffd20/README.md)."
    ),
    decides=True,
)

# --- does bf16 cost accuracy? -----------------------------------------------------------------------------------------

IN_BF16 = {"run": BF16}
SMALL_18 = {"model": "tffd_resnet18", "data": {"image_size": 32}}

PRECISION = Study(
    "precision",
    "does training in bf16 cost accuracy?",
    vary(train_cifar100.ZOO_PLAIN, "precision", optim={"epochs": 10}, data={"holdout": 5000}, run=FLOAT32),
    (
        Row("precision-resnet20", "ResNet-20 in float32"),
        Row("precision-resnet20-bf16", "ResNet-20 in bf16", IN_BF16, "precision-resnet20"),
        Row("precision-resnet18", "ResNet-18 at 32 px in float32", SMALL_18),
        Row("precision-resnet18-bf16", "ResNet-18 at 32 px in bf16", IN_BF16, "precision-resnet18"),
    ),
    seeds=(0, 1, 2),
)

# --- the zoo: full length, test images, last epoch --------------------------------------------------------------------


def pair(
    network: str,
    epochs: int,
    seeds: tuple[int, ...],
    known: Published | None = None,
    published: Published | None = None,
    *,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    compiled: bool = False,
    weights: RunWeights = "last",
    **data: Any,
) -> tuple[Row, Row]:
    """A student and its plain twin, of one recipe and seed; what is known of the two from elsewhere.

    With `compiled` both arms compile the whole step, without it the Tf-FD arm its losses alone; `weights` are those
    that both export, and so the ones that are released.
    """
    setting: dict[str, Any] = {
        "model": f"tffd_{network}",
        "optim": {"epochs": epochs, "label_smoothing": label_smoothing, "mixup": mixup},
        "data": data,
        "run": {"compile": compiled, "weights": weights},
    }
    name, tffd = f"zoo-{network}-{epochs}", train_cifar100.ZOO.tffd
    assert tffd is not None
    assert tffd.lambda_intra == tffd.lambda_inter, "the row tells one of them"
    plain = Row(f"{name}-plain", "cross-entropy alone", setting, published=known, seeds=seeds)
    ours: dict[str, Any] = {"tffd": tffd, "run": {"compile": compiled or "losses"}}
    what = f"and Tf-FD, lambda {tffd.lambda_intra:g}"
    return plain, Row(name, what, ours, plain.name, published=published, seeds=seeds)


def authors_pair(network: str, epochs: int, **data: Any) -> tuple[Row, Row]:
    """The same with Tf-FD at the author's weights, from before the settings of TFFD20 were known."""
    plain, row = pair(network, epochs, (0,), **data)
    return plain, replace(row, what="and Tf-FD at the author's weights", change={"tffd": REFERENCE})


ZOO = vary(train_cifar100.ZOO_PLAIN, "zoo", run=EVERY_FIFTH)
AVERAGED: dict[str, Any] = {"weights": "last_ema"}
VGG8 = (Published(70.36, CRD), Published(71.62, POSTER, 70.36))
RESNET20 = pair("resnet20", 90, (0, 1, 2), Published(68.83, PUBLIC_ZOO), TFFD)

LENGTHS = Study(
    "lengths",
    "what do more epochs give ResNet-20, and does Tf-FD give more in longer runs?",
    ZOO,
    (*authors_pair("resnet20", 15), *authors_pair("resnet20", 30), *authors_pair("resnet20", 60), *RESNET20),
    decides=True,
)
STUDENTS = Study(
    "students",
    "what do the zoo's students reach, and what does Tf-FD give them?",
    ZOO,
    (
        *RESNET20,
        *authors_pair("resnet18", 25, image_size=64),
        *pair("resnet18", 40, (0,), label_smoothing=0.1, image_size=64, auto_augment="trivial"),
        *pair("resnet18", 60, (0,), label_smoothing=0.1, mixup=0.2, image_size=64, **AVERAGED),
        *pair("resnet32", 60, (0,), Published(70.16, PUBLIC_ZOO), Published(72.55, POSTER, 71.14), compiled=True),
        *pair("wrn16_2", 60, (0,), Published(73.26, CRD), Published(74.33, POSTER, 73.26), compiled=True, **AVERAGED),
        *pair("vgg8", 40, (0,), *VGG8, **AVERAGED),
        *pair("vgg8", 60, (0,), *VGG8, label_smoothing=0.1, **AVERAGED),
        *pair("vgg8", 70, (0,), *VGG8, label_smoothing=0.1, mixup=0.2, **AVERAGED),
        *pair("resnet8x4", 50, (0,), Published(72.50, CRD), Published(73.62, POSTER, 72.50), compiled=True, **AVERAGED),
        *pair("resnet56", 40, (0,), Published(72.63, PUBLIC_ZOO), compiled=True, **AVERAGED),
    ),
    note=(
        "Some pairs add regularisers to the zoo's recipe, in both arms: ResNet-18's of 40 epochs TrivialAugment and "
        "label smoothing 0.1, its pair of 60 mixup, alpha 0.2, and label smoothing 0.1 "
        "([budget18-25](../budget18-25/README.md)); VGG8's of 60 label smoothing 0.1 and its pair of 70 mixup as well "
        "([budget-vgg8](../budget-vgg8/README.md)). Runs evaluate in bf16 and are told so here; weights that are "
        "released are measured again in float32, which moves a figure by about a tenth of a point. Of ResNet-20, "
        "ResNet-18 and ResNet-32 the weights after the last epoch are released. In all ten runs of these that took 60 "
        "epochs or more the moving average was the better network, by 0.07 to 0.73; so from WRN-16-2 on, and of "
        "ResNet-18's pair of 60, the average after the last epoch is released, of both arms, which was decided before "
        "any of its figures were known. VGG8's pair of 70 ran twice with the same seed, on two processors: the weights "
        "of the first were lost, and the second, which was to be released whatever it reached, is the one above. The "
        "averages of the first reached 71.04 plain and 71.05 with Tf-FD (its records are in commit 1b6fe8f), so the "
        "difference of the averages is within what chance moves."
    ),
    decides=True,
)

# --- fine-tuning ------------------------------------------------------------------------------------------------------

# The zoo's plain student, which knows CIFAR-100's classes, learns others.


def finetuning(name: str, what: str, **changes: Any) -> Study:
    """Fine-tuning with Tf-FD beside its plain twin."""
    return Study(
        name,
        f"does Tf-FD help a trained ResNet-20 to learn {what}?",
        vary(train_cifar100.FINETUNE, name, tffd=None, run={"precision": "no", "compile": False}, **changes),
        (
            Row(f"{name}-plain", "cross-entropy alone"),
            Row(name, "Tf-FD, gradient shares of 5 %", share(), f"{name}-plain"),
        ),
        seeds=(0, 1, 2),
        note="They start from the plain ResNet-20 that the zoo released then: 15 epochs, 61.23 % of the test images.",
    )


FINETUNE_COARSE = finetuning(
    "finetune-coarse", "CIFAR-100's twenty coarse classes", optim={"epochs": 2, "lr_warmup_epochs": 0.25}
)
FINETUNE_DIGITS = finetuning(
    "finetune-digits",
    "scikit-learn's digits",
    data={"source": "digits", "label_column": None, "image_size": 16, "augment": "none"},
    optim={"epochs": 8},
)

# --- without any download ---------------------------------------------------------------------------------------------

DIGITS = Study(
    "digits",
    "do studies work on this machine? (scikit-learn's digits, a few minutes)",
    vary(train_cifar100.QUICKSTART, "digits", tffd=None, optim={"epochs": 4}),
    (
        Row("digits-plain", "cross-entropy alone"),
        Row("digits-share", "Tf-FD, gradient shares of 5 %", share(), "digits-plain"),
    ),
    seeds=(0, 1),
)

STUDIES = {study.name: study for study in [*globals().values()] if isinstance(study, Study)}
"""All of the above."""
