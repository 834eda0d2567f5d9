"""The studies that compare.py runs: which recipes, each against which twin, over which seeds.

The pilot compares settled recipes on the test images. The others screen: short, most with one seed, on 5,000 images
held out of the training set, to choose what deserves a longer run. A run counts for every study that has its recipe.

Published figures stand beside ours to hold them against. All are from runs of about 240 epochs with other recipes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tffd_zoo.recipe import vary

from ..train_cifar100 import QUICKSTART, SHORT_PLAIN, SHORT_REFERENCE, SHORT_SHARE, experiments
from .report import Published, Row, Study

POSTER = "Tf-FD's ECCV 2022 poster; its base and KD rows are CRD's, from another recipe than its Tf-FD rows"
CHART = "the same poster, read off its chart of feature losses"
TABLE1 = "Table 1 of Tf-FD's supplement, ECCV 2022"
STANDARDISED = "Sun et al., logit standardisation, CVPR 2024, arXiv 2403.01427"
RESNET18 = "ResNet-18, not ResNet-20: one code base with all of these methods"

BASE = 69.06
TFFD = Published(70.62, POSTER, base=BASE)

# --- final tables: the test images ------------------------------------------------------------------------------------

PILOT = Study(
    "pilot",
    "does Tf-FD help ResNet-20 on CIFAR-100 in a short run?",
    (
        Row(SHORT_PLAIN, "cross-entropy alone", published=Published(BASE, POSTER)),
        Row(SHORT_REFERENCE, "Tf-FD at the author's weights", "short-plain", TFFD),
        Row(SHORT_SHARE, "Tf-FD, gradient shares of 5 %", "short-plain"),
    ),
    seeds=(0, 1),
)

# --- screening: held-out images ---------------------------------------------------------------------------------------

# Compilation would take as long as it saves in so short a run; bf16 saves two fifths of the time on a CPU that has it.
SCREEN = {
    "optim": {"epochs": 2, "lr_warmup_epochs": 0.4},
    "data": {"holdout": 5000},
    "run": {"compile": False, "precision": "bf16"},
}
SCREEN_PLAIN, SCREEN_SHARE, SCREEN_REFERENCE = (
    vary(recipe, recipe.name.replace("short", "screen"), **SCREEN)
    for recipe in (SHORT_PLAIN, SHORT_SHARE, SHORT_REFERENCE)
)
SCREENED = {
    recipe.name: recipe
    for recipe in (
        SCREEN_PLAIN,
        SCREEN_SHARE,
        SCREEN_REFERENCE,
        *experiments(SCREEN_PLAIN, SCREEN_SHARE, SCREEN_REFERENCE, "screen-"),
    )
}


def row(
    name: str,
    what: str,
    twin: str | None = "plain",
    published: Published | None = None,
    seeds: tuple[int, ...] | None = None,
) -> Row:
    """A screened recipe by its short name."""
    return Row(SCREENED[f"screen-{name}"], what, twin and f"screen-{twin}", published, seeds)


def teacher(model: str) -> Row:
    """The frozen teacher, trained once under the same conditions, held-out images included."""
    recipe = SCREENED[f"screen-teacher-{model}"]
    return Row(recipe, f"the frozen teacher, {model}", seeds=(recipe.run.seed,))


# These two are repeated: how far apart their seeds are is the scale for everything that ran once.
PLAIN = row("plain", "cross-entropy alone", None, Published(BASE, POSTER), seeds=(0, 1, 2))
SHARE = row("share", "Tf-FD: lp, l2, all pairs, shares of 5 %", published=TFFD, seeds=(0, 1, 2))

SALIENCE = Study(
    "salience",
    "which salience should choose the channels that teach?",
    (
        PLAIN,
        SHARE,
        row("salience-spread", "spread of the maps, as the author's code"),
        row("salience-entropy", "entropy of the activations"),
        row("salience-bn_scale", "scale of the BatchNorm"),
        row("salience-hrank", "rank of the maps, 8 images every 50 steps"),
        row("salience-ema", "lp averaged over steps, paired every 50"),
    ),
)

LOSSES = Study(
    "losses",
    "which feature loss, at one gradient share?",
    (
        PLAIN,
        SHARE,
        row("loss-ab", "activation boundaries", published=Published(70.44, CHART, BASE)),
        row("loss-at", "attention maps", published=Published(70.69, CHART, BASE)),
        row("loss-sp", "similarity within the batch", published=Published(70.75, CHART, BASE)),
        row(
            "loss-ickd",
            "correlation of channels; seeds 1 and 2 were added because seed 0 came out highest",
            published=Published(70.82, CHART, BASE),
            seeds=(0, 1, 2),
        ),
        row("inter-at", "attention maps between stages only"),
        row("inter-sp", "similarity between stages only"),
    ),
)

TEACHERS = Study(
    "teachers",
    "are a network's own features as good a teacher as another network's?",
    (
        teacher("resnet110"),
        teacher("resnet20"),
        replace(PLAIN, published=Published(BASE, TABLE1)),
        SHARE,
        row("offline-resnet110", "features of a frozen ResNet-110", published=Published(70.72, TABLE1, BASE)),
        row("offline-resnet20", "features of a frozen ResNet-20", published=Published(70.42, TABLE1, BASE)),
        row("online-resnet110", "features of a ResNet-110 in training", published=Published(70.94, TABLE1, BASE)),
        row("online-resnet20", "features of a ResNet-20 in training", published=Published(70.48, TABLE1, BASE)),
        row("branches", "auxiliary branches on the first stage", published=Published(70.04, TABLE1, BASE)),
    ),
)

PLUS = Study(
    "plus",
    "does Tf-FD add to the logits of a teacher?",
    (
        teacher("resnet110"),
        PLAIN,
        SHARE,
        row("kd-resnet20", "cross-entropy and the teacher's logits"),
        row("kd-crd-resnet20", "the same in CRD's proportions", published=Published(70.67, POSTER, BASE)),
        row("kd-std-resnet20", "standardised logits", published=Published(71.48, STANDARDISED, BASE)),
        row("tffd-kd-resnet20", "Tf-FD+, the logits too", "kd-resnet20", Published(71.56, POSTER, 70.67)),
        row("reference-kd-resnet20", "Tf-FD+ at the author's weights", "kd-resnet20"),
    ),
)

REGULARISERS = Study(
    "regularisers",
    "does Tf-FD add to common regularisers?",
    (
        PLAIN,
        SHARE,
        row("dropblock", "DropBlock on the first two groups"),
        row("tffd-dropblock", "and Tf-FD", "dropblock"),
        row("dropout10", "Dropout 0.1"),
        row("tffd-dropout10", "and Tf-FD", "dropout10"),
        row("dropout50", "Dropout 0.5"),
        row("tffd-dropout50", "and Tf-FD", "dropout50"),
        row("label-smoothing", "label smoothing 0.1"),
        row("tffd-label-smoothing", "and Tf-FD", "label-smoothing"),
        row("cutmix", "CutMix"),
        row("tffd-cutmix", "and Tf-FD", "cutmix"),
    ),
)

NEIGHBOURS = Study(
    "neighbours",
    "how does Tf-FD stand among methods that need no teacher either?",
    (
        PLAIN,
        SHARE,
        row("byot", "Be Your Own Teacher", published=Published(77.88, RESNET18, 76.24)),
        row("cs-kd", "class-wise self-distillation", published=Published(78.66, RESNET18, 76.24)),
        row("tf-kd", "distillation from a designed teacher"),
        row("ps-kd", "progressive self-distillation", published=Published(79.31, RESNET18, 76.24)),
        row("label-smoothing", "label smoothing 0.1", published=Published(78.72, RESNET18, 76.24)),
        row("cutmix", "CutMix", published=Published(80.17, RESNET18, 76.24)),
    ),
)

ABLATIONS = Study(
    "ablations",
    "which parts of Tf-FD matter?",
    (
        PLAIN,
        SHARE,
        row("intra", "within stages only"),
        row("inter", "between stages only"),
        row("neighbours", "pairs of neighbouring stages"),
        row("attached", "no stop-gradient on salient channels"),
        row("reference", "the author's weights and salience"),
        row("share-1", "shares of 1 %"),
        row("share-20", "shares of 20 %"),
        row("normalise", "features of unit norm over space"),
        row("deep-salient", "the salient channels of deep stages teach"),
        row("deep-mean", "means of channels of deep stages teach"),
        row("early-decay", "losses off at 60 % of the run"),
    ),
)

# --- the zoo's recipe -------------------------------------------------------------------------------------------------

# Each row but the first is one change away from it; the moving average is measured in every run, beside the weights.
BUDGET = vary(
    SHORT_PLAIN,
    "budget",
    optim={"epochs": 20, "sched": "linear", "lr_warmup_epochs": 1.0, "ema_decay": 0.999},
    data={"holdout": 5000, "augment": "pad_crop_turns"},
)


def budget_row(name: str, what: str, **changes: Any) -> Row:
    """The budget recipe with something changed."""
    return Row(vary(BUDGET, f"budget-{name}", **changes), what, "budget")


BUDGETS = Study(
    "budget",
    "which recipe gets the most out of 20 epochs?",
    (
        Row(BUDGET, "rate 0.2, linear to zero, batch 128, weight decay 5e-4, flips in turns"),
        budget_row("lr10", "rate 0.1", optim={"lr": 0.1}),
        budget_row("wd2", "weight decay 2e-4", optim={"weight_decay": 2e-4}),
        budget_row("batch64", "batch 64, rate 0.1", optim={"batch_size": 64, "lr": 0.1}),
        budget_row("cosine", "cosine to zero", optim={"sched": "cosine"}),
        budget_row("lr40", "rate 0.4", optim={"lr": 0.4}),
        budget_row("smooth5", "label smoothing 0.05", optim={"label_smoothing": 0.05}),
        budget_row("flips", "flips drawn in every epoch", data={"augment": "pad_crop_flip"}),
        budget_row("wd10", "weight decay 1e-3", optim={"weight_decay": 1e-3}),
        budget_row("batch256", "batch 256, rate 0.4", optim={"batch_size": 256, "lr": 0.4}),
        budget_row("smooth10", "label smoothing 0.1", optim={"label_smoothing": 0.1}),
        budget_row("warmup3", "warm-up of 3 epochs", optim={"lr_warmup_epochs": 3.0}),
    ),
)

# --- without any download ---------------------------------------------------------------------------------------------

DIGITS_SHARE = vary(QUICKSTART, "digits-share", optim={"epochs": 4}, tffd={"share_intra": 0.05, "share_inter": 0.05})
DIGITS = Study(
    "digits",
    "do studies work on this machine? (scikit-learn's digits, a few minutes)",
    (
        Row(vary(DIGITS_SHARE, "digits-plain", tffd=None), "cross-entropy alone"),
        Row(DIGITS_SHARE, "Tf-FD, gradient shares of 5 %", "digits-plain"),
    ),
    seeds=(0, 1),
)

STUDIES = {
    study.name: study
    for study in (
        PILOT,
        SALIENCE,
        LOSSES,
        TEACHERS,
        PLUS,
        REGULARISERS,
        NEIGHBOURS,
        ABLATIONS,
        BUDGETS,
        DIGITS,
    )
}
