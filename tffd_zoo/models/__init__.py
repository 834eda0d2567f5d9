"""The zoo's architectures and released weights. Importing this package registers them with timm."""

from . import tffd_cifar_resnet, tffd_cifar_vgg, tffd_cifar_wrn, tffd_imagenet
from .manifest import (
    HubFile,
    Metrics,
    PlainTwin,
    Release,
    Training,
    WheelFile,
    add_release,
    known_release,
    plain_twin_name,
    release,
    releases,
)

__all__ = [
    "HubFile",
    "Metrics",
    "PlainTwin",
    "Release",
    "Training",
    "WheelFile",
    "add_release",
    "known_release",
    "plain_twin_name",
    "release",
    "releases",
    "tffd_cifar_resnet",
    "tffd_cifar_vgg",
    "tffd_cifar_wrn",
    "tffd_imagenet",
]
