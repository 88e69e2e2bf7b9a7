"""Network definitions."""

from logshift.trainer.models.resnet_cifar import ResNetCifar, resnet20

__all__ = ["ResNetCifar", "resnet20"]
