"""Knowledge distillation as RepAn uses it (Hinton et al., 2015, section 2).

In your own loop, with any teacher in eval mode:

    with torch.no_grad():
        taught = teacher(images)
    loss = distillation_loss(model(images), taught, labels, alpha=0.9, temperature=10)

`replib.training.known_logits` computes `taught` once for all epochs where images are not changed
at random; `replib.experiments.teachers` says which teachers a table can name.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

VERSION = 1


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """alpha T^2 KL(softmax(t/T) || softmax(z/T)) + (1 - alpha) CE(z, y); logits (N, classes).

    labels: classes (N,), or probabilities (N, classes) where labels are smoothed or mixed. alpha
    weighs the teacher. KL is summed over classes and averaged over the batch, natural logarithm.
    T^2 keeps the size of its gradient; with T = 10 and alpha = 0.9 its loss counts 90 times.
    """
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(logits, labels)
    return alpha * temperature**2 * divergence + (1 - alpha) * hard
