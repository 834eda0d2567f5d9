"""The zoo's architectures. Importing this package registers them with timm."""

from . import tffd_cifar_resnet

__all__ = ["tffd_cifar_resnet"]
