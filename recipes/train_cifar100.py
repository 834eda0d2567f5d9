"""CIFAR-100 recipes for 32x32 networks: Tf-FD and what it has to be compared with.

    accelerate launch recipes/train_cifar100.py [PRESET] [--flags]

| preset     | what                                                            | epochs |
|------------|-----------------------------------------------------------------|--------|
| tffd       | Tf-FD, canonical losses at fixed weights, CRD's setting         | 240    |
| plain      | cross-entropy alone, the twin of tffd                           | 240    |
| reference  | Tf-FD as the author's code has it: weights, salience, recipe    | 240    |
| short-*    | tffd, plain, reference or share (5 % gradient share each)       | 15     |
| resnet18   | timm's ResNet-18 at 32 px, for the zoo; resnet18-plain          | 12     |
| quickstart | scikit-learn's digits: no network, no data, about a minute      | 8      |

What to hold them against (CIFAR-100 top-1, mean of runs; the poster's base is CRD's table, its Tf-FD runs use another
recipe, so only paired runs tell what Tf-FD gives):

    tffd_resnet20  plain 69.06  Tf-FD 70.62      tffd_wrn16_2   plain 73.26  Tf-FD 74.33
    tffd_resnet32  plain 71.14  Tf-FD 72.55      tffd_resnet8x4 plain 72.50  Tf-FD 73.62      tffd_vgg8 70.36  71.62

CRD's setting (Tian et al., "Contrastive Representation Distillation", ICLR 2020): SGD, momentum 0.9, weight decay 5e-4,
batch 64, learning rate 0.05, x0.1 at 150, 180 and 210 of 240 epochs, pad-4 crop and flip; the last epoch is reported.
Cost: an epoch of tffd_resnet20 takes about 70 s on two CPU cores.
"""

from __future__ import annotations

from tffd_zoo.cli import guard
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, recipe_from_cli, vary
from tffd_zoo.tasks import CANONICAL, REFERENCE, TfFDConfig
from tffd_zoo.training import train

TFFD = Recipe(
    name="tffd",
    tag="c100",
    model="tffd_resnet20",
    data=DataConfig(source="uoft-cs/cifar100"),
    optim=OptimConfig(epochs=240, batch_size=64, lr=0.05, weight_decay=5e-4),
    tffd=CANONICAL,
)
PLAIN = vary(TFFD, "plain", tag="ce_c100", tffd=None)
# The author's recipe: Nesterov, reflect-padding, batch 128, lr 0.1.
REFERENCE_RUN = vary(
    TFFD,
    "reference",
    tag="reference_c100",
    tffd=REFERENCE,
    data={"padding_mode": "reflect"},
    optim={"opt": "sgd", "batch_size": 128, "lr": 0.1},
)

# A schedule that gets far in few epochs: warm-up and cosine, Nesterov. All short runs share it, so they are paired.
SHORT = {
    "epochs": 15, "batch_size": 128, "lr": 0.2, "opt": "sgd", "sched": "cosine", "warmup_epochs": 2.0,
}  # fmt: skip
SHARES = TfFDConfig(share_intra=0.05, share_inter=0.05, measure_every=100)
SHORT_TFFD = vary(TFFD, "short-tffd", optim=SHORT, run={"compile": True})
SHORT_SHARE = vary(SHORT_TFFD, "short-share", tffd=SHARES)
SHORT_PLAIN = vary(SHORT_TFFD, "short-plain", tag="ce_c100", tffd=None)
SHORT_REFERENCE = vary(SHORT_TFFD, "short-reference", tag="reference_c100", tffd=REFERENCE)

RESNET18 = vary(SHORT_TFFD, "resnet18", model="tffd_resnet18", data={"image_size": 32}, optim={"epochs": 12})
RESNET18_PLAIN = vary(RESNET18, "resnet18-plain", tag="ce_c100", tffd=None)

QUICKSTART = vary(
    TFFD,
    "quickstart",
    tag="digits",
    data={"source": "digits", "image_size": 16},
    optim={"epochs": 8, "batch_size": 64, "lr": 0.1, "sched": "cosine", "warmup_epochs": 1.0},
    run={"log_every": 5},
)

PRESETS = {
    recipe.name: recipe
    for recipe in (
        TFFD, PLAIN, REFERENCE_RUN, SHORT_TFFD, SHORT_SHARE, SHORT_PLAIN, SHORT_REFERENCE, RESNET18, RESNET18_PLAIN,
        QUICKSTART,
    )
}  # fmt: skip

if __name__ == "__main__":
    guard(lambda: train(recipe_from_cli(PRESETS, __doc__)))
