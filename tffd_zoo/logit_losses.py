"""Losses between logits: how far one classifier's view of an image is from another's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["kl", "standardise"]


def kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), the mean over the batch, in float32.

    The factor T^2 keeps the gradient's size when T changes. Gradients flow into both arguments: detach the teacher's.

    Args:
        student: (N, classes) logits z_s.
        teacher: (N, classes) logits z_t.
        temperature: T.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"kl compares logits of the same images over the same classes and got shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; choose a teacher with the student's classes"
        )
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def standardise(logits: Tensor) -> Tensor:
    """(z - mean z) / std z over the classes of each image: the student need not copy the teacher's scale.

    The standard deviation is the sample's (n - 1), as in the paper's code.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024 (arXiv 2403.01427).
    """
    logits = logits.float()
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (logits.std(dim=1, keepdim=True) + 1e-7)
