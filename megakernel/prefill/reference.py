"""How a chunk's tokens are routed and where their rows go, in plain PyTorch: what the kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def route(scores: Tensor, chosen: int, renormalised: bool) -> tuple[Tensor, Tensor]:
    """Experts int64 [tokens, chosen], the best score first, of equal ones the lower number, and their shares of the softmax, as
    `scores` [tokens, experts]; over all experts, or where they are `renormalised` over the chosen ones."""
    experts = scores.sort(dim=1, descending=True, stable=True).indices[:, :chosen]
    mass = torch.exp(scores - scores.amax(1, keepdim=True))
    found = mass.gather(1, experts)
    return experts, found / (found if renormalised else mass).sum(1, keepdim=True)


def permute(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """places int64 [tokens, chosen], the row of each of a token's slots among all rows sorted by expert, those of one expert in
    the order of the tokens; ends int64 [count], where the rows of each of `count` experts end."""
    order = experts.flatten().argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return places.view_as(experts), torch.bincount(experts.flatten(), minlength=count).cumsum(0)
