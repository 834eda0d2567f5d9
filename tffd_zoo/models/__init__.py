"""The zoo's architectures. Importing this package registers them with timm."""

from . import tffd_cifar_resnet, tffd_cifar_vgg, tffd_cifar_wrn

__all__ = ["tffd_cifar_resnet", "tffd_cifar_vgg", "tffd_cifar_wrn"]
