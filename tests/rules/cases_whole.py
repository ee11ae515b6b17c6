"""Calls of ops that compare or mix the positions of some dims, and of those of torchvision."""

from __future__ import annotations

import torch

from tests.rules.case import c, ints, signed, t

aten = torch.ops.aten

_DISTANCES = "mse_loss l1_loss smooth_l1_loss huber_loss"
PAIR = [
    c(aten.cosine_similarity.default, signed(2, 3, 5), signed(2, 3, 1), 1, free=3),
    c(aten.cosine_similarity.default, signed(2, 3, 5), signed(3, 5), -1, free=3, note="fewer dims"),
    c(aten.linalg_vecdot.default, signed(2, 3, 5), signed(2, 3, 5), dim=1, free=3),
    c(aten.pairwise_distance.default, signed(2, 3, 5), signed(3, 5), free=2),
    c(aten.pairwise_distance.default, signed(2, 3), signed(2, 3), 2.0, 1e-6, True, free=1, note="kept"),
    c(aten.dist.default, signed(2, 3), t(2, 3), free=2),
    c(aten.dist.default, signed(2, 3), signed(3), free=1, note="broadcast"),
    c(aten.cdist.default, signed(2, 3, 7), signed(2, 5, 7), free=4),
    c(aten.pdist.default, signed(3, 5), free=1),
    c(aten.tensordot.default, signed(2, 3, 5), signed(5, 7, 3), [1, 2], [2, 0], free=4),
    c(aten.inner.default, signed(2, 3, 5), signed(7, 5), free=4),
    c(aten.inner.default, signed(2, 3), torch.tensor(2.0, dtype=torch.float64), free=2, note="number"),
    c(aten.chain_matmul.default, [signed(2, 3), signed(3, 5), signed(5, 7)], free=4),
    c(aten.linalg_multi_dot.default, [signed(3), signed(3, 5), signed(5)], free=2),
    c(aten.kron.default, signed(2, 3), signed(5, 7), free=4),
    c(aten.kron.default, signed(3), signed(5, 7), free=3, note="fewer dims"),
    c(aten.block_diag.default, [signed(2, 3), signed(5), signed(7, 2)], free=5),
]

_SQUARE = torch.eye(5, dtype=torch.float64) + 0.1 * signed(5, 5) @ signed(5, 5).mT
_PROBABLE = torch.full((2, 5), 0.2, dtype=torch.float64)
_ALGEBRA = "inv svd svdvals qr eigh eigvalsh cholesky det slogdet matrix_exp lu_factor"

WHOLE = [
    *(c(getattr(aten, f"linalg_{n}").default, _SQUARE, free=0) for n in _ALGEBRA.split()),
    *(
        c(getattr(aten, n).default, _SQUARE, free=0)
        for n in ["matrix_exp", "inverse", "det", "logdet", "slogdet", "svd", "trace"]
    ),
    c(aten.linalg_pinv.default, _SQUARE, 1e-10, free=0),
    c(aten.linalg_matrix_power.default, _SQUARE, 3, free=0),
    c(aten.matrix_power.default, _SQUARE, 3, free=0),
    c(aten.linalg_householder_product.default, signed(5, 3), signed(3), free=0),
    c(aten.linalg_solve.default, _SQUARE, signed(5, 3), free=0),
    c(aten.linalg_solve_triangular.default, _SQUARE.triu(), signed(5, 3), upper=True, free=0),
    *(
        c(getattr(aten, f"fft_{n}").default, signed(2, 3, 4), free=2)
        for n in ["fft", "ifft", "rfft", "irfft", "hfft", "ihfft"]
    ),
    *(c(getattr(aten, f"fft_{n}").default, signed(2, 4, 6), free=1) for n in ["fft2", "ifft2", "rfft2", "irfft2"]),
    *(c(getattr(aten, f"fft_{n}").default, signed(2, 4, 6), free=1) for n in ["hfft2", "ihfft2"]),
    *(
        c(getattr(aten, f"fft_{n}").default, signed(2, 4, 6), dim=[1], free=2)
        for n in ["fftn", "ifftn", "rfftn", "irfftn"]
    ),
    *(c(getattr(aten, f"fft_{n}").default, signed(2, 4, 6), [1], free=2) for n in ["fftshift", "ifftshift"]),
    c(aten.fft_rfftn.default, signed(2, 4, 6), [4, 6], free=1, note="sizes"),
    c(aten.fft_fftn.default, signed(2, 3), free=0, note="all"),
    c(aten.stft.default, signed(2, 16), 5, 3, None, torch.ones(5, dtype=torch.float64), return_complex=True, free=1),
    c(aten.istft.default, torch.complex(t(2, 3, 7), signed(2, 3, 7)), 4, free=1),
    c(aten.diff.default, signed(2, 3, 5), 1, 1, free=2),
    c(aten.diff.default, signed(2, 3), 1, 1, signed(2, 1), free=0, note="prepended"),
    c(aten.trapz.dx, signed(2, 3, 5), dim=1, free=2),
    c(aten.trapezoid.dx, signed(2, 3, 5), dim=1, free=2),
    c(aten.cumulative_trapezoid.dx, signed(2, 3, 5), dim=1, free=2),
    c(aten.gradient.scalarint, signed(2, 3), dim=1, free=0),
    c(aten.rot90.default, signed(2, 3, 5), 1, [0, 2], free=1),
    c(aten.rot90.default, signed(2, 3, 5), 2, [0, -1], free=1, note="half"),
    c(aten.cross.default, signed(2, 3, 5), signed(2, 3, 5), free=2),
    c(aten.linalg_cross.default, signed(2, 5, 3), signed(1, 5, 3), free=2),
    *(c(getattr(aten, n).default, signed(2, 3), signed(2, 3), 0, free=2, note="each") for n in _DISTANCES.split()),
    *(c(getattr(aten, n).default, signed(2, 3), signed(2, 3), 1, free=0, note="mean") for n in _DISTANCES.split()),
    *(c(getattr(aten, n).default, signed(2, 3), signed(2, 3), 2, free=2, note="sum") for n in _DISTANCES.split()),
    c(aten.cross_entropy_loss.default, signed(2, 5), ints(5, 2), free=0),
    c(aten.nll_loss.default, signed(2, 5), ints(5, 2), free=0),
    c(aten.nll_loss_nd.default, signed(2, 5, 3), ints(5, 2, 3), free=0),
    *(c(getattr(aten, n).default, t(2, 5), _PROBABLE, free=0) for n in ["kl_div", "binary_cross_entropy"]),
    c(aten.binary_cross_entropy_with_logits.default, t(2, 5), _PROBABLE, free=0),
    c(aten.ctc_loss.IntList, signed(7, 2, 5), ints(4, 2, 3) + 1, [7, 7], [3, 2], free=0),
    c(aten.cosine_embedding_loss.default, signed(2, 5), t(2, 5), torch.ones(2), free=0),
    c(aten.margin_ranking_loss.default, signed(5), t(5), torch.ones(5), free=0),
    *(
        c(getattr(aten, n).default, t(2, 5), torch.ones(2, 5), free=0)
        for n in ["hinge_embedding_loss", "soft_margin_loss"]
    ),
    c(aten.triplet_margin_loss.default, signed(2, 5), t(2, 5), t(2, 5, seed=3), free=0),
    c(aten.multi_margin_loss.default, signed(2, 5), ints(5, 2), free=0),
    c(aten.multilabel_margin_loss.default, signed(2, 5), ints(5, 2, 5), free=0),
    c(aten.poisson_nll_loss.default, t(2, 5), t(2, 5, seed=3), True, False, 1e-8, 1, free=0),
    c(aten.histc.default, t(2, 3), 5, free=0),
    c(aten.bincount.default, ints(5, 7), free=0),
    *(c(getattr(aten, n).default, t(2, 3) - 0.5, free=0) for n in ["nonzero", "argwhere"]),
    c(aten.masked_select.default, t(2, 3), t(2, 3) > 0.5, free=0),
    c(aten._unique2.default, ints(5, 7), free=0),
    c(aten.unique_consecutive.default, ints(5, 7), free=0),
    c(aten.take.default, t(2, 3), ints(6, 5), free=0),
    c(aten.put.default, t(2, 3), torch.tensor([1, 4]), t(2), free=0),
    c(aten.resize_as.default, t(2, 3), t(3, 5), free=0),
    c(aten.as_strided.default, t(2, 3), [2, 2], [1, 1], free=0),
    c(aten.cartesian_prod.default, [t(2), t(3)], free=0),
    c(aten.combinations.default, t(3), free=0),
    *(c(getattr(aten, n).default, t(3, 5), free=0) for n in ["cov", "corrcoef"]),
    c(aten.vander.default, t(3), free=0),
    c(aten.affine_grid_generator.default, t(2, 2, 3), [2, 3, 4, 5], False, free=0),
]

vision = torch.ops.torchvision
_BOXES = torch.tensor([[0, 0.5, 0.5, 3, 4], [1, 1, 0, 5, 3.5], [1, 0, 0, 2, 2]], dtype=torch.float64)

VISION = [
    c(vision.nms.default, _BOXES[:, 1:], t(3), 0.5, free=0),
    c(vision.roi_align.default, signed(2, 5, 7, 6), _BOXES, 1.0, 3, 2, 2, False, free=1),
    c(
        vision.deform_conv2d.default,
        *(signed(2, 3, 7, 6), signed(5, 3, 2, 3), signed(2, 12, 4, 3), t(2, 1), signed(5)),
        *(1, 1, 0, 0, 1, 1, 1, 1, False),
        free=3,
    ),
    c(
        vision.deform_conv2d.default,
        *(signed(2, 12, 7, 6), signed(10, 6, 2, 3), signed(2, 48, 6, 3), t(2, 24, 6, 3), signed(10)),
        *(1, 2, 0, 1, 1, 1, 2, 4, True),
        free=3,
        note="grouped",
    ),
]
