"""The operations between a decoder's matrix products, in torch's own operations.

kernels.py calls them where its compiled C does not run: in float64, without a C compiler, on a GPU.
On a GPU torch.compile makes one kernel of each (fused.py); so nothing here reads a value back, and
no shape depends on values.

Wide numbers are float32; float64 where the matrices are. Axis suffixes: T rows (tokens), D model
width, I inner width, N heads, W width of a head, F half of it, V vocabulary, L rows with loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums and residuals beside matrices of this type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_forward(
    x_TD: Tensor, change_TD: Tensor | None, weight_D: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x + change, or x itself; its norm times the weight in the given type; scale_T)."""
    if change_TD is not None:
        x_TD = x_TD + change_TD.to(x_TD.dtype)
    scale_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + epsilon)
    return x_TD, (x_TD * scale_T1 * weight_D).to(dtype), scale_T1[:, 0]


def norm_backward(
    dnormed_TD: Tensor, x_TD: Tensor, weight_D: Tensor, scale_T: Tensor, dx_TD: Tensor
) -> Tensor:
    """Add the gradient through a norm to `dx_TD`, in place; return that in the matrices' type."""
    scale_T1 = scale_T[:, None]
    scaled_TD, unit_TD = dnormed_TD.to(x_TD.dtype) * weight_D, x_TD * scale_T1
    along_T1 = (scaled_TD * unit_TD).mean(-1, keepdim=True)
    dx_TD += scale_T1 * (scaled_TD - unit_TD * along_T1)
    return dx_TD.to(dnormed_TD.dtype)


def gated_forward(gate_up_TI: Tensor) -> Tensor:
    """Return silu(gate) * up; the argument's rows hold gate, then up."""
    gate, up = gate_up_TI.to(wide(gate_up_TI.dtype)).chunk(2, dim=1)
    gated: Tensor = gate * torch.sigmoid(gate) * up
    return gated.to(gate_up_TI.dtype)


def gated_backward(dout_TI: Tensor, gate_up_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the gradient of `gate_up_TI`, what `gated_forward` gave)."""
    dtype = gate_up_TI.dtype
    gate, up = gate_up_TI.to(wide(dtype)).chunk(2, dim=1)
    d, s = dout_TI.to(gate.dtype), torch.sigmoid(gate)
    silu = gate * s
    dgate_up = torch.cat([d * up * (s + silu * (1 - s)), d * silu], dim=1)
    return dgate_up.to(dtype), (silu * up).to(dtype)


def rotate(x_TNW: Tensor, cosines_TF: Tensor, sines_TF: Tensor) -> Tensor:
    """Rotate heads by their rows' angles; returns wide numbers. Negative sines turn them back."""
    low, high = x_TNW.to(cosines_TF.dtype).chunk(2, dim=-1)
    cosine, sine = cosines_TF[:, None], sines_TF[:, None]
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)


def rotate_rows(rows_TNW: Tensor, cosines_TF: Tensor, sines_TF: Tensor, rotated: int) -> Tensor:
    """Return rows whose first `rotated` heads (queries and keys) are rotated, the others as are."""
    turned = rotate(rows_TNW[:, :rotated], cosines_TF, sines_TF).to(rows_TNW.dtype)
    return torch.cat([turned, rows_TNW[:, rotated:]], dim=1)


def merge_rows(
    dquery_TNW: Tensor, dkey_TNW: Tensor, dvalue_TNW: Tensor, cosines_TF: Tensor, sines_TF: Tensor
) -> Tensor:
    """Return the gradient of rows of queries, keys and values, (T, all heads * W), from that of
    the rotated ones."""
    heads = torch.cat([dquery_TNW, dkey_TNW], dim=1)
    turned = rotate(heads, cosines_TF, -sines_TF).to(dquery_TNW.dtype)
    return torch.cat([turned, dvalue_TNW], dim=1).flatten(1)


def cross_entropy(logits_LV: Tensor, labels_L: Tensor, scale: Tensor | float) -> Tensor:
    """Return each row's loss; the logits become the gradient of scale * the sum of the losses."""
    wide_LV = logits_LV.to(wide(logits_LV.dtype))
    normalizer_L1 = torch.logsumexp(wide_LV, dim=-1, keepdim=True)
    losses_L = (normalizer_L1 - wide_LV.gather(1, labels_L[:, None]))[:, 0]
    gradient_LV = (wide_LV - normalizer_L1).exp_().mul_(scale)
    gradient_LV[torch.arange(len(labels_L), device=labels_L.device), labels_L] -= scale
    logits_LV.copy_(gradient_LV)
    return losses_L


def cross_entropy_in_one(logits_LV: Tensor, labels_L: Tensor, scale: Tensor) -> Tensor:
    """Do what `cross_entropy` does, so that it can be one kernel: nothing is written to chosen
    places. Uncompiled it takes more memory."""
    wide_LV = logits_LV.to(wide(logits_LV.dtype))
    normalizer_L1 = torch.logsumexp(wide_LV, dim=-1, keepdim=True)
    losses_L = (normalizer_L1 - wide_LV.gather(1, labels_L[:, None]))[:, 0]
    words_V = torch.arange(logits_LV.shape[1], device=logits_LV.device)
    hit_LV = (words_V == labels_L[:, None]).to(wide_LV.dtype)
    logits_LV.copy_(((wide_LV - normalizer_L1).exp() - hit_LV) * scale)
    return losses_L


def losses_only(logits_LV: Tensor, labels_L: Tensor) -> Tensor:
    """Return each row's loss, wide numbers."""
    wide_LV = logits_LV.to(wide(logits_LV.dtype))
    normalizer_L = torch.logsumexp(wide_LV, dim=-1)
    return normalizer_L - wide_LV.gather(1, labels_L[:, None])[:, 0]
