"""Knowledge distillation as RepAn uses it (Hinton et al., 2015, section 2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

VERSION = 1


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """alpha T^2 KL(softmax(t/T) || softmax(z/T)) + (1 - alpha) CE(z, y); logits (N, classes).

    alpha weighs the teacher. KL is summed over classes and averaged over the batch.
    """
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(logits, labels)
    return alpha * temperature**2 * divergence + (1 - alpha) * hard
