"""CIFAR-100 recipes for 32x32 networks: Tf-FD and what it has to be compared with.

    accelerate launch -q recipes/train_cifar100.py [PRESET] [--flags]

| preset     | what                                                                         | epochs |
|------------|------------------------------------------------------------------------------|--------|
| tffd       | Tf-FD, canonical losses at fixed weights, CRD's setting                      | 240    |
| plain      | cross-entropy alone, the twin of tffd                                        | 240    |
| reference  | Tf-FD as the author's code has it: weights, salience, recipe                 | 240    |
| kd         | Tf-FD+, the logits of plain --model tffd_resnet110 --seed 100 too            | 240    |
| zoo        | the recipe of the zoo's students: the most out of fewer epochs               | 150    |
| zoo-plain  | cross-entropy alone, the twin of zoo                                         | 150    |
| finetune   | from the plain student to the twenty coarse classes, with Tf-FD              | 4      |
| quickstart | scikit-learn's digits: no network, no data, about a minute                   | 8      |

`finetune-plain` is the twin of finetune, without Tf-FD.

Whatever else was compared, such as saliences, feature losses, teachers and regularisers, is a row of a study: see
recipes/studies/studies.py.

What to hold them against (CIFAR-100 top-1, mean of runs; the poster's base is CRD's table, its Tf-FD runs use another
recipe, so only paired runs tell what Tf-FD gives):

    tffd_resnet20  plain 69.06  Tf-FD 70.62      tffd_wrn16_2   plain 73.26  Tf-FD 74.33
    tffd_resnet32  plain 71.14  Tf-FD 72.55      tffd_resnet8x4 plain 72.50  Tf-FD 73.62      tffd_vgg8 70.36  71.62

CRD's setting (Tian et al., "Contrastive Representation Distillation", ICLR 2020): SGD, momentum 0.9, weight decay 5e-4,
batch 64, learning rate 0.05, x0.1 at 150, 180 and 210 of 240 epochs, pad-4 crop and flip; the last epoch is reported.
Cost: an epoch of tffd_resnet20 takes 50 s in bf16 and 75 s in float32 on two CPU cores (results/benchmark).
"""

from __future__ import annotations

from dataclasses import replace

from tffd_zoo.cli import guard
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, recipe_from_cli, vary
from tffd_zoo.run_record import weights_file
from tffd_zoo.tasks import CANONICAL, REFERENCE, KDConfig, TeacherConfig, TfFDConfig
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

# Nesterov, linear to zero, flips in turns; no other recipe of results/budget is known to be better. The moving average
# of the weights is measured beside them. Both losses of Tf-FD, at weights that cost nothing beyond the spread of seeds
# (results/tffd20).
ZOO = vary(
    TFFD,
    "zoo",
    tffd=replace(CANONICAL, lambda_intra=0.004, lambda_inter=0.004),
    data={"augment": "pad_crop_turns"},
    optim={
        "epochs": 150, "batch_size": 128, "lr": 0.2, "opt": "sgd", "sched": "linear", "lr_warmup_epochs": 1.0,
        "ema_decay": 0.999,
    },
)  # fmt: skip
ZOO_PLAIN = vary(ZOO, "zoo-plain", tffd=None)
# CRD's teacher of ResNet-20, from a seed that no student has.
TEACHER = vary(PLAIN, "plain", model="tffd_resnet110", run={"seed": 100})
KD = vary(
    TFFD,
    "kd",
    teacher=TeacherConfig(
        "offline", TEACHER.model, weights_file(TEACHER.folder, "last"), lambda_features=0.0, kd=KDConfig()
    ),
)
# A trained student learns other classes, its body at a tenth of the head's rate.
FINETUNE = vary(
    ZOO,
    "finetune",
    model="tffd_resnet20.ce_c100",
    pretrained=True,
    data={"label_column": "coarse_label", "augment": "pad_crop_flip"},
    optim={
        "epochs": 4, "lr": 0.05, "sched": "cosine", "lr_warmup_epochs": 0.5, "ema_decay": None, "layer_decay": 0.1,
        "layer_decay_min": 0.1,
    },
    tffd=TfFDConfig(share_intra=0.05, share_inter=0.05),
)  # fmt: skip

FINETUNE_PLAIN = vary(FINETUNE, "finetune-plain", tffd=None)

QUICKSTART = vary(
    TFFD,
    "quickstart",
    data={"source": "digits", "image_size": 16},
    optim={"epochs": 8, "batch_size": 64, "lr": 0.1, "sched": "cosine", "lr_warmup_epochs": 1.0},
    run={"log_every": 5},
)

PRESETS = {
    recipe.name: recipe
    for recipe in (TFFD, PLAIN, REFERENCE_RUN, KD, ZOO, ZOO_PLAIN, FINETUNE, FINETUNE_PLAIN, QUICKSTART)
}

if __name__ == "__main__":
    guard(lambda: train(recipe_from_cli(PRESETS, __doc__)))
