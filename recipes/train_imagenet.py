"""ImageNet-1k recipes: the supplement's setting and its plain twin, for any timm model; and fine-tuning from it.

    accelerate launch -q recipes/train_imagenet.py [PRESET] [--flags]

| preset         | what                                                                      |
|----------------|---------------------------------------------------------------------------|
| tffd           | ResNet-18, Tf-FD between neighbouring stages, warm-up and early decay     |
| plain          | the same without Tf-FD                                                    |
| off            | tffd, but the losses fall to zero between 30 % and 60 % of the run        |
| finetune       | from released weights to other classes, with Tf-FD                        |
| finetune-plain | the same without Tf-FD                                                    |

    accelerate launch -q recipes/train_imagenet.py finetune --model resnet50.a1_in1k --pretrained --data FOLDER

Fine-tuning takes the weights of any timm or hf-hub: model, with a new head: AdamW, 20 epochs, the rate falling by a
quarter from each layer group to the one below. --layer-decay 0.1 --layer-decay-min 0.1 gives the whole body a tenth of
the head's rate; --freeze 2 leaves the stem and the first stage as they are.

The setting (Li, ECCV 2022, supplement): 100 epochs, SGD, learning rate 0.1 at a global batch of 256, weight decay 1e-4,
x0.1 at 30, 60 and 90, RandomResizedCrop and flip, label smoothing 0.1. Put 256 / (number of processes) as --batch-size.
To hold against: the author's text of the sibling paper (doi 10.1109/IJCNN55064.2022.9892575) gives 69.75 plain, 70.55
with TFD and 70.66 with label smoothing on top. No run of ours has reached the end of this recipe yet.
"""

from __future__ import annotations

from tffd_zoo.cli import guard
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, recipe_from_cli, vary
from tffd_zoo.tasks import TfFDConfig
from tffd_zoo.training import train

TFFD = Recipe(
    name="imagenet-tffd",
    model="tffd_resnet18",
    data=DataConfig(source="ILSVRC/imagenet-1k", augment="rrc_flip"),
    optim=OptimConfig(
        epochs=100, batch_size=256, lr=0.1, weight_decay=1e-4, milestones=(0.3, 0.6, 0.9), label_smoothing=0.1
    ),
    tffd=TfFDConfig(pairs="neighbours", warmup_fraction=5 / 100, decay="edt"),
)
PLAIN = vary(TFFD, "imagenet-plain", tffd=None)
OFF = vary(TFFD, "imagenet-off", tffd=TfFDConfig(pairs="neighbours", warmup_fraction=5 / 100, decay="off"))
FINETUNE = vary(
    TFFD,
    "finetune",
    model="resnet50.a1_in1k",
    pretrained=True,
    optim={
        "epochs": 20, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.05, "opt": "adamw", "sched": "cosine",
        "lr_warmup_epochs": 1.0, "decay_norm_and_bias": False, "layer_decay": 0.75,
    },
    tffd=TfFDConfig(pairs="neighbours", share_intra=0.05, share_inter=0.05, warmup_fraction=1 / 20),
)  # fmt: skip

FINETUNE_PLAIN = vary(FINETUNE, "finetune-plain", tffd=None)

PRESETS = {"tffd": TFFD, "plain": PLAIN, "off": OFF, "finetune": FINETUNE, "finetune-plain": FINETUNE_PLAIN}

if __name__ == "__main__":
    guard(lambda: train(recipe_from_cli(PRESETS, __doc__)))
