"""Muon for matrices and convolutions, AdamW for everything else, behind one optimizer.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a
weight matrix by its nearest semi-orthogonal matrix, found by a Newton-Schulz iteration. On the small
models trained here it needs about half of AdamW's steps.
"""

from __future__ import annotations

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients, from the post named above


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrix [R,C] of a matrix [R,C], to within the iteration's loose tolerance.

    Every iterate is a polynomial of the Gram matrix times the start, so the iteration runs on the small
    Gram matrix alone and the long side is touched twice, not twice a step.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    gram, total = x @ x.mT, torch.eye(len(x), device=x.device, dtype=x.dtype)
    for _ in range(steps):
        factor = a * torch.eye(len(x), device=x.device, dtype=x.dtype) + b * gram + c * gram @ gram
        total, gram = factor @ total, factor @ gram @ factor
    x = total @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon on parameters with two or more dimensions that `matrices` names; AdamW on the rest.

    Args:
        module: the module to train; its input and output layers and embeddings stay with AdamW.
        lr: AdamW's learning rate; Muon's is `muon_lr`.
        muon_lr: step size in units of the root mean square of an orthogonal update.
        weight_decay: decoupled, for matrices only.
    """

    def __init__(self, module: torch.nn.Module, lr: float, muon_lr: float, weight_decay: float = 0.0):
        is_matrix = lambda name, p: p.ndim >= 2 and min(p.shape[:2]) >= 16 and "embedding" not in name
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        groups = [
            dict(params=[p for n, p in named if is_matrix(n, p)], muon=True, lr=muon_lr, peak=muon_lr),
            dict(params=[p for n, p in named if not is_matrix(n, p)], muon=False, lr=lr, peak=lr),
        ]
        super().__init__(groups, dict(weight_decay=weight_decay, momentum=0.95, betas=(0.9, 0.99), eps=1e-8))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for p in group["params"]:
                if p.grad is not None:
                    update(p, self.state[p], group)

    def _muon(self, p, state, group):
        buffer = state.setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - group["momentum"])
        matrix = p.grad.lerp(buffer, group["momentum"]).flatten(1)
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(orthogonalise(matrix).view_as(p), alpha=-group["lr"] * scale)

    def _adam(self, p, state, group):
        beta1, beta2 = group["betas"]
        mean, square = state.setdefault("mean", torch.zeros_like(p)), state.setdefault("square", torch.zeros_like(p))
        state["step"] = state.get("step", 0) + 1
        mean.lerp_(p.grad, 1 - beta1)
        square.lerp_(p.grad.square(), 1 - beta2)
        denom = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        p.addcdiv_(mean, denom, value=-group["lr"] / (1 - beta1 ** state["step"]))
