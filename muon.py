"""Muon (Jordan et al., 2024), the optimizer of the drawn world: momentum, made orthogonal matrix by matrix.

The gradients of a weight matrix lie mostly along a few directions, and so do Adam's steps. Muon takes the momentum
M = U S V' and steps by U V': equally far along all. The drawn world's VAE then needs less than half of AdamW's steps.
Paper silent: the 5B model trains with AdamW, as CogVideoX did.
"""

from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from machine import pick_device

ITERATIONS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # of Jordan's quintic: steep at 0, so singular values come to 0.7-1.2 in 5 rounds


def is_matrix(p: Tensor) -> bool:
    """Weights with at least 16 rows and columns, a convolution's being its kernels flattened; the rest is AdamW's."""
    return p.ndim >= 2 and min(p.shape[0], p.shape[1:].numel()) >= 16


@cache  # asked for every shape of every step
def fast_format(device: torch.device) -> torch.dtype:
    return pick_device(device)[1]


def orthogonal(m: Tensor) -> Tensor:
    """About U V' of each m = U S V' of (n, rows, columns), by Newton-Schulz iterations.

    bfloat16 suffices where it is fast (a CPU without instructions for it takes a hundred times as long); float64 stays.
    """
    x = m if m.dtype == torch.float64 else m.to(fast_format(m.device))
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if m.shape[1] > m.shape[2] else x  # the smaller product
    for _ in range(ITERATIONS):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=B, alpha=C), x, beta=A)  # A x + (B s + C s s) x
    return (x.mT if m.shape[1] > m.shape[2] else x).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """For matrices. A step has AdamW's usual length (root mean square 0.2 lr), so AdamW's rates are near right.

    Matrices of one shape are made orthogonal together, which halves the time on a CPU. Of a sharded matrix every rank
    gathers the momentum and computes the whole step.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, grads)
            ahead = torch._foreach_add(grads, momenta, alpha=group["momentum"])  # Nesterov's
            alike, updates = {}, {}
            for p, m in zip(params, ahead):
                m = m.full_tensor() if isinstance(p, DTensor) else m
                alike.setdefault(m.flatten(1).shape, []).append((p, m.flatten(1)))
            for shape, pairs in alike.items():
                # an orthogonal matrix has entries of root mean square 1 / sqrt(max(shape))
                found = 0.2 * max(shape) ** 0.5 * orthogonal(torch.stack([m for _, m in pairs]))
                for (p, _), update in zip(pairs, found):
                    update = update.view(p.shape)
                    if isinstance(p, DTensor):
                        update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                    updates[p] = update
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(params, [updates[p] for p in params], alpha=group["lr"])
