import torch
from dataclasses import dataclass
from typing import Any
from graphprune.solvers.rank import ranks
@dataclass
class Fit:
    matrix: torch.Tensor; offset: torch.Tensor|None; ridge: float
def coefficients(C: torch.Tensor, kept: torch.Tensor, removed: torch.Tensor, *, mean: torch.Tensor|None=None, ridge: float=1e-4)->Fit:
    if mean is not None: C = C - mean[:,:,None]*mean[:,None,:]
    K=C[:,kept][:,:,kept]; P=C[:,removed][:,:,kept]
    r=ridge*K.diagonal(dim1=1,dim2=2).mean(1)
    K=K+torch.diag_embed((r+1e-12)[:,None].expand(-1,K.shape[1]))
    B=torch.linalg.solve(K,P.transpose(1,2)).transpose(1,2)
    off=None if mean is None else mean[:,removed]-torch.einsum('gpk,gk->gp',B,mean[:,kept])
    return Fit(B,off,ridge)
