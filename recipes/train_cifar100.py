"""CIFAR-100 recipes for 32x32 networks: Tf-FD and what it has to be compared with.

    accelerate launch recipes/train_cifar100.py [PRESET] [--flags]

| preset     | what                                                            | epochs |
|------------|-----------------------------------------------------------------|--------|
| tffd       | Tf-FD, canonical losses at fixed weights, CRD's setting         | 240    |
| plain      | cross-entropy alone, the twin of tffd                           | 240    |
| reference  | Tf-FD as the author's code has it: weights, salience, recipe    | 240    |
| share      | Tf-FD at a gradient share of 5 % for each loss                  | 240    |
| short-*    | tffd, plain, reference or share                                 | 15     |
| resnet18   | timm's ResNet-18 at 32 px, for the zoo; resnet18-plain          | 12     |
| finetune   | from the plain student to the twenty coarse classes             | 4      |
| quickstart | scikit-learn's digits: no network, no data, about a minute      | 8      |

and the experiments, each also as short-*, each one change away from plain or share, its twin:

| presets                                                          | what                                             |
|------------------------------------------------------------------|--------------------------------------------------|
| salience-spread, -entropy, -bn_scale, -hrank, -ema               | what makes a channel salient                     |
| loss-ab, -at, -sp, -ickd; inter-at, inter-sp                     | other feature losses                             |
| intra, inter, neighbours, attached, share-1, share-20            | ablations: parts, pairs, no stop-gradient, shares|
| normalise, deep-salient, deep-mean, early-decay                  | further settings of Tf-FD                        |
| dropblock, dropout10, dropout50, label-smoothing, cutmix; tffd-* | regularisers, alone and with Tf-FD               |
| byot, cs-kd, tf-kd, ps-kd                                        | teacher-free neighbours                          |
| offline-resnet110, -resnet20; online-*; branches                 | the supplement's Table 1: features of a teacher  |
| kd-MODEL, kd-std-MODEL, kd-crd-MODEL, tffd-kd-MODEL              | logits of CRD's teachers; the last is Tf-FD+     |
| reference-kd-resnet20                                            | Tf-FD+ as the author's code has it               |
| teacher-MODEL                                                    | the frozen teachers: train them first            |

What to hold them against (CIFAR-100 top-1, mean of runs; the poster's base is CRD's table, its Tf-FD runs use another
recipe, so only paired runs tell what Tf-FD gives):

    tffd_resnet20  plain 69.06  Tf-FD 70.62      tffd_wrn16_2   plain 73.26  Tf-FD 74.33
    tffd_resnet32  plain 71.14  Tf-FD 72.55      tffd_resnet8x4 plain 72.50  Tf-FD 73.62      tffd_vgg8 70.36  71.62

CRD's setting (Tian et al., "Contrastive Representation Distillation", ICLR 2020): SGD, momentum 0.9, weight decay 5e-4,
batch 64, learning rate 0.05, x0.1 at 150, 180 and 210 of 240 epochs, pad-4 crop and flip; the last epoch is reported.
Cost: an epoch of tffd_resnet20 takes about 70 s on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tffd_zoo.cli import guard
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, recipe_from_cli, vary
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
from tffd_zoo.training import train

TFFD = Recipe(
    name="tffd",
    model="tffd_resnet20",
    data=DataConfig(source="uoft-cs/cifar100"),
    optim=OptimConfig(epochs=240, batch_size=64, lr=0.05, weight_decay=5e-4),
    tffd=CANONICAL,
)
PLAIN = vary(TFFD, "plain", tffd=None)
# The author's recipe: Nesterov, reflect-padding, batch 128, lr 0.1.
REFERENCE_RUN = vary(
    TFFD,
    "reference",
    tffd=REFERENCE,
    data={"padding_mode": "reflect"},
    optim={"opt": "sgd", "batch_size": 128, "lr": 0.1},
)

# A schedule that gets far in few epochs: warm-up and cosine, Nesterov. All short runs share it, so they are paired.
SHORT = {
    "epochs": 15, "batch_size": 128, "lr": 0.2, "opt": "sgd", "sched": "cosine", "lr_warmup_epochs": 2.0,
}  # fmt: skip
SHARES = TfFDConfig(share_intra=0.05, share_inter=0.05)
SHARE = vary(TFFD, "share", tffd=SHARES)
SHORT_TFFD = vary(TFFD, "short-tffd", optim=SHORT)
SHORT_SHARE = vary(SHORT_TFFD, "short-share", tffd=SHARES)
SHORT_PLAIN = vary(SHORT_TFFD, "short-plain", tffd=None)
SHORT_REFERENCE = vary(SHORT_TFFD, "short-reference", tffd=REFERENCE)

RESNET18 = vary(SHORT_TFFD, "resnet18", model="tffd_resnet18", data={"image_size": 32}, optim={"epochs": 12})
RESNET18_PLAIN = vary(RESNET18, "resnet18-plain", tffd=None)

# --- the experiments --------------------------------------------------------------------------------------------------

# No source gives the weight of a teacher's features: the gradient share that Tf-FD's losses get makes rows comparable.
FEATURES: dict[str, Any] = {"share_features": 0.05}
# Teachers of CRD's table by student.
CRD_PAIRS = {
    "resnet20": "resnet110", "resnet32": "resnet110", "wrn16_2": "wrn40_2", "resnet8x4": "resnet32x4", "vgg8": "vgg13",
}  # fmt: skip
REGULARISERS: dict[str, dict[str, Any]] = {
    "dropblock": {"drop": DropConfig(drop_block=0.1)},
    "dropout10": {"drop": DropConfig(dropout=0.1)},
    "dropout50": {"drop": DropConfig(dropout=0.5)},
    "label-smoothing": {"optim": {"label_smoothing": 0.1}},
    "cutmix": {"optim": {"cutmix": 1.0}},
}


def experiments(plain: Recipe, share: Recipe, reference: Recipe, prefix: str = "") -> Iterator[Recipe]:
    """Every experiment as a variant of three recipes of one length, its name after `prefix`."""

    def variant(base: Recipe, name: str, **changes: Any) -> Recipe:
        return vary(base, prefix + name, **changes)

    # Tf-FD: salience, feature losses, ablations, further settings.
    for salience in ("spread", "entropy", "bn_scale"):
        yield variant(share, f"salience-{salience}", tffd={"salience": salience})
    yield variant(share, "salience-hrank", tffd={"salience": "hrank", "salience_images": 8, "rank_every": 50})
    yield variant(share, "salience-ema", tffd={"salience_momentum": 0.99, "rank_every": 50})
    for loss in ("ab", "at", "sp", "ickd"):
        yield variant(share, f"loss-{loss}", tffd={"intra_loss": loss, "inter_loss": loss})
    for loss in ("at", "sp"):
        yield variant(share, f"inter-{loss}", tffd={"inter_loss": loss})
    yield variant(share, "intra", tffd={"lambda_inter": 0.0, "share_inter": None})
    yield variant(share, "inter", tffd={"lambda_intra": 0.0, "share_intra": None})
    yield variant(share, "neighbours", tffd={"pairs": "neighbours"})
    yield variant(share, "attached", tffd={"detach_salient": False})
    for percent in (1, 20):
        yield variant(share, f"share-{percent}", tffd={"share_intra": percent / 100, "share_inter": percent / 100})
    yield variant(share, "normalise", tffd={"normalise": True})
    yield variant(share, "deep-salient", tffd={"deep_channels": "salient"})
    yield variant(share, "deep-mean", tffd={"deep_channels": "group_mean"})
    yield variant(share, "early-decay", tffd={"decay": "off"})

    # Regularisers, alone and with Tf-FD.
    for name, settings in REGULARISERS.items():
        yield variant(plain, name, **settings)
        yield variant(share, f"tffd-{name}", **settings)

    # Teacher-free neighbours. A batch of CS-KD is pairs: as many images as ever to learn, and their partners.
    yield variant(plain, "byot", byot=BYOTConfig())
    yield variant(plain, "cs-kd", cs_kd=CSKDConfig(), optim={"batch_size": 2 * plain.optim.batch_size})
    yield variant(plain, "tf-kd", tf_kd=TfKDConfig())
    yield variant(plain, "ps-kd", ps_kd=PSKDConfig())

    # Teachers, from a seed that no student has.
    teachers = {
        name: variant(plain, f"teacher-{name}", model=f"tffd_{name}", run={"seed": 100})
        for name in dict.fromkeys((*CRD_PAIRS.values(), "resnet20"))
    }
    frozen: dict[str, dict[str, Any]] = {
        name: {"model": recipe.model, "weights": recipe.folder / "weights" / "last.safetensors"}
        for name, recipe in teachers.items()
    }
    yield from teachers.values()
    for name in ("resnet110", "resnet20"):
        yield variant(plain, f"offline-{name}", teacher=TeacherConfig(**frozen[name], **FEATURES))
        yield variant(plain, f"online-{name}", teacher=TeacherConfig("online", f"tffd_{name}", **FEATURES))
    yield variant(plain, "branches", teacher=TeacherConfig("branches", **FEATURES))

    # Logits of CRD's teachers.
    for student, name in CRD_PAIRS.items():

        def taught(base: Recipe, what: str, kd: KDConfig, student: str = student, name: str = name) -> Recipe:
            teacher = TeacherConfig(**frozen[name], lambda_features=0.0, kd=kd)
            return variant(base, f"{what}-{student}", model=f"tffd_{student}", teacher=teacher)

        yield taught(plain, "kd", KDConfig())
        # As published: 0.1 CE + 9 KL at temperature 2.
        yield taught(plain, "kd-std", KDConfig(weight=9.0, temperature=2.0, standardise=True, takes_ce=0.9))
        yield taught(plain, "kd-crd", KDConfig(weight=0.9, takes_ce=0.9))
        yield taught(share, "tffd-kd", KDConfig())
        if student == "resnet20":
            yield taught(
                reference, "reference-kd", KDConfig(warmup_fraction=REFERENCE.warmup_fraction, whole_epochs=True)
            )


# A trained student learns other classes, its body at a tenth of the head's rate. The twin: --tffd None.
FINETUNE = vary(
    SHORT_SHARE,
    "finetune",
    tag="ft_c100",
    model="tffd_resnet20.ce_c100",
    pretrained=True,
    data={"label_column": "coarse_label"},
    optim={"epochs": 4, "lr": 0.05, "warmup_epochs": 0.5, "layer_decay": 0.1, "layer_decay_min": 0.1},
    run={"compile": False},
)

QUICKSTART = vary(
    TFFD,
    "quickstart",
    data={"source": "digits", "image_size": 16},
    optim={"epochs": 8, "batch_size": 64, "lr": 0.1, "sched": "cosine", "lr_warmup_epochs": 1.0},
    run={"log_every": 5},
)

PRESETS = {
    recipe.name: recipe
    for recipe in (
        TFFD, PLAIN, REFERENCE_RUN, SHARE, SHORT_TFFD, SHORT_SHARE, SHORT_PLAIN, SHORT_REFERENCE, RESNET18,
        RESNET18_PLAIN, FINETUNE, QUICKSTART,
        *experiments(PLAIN, SHARE, REFERENCE_RUN),
        *experiments(SHORT_PLAIN, SHORT_SHARE, SHORT_REFERENCE, "short-"),
    )
}  # fmt: skip

if __name__ == "__main__":
    guard(lambda: train(recipe_from_cli(PRESETS, __doc__)))
