"""The distillation loss against a plain loop and against RepAn's own numbers."""

import math

import pytest
import torch
from test_vectors import SHARED

from replib.methods.distill import distillation_loss


def looped(z, t, y, alpha, temperature):
    """The same from its definition, one sample and one class at a time."""
    total = 0.0
    for logits, taught, label in zip(z.tolist(), t.tolist(), y.tolist(), strict=True):

        def softmax(values, temperature):
            powers = [math.exp(v / temperature) for v in values]
            return [p / sum(powers) for p in powers]

        p, q = softmax(taught, temperature), softmax(logits, temperature)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        hard = -math.log(softmax(logits, 1)[label])
        total += alpha * temperature**2 * divergence + (1 - alpha) * hard
    return total / len(z)


@pytest.mark.parametrize("alpha, temperature", [(0.9, 10.0), (0.5, 4.0), (0.0, 1.0), (1.0, 2.0)])
def test_equals_a_plain_loop(alpha, temperature):
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    got = distillation_loss(z, t, y, alpha=alpha, temperature=temperature)
    assert got.item() == pytest.approx(looped(z, t, y, alpha, temperature), abs=1e-12)


@pytest.mark.parametrize("name, alpha, temperature", [
    ("kd_a0.9_T10", 0.9, 10.0), ("kd_a0.5_T4", 0.5, 4.0), ("kd_a0.1_T1", 0.1, 1.0),
])  # fmt: skip
def test_equals_repan(name, alpha, temperature):
    path = SHARED / "spec/fixtures/repan.pt"
    if not path.is_file():
        pytest.skip(f"{path} is not here: RepAn's numbers are data outside the repository")
    entry = torch.load(path, weights_only=True)[name]
    z, taught = entry["z"].double().requires_grad_(), entry["t"].double()
    loss = distillation_loss(z, taught, entry["y"], alpha=alpha, temperature=temperature)
    loss.backward()
    # Theirs is in float32: a divergence near 0 whose rounding is multiplied by T^2 = 100.
    torch.testing.assert_close(loss.item(), float(entry["loss"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.grad.float(), entry["grad"], rtol=1e-5, atol=2e-6)
