"""The two operands, GroupedMXFP8, tokens sorted by expert, and ExpertWeights; and MXFP8Tokens, from
before they are sorted.

Operands' ``scales`` are always swizzled. Row-major scale tensors enter through
``from_linear_scales`` of either; those of MXFP8Tokens stay row-major.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hybrid_mxfp8.core import checks
from hybrid_mxfp8.core.formats import BLOCK_SIZE, padded_scale_rows, scale_cols
from hybrid_mxfp8.core.layout import GroupLayout
from hybrid_mxfp8.core.metrics import decibels
from hybrid_mxfp8.core.scales import (
    at_most_one,
    dequantize,
    dequantize_experts,
    dequantize_grouped,
    find_scale_group,
    regroup,
    swizzle_grouped_scales,
    swizzle_scales,
    unswizzle_grouped_scales,
    unswizzle_scales,
)


class _Operand(checks.Checked):
    """Pickled by bytes: PyTorch pickles a float8 tensor, and fails to load it (<= 2.13)."""

    values: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.values.device

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "values": vars(self)["values"].view(torch.uint8)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, values=state["values"].view(torch.float8_e4m3fn))


def _check_linear(values: torch.Tensor, scales: torch.Tensor, rows: str, device: torch.device | None = None) -> None:
    """Elements (``rows``, K) and row-major scales (``rows``, K/32), each as such or as bytes."""
    dims, ndim = f"({rows}, K/{BLOCK_SIZE})", rows.count(",") + 2
    dtypes = (torch.float8_e4m3fn, torch.uint8)
    checks.check_tensor("values", values, dtypes=dtypes, ndim=ndim, dims=f"({rows}, K)", device=device)
    dtypes = (torch.uint8, torch.float8_e8m0fnu)
    checks.check_tensor("scales", scales, dtypes=dtypes, ndim=ndim, dims=dims, device=values.device)
    checks.check_no_grad("values", values)
    checks.check_k("values", values.shape[-1])
    checks.check_shape("scales", scales, (*values.shape[:-1], values.shape[-1] // BLOCK_SIZE), dims)


@dataclass(frozen=True, eq=False)
class MXFP8Tokens(_Operand):
    """Token rows in MXFP8, in the order of the batch: what ``moe_forward`` takes in place of x.

    Attributes:
        values: (M, H) float8_e4m3fn, H % 32 == 0, any row stride, unit column stride.
        scales: (M, H/32) uint8, E8M0, row-major and not swizzled, any row stride, unit column
            stride.
        dtype: what the tokens were: bf16, fp16 or fp32. The layer's result and its rows between the
            products have it.
        scale_group: 32 or 128, as of :class:`GroupedMXFP8`.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape, stride or device, or one that
            requires grad.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype = torch.bfloat16
    scale_group: int = BLOCK_SIZE

    def __repr__(self) -> str:
        shape = f"num_tokens={self.shape[0]}, hidden={self.shape[1]}, scale_group={self.scale_group}"
        return f"MXFP8Tokens({shape}, dtype={checks.short(self.dtype)}, device={str(self.device)!r})"

    def __post_init__(self) -> None:
        checks.check_tensor("values", self.values, dtypes=(torch.float8_e4m3fn,), ndim=2, dims="(M, H)")
        num_tokens, hidden = self.values.shape
        checks.check_k("values", hidden)
        checks.check_no_grad("values", self.values)
        checks.check_tensor(
            "scales", self.scales, dtypes=(torch.uint8,), ndim=2, dims="(M, H/32)", device=self.values.device
        )
        checks.check_shape("scales", self.scales, (num_tokens, hidden // BLOCK_SIZE), "(M, H/32)")
        for name, tensor in (("values", self.values), ("scales", self.scales)):
            checks.check_unit_stride(name, tensor)
        checks.check_float_dtype("dtype", self.dtype)
        checks.check_scale_group(self.scale_group)

    @property
    def shape(self) -> torch.Size:
        """(M, H)."""
        return self.values.shape

    def dequantize(self) -> torch.Tensor:
        """(M, H) fp32, exact."""
        return dequantize(self.values, self.scales)


@dataclass(frozen=True, eq=False)
class GroupedMXFP8(_Operand):
    """Token rows in MXFP8, sorted by expert.

    Attributes:
        values: (T, K) float8_e4m3fn, contiguous, K % 32 == 0.
        scales: (S, C) uint8, E8M0 in 128x4 tiles, each expert from a new tile row; S =
            groups.scale_rows, C = roundup(K/32, 4). Columns from K/32 on must hold zeros; padding
            rows may hold anything.
        groups: the layout; rows beyond its last expert hold nothing.
        scale_group: 32, or 128 where four neighbouring blocks of a row have equal scales. The
            scales are not looked at: a kernel may read one of the four.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device, not contiguous, or one
            that requires grad.
    """

    values: torch.Tensor
    scales: torch.Tensor
    groups: GroupLayout
    scale_group: int = BLOCK_SIZE

    def __repr__(self) -> str:
        shape = f"num_tokens={self.groups.num_tokens}, k={self.k}, num_experts={self.groups.num_experts}"
        return f"GroupedMXFP8({shape}, scale_group={self.scale_group}, device={str(self.device)!r})"

    def __post_init__(self) -> None:
        if not isinstance(self.groups, GroupLayout):
            raise TypeError(f"groups: must be a GroupLayout, got {type(self.groups).__name__}")
        checks.check_tensor(
            "values", self.values, dtypes=(torch.float8_e4m3fn,), ndim=2, dims="(T, K)", device=self.groups.device
        )
        num_tokens, k = self.values.shape
        if num_tokens != self.groups.num_tokens:
            checks.fail("values", f"must have T = groups.num_tokens = {self.groups.num_tokens} rows", num_tokens)
        checks.check_k("values", k)
        checks.check_contiguous("values", self.values)
        checks.check_no_grad("values", self.values)
        checks.check_tensor(
            "scales", self.scales, dtypes=(torch.uint8,), ndim=2, dims="(S, C)", device=self.values.device
        )
        checks.check_shape("scales", self.scales, (self.groups.scale_rows, scale_cols(k)), "(S, C)")
        checks.check_contiguous("scales", self.scales)
        checks.check_scale_group(self.scale_group)

    @property
    def k(self) -> int:
        """K."""
        return self.values.shape[1]

    def dequantize(self) -> torch.Tensor:
        """(T, K) fp32, exact; rows that no expert owns are zero."""
        return dequantize_grouped(self.values, self.scales, self.groups.expert_offsets, self.groups.scale_offsets)

    def linear_scales(self) -> torch.Tensor:
        """The scales row-major, (T, K/32) uint8; 0 in rows that no expert owns."""
        g = self.groups
        cols = self.k // BLOCK_SIZE
        return unswizzle_grouped_scales(self.scales, g.expert_offsets, g.scale_offsets, g.num_tokens, cols)

    @classmethod
    def from_linear_scales(
        cls, values: torch.Tensor, scales: torch.Tensor, groups: GroupLayout, *, scale_group: int = BLOCK_SIZE
    ) -> GroupedMXFP8:
        """Tokens that arrive quantized, from another rank or another kernel, with row-major scales.

        Some dozen launches of PyTorch's, no sync; the values are not copied.

        Args:
            values: (T, K) float8_e4m3fn, or its bytes as uint8; sorted by expert, K % 32 == 0.
            scales: (T, K/32) float8_e8m0fnu, or its bytes as uint8; row-major, not swizzled.
            groups: the layout of the T rows, on the same device.
            scale_group: of the scales, as for the class; it is not looked up, which would sync.

        Raises:
            TypeError, ValueError: a tensor of another dtype, shape or device, or one that requires
                grad; no layout; no such group.
        """
        if not isinstance(groups, GroupLayout):
            raise TypeError(f"groups: must be a GroupLayout, got {type(groups).__name__}")
        values, scales = checks.wait_for(values, scales)
        _check_linear(values, scales, "T", groups.device)
        swizzled = swizzle_grouped_scales(
            scales.view(torch.uint8), groups.expert_offsets, groups.scale_offsets, groups.scale_rows
        )
        return cls(values.contiguous().view(torch.float8_e4m3fn), swizzled, groups, scale_group)


def check_weights(values: torch.Tensor, scales: torch.Tensor, owner: str = "") -> None:
    """The tensors of an :class:`ExpertWeights`, called ``owner`` + ``values`` and ``scales``."""
    name, scales_name, dims = f"{owner}values", f"{owner}scales", "(E, roundup(N, 128), C)"
    checks.check_tensor(name, values, dtypes=(torch.float8_e4m3fn,), ndim=3, dims="(E, N, K)")
    num_experts, n, k = values.shape
    checks.check_k(name, k)
    checks.check_contiguous(name, values)
    checks.check_no_grad(name, values)
    checks.check_tensor(scales_name, scales, dtypes=(torch.uint8,), ndim=3, dims=dims, device=values.device)
    checks.check_shape(scales_name, scales, (num_experts, padded_scale_rows(n), scale_cols(k)), dims)
    checks.check_contiguous(scales_name, scales)


@dataclass(frozen=True, eq=False)
class ExpertWeights(_Operand):
    """The experts' weight matrices in MXFP8.

    Attributes:
        values: (E, N, K) float8_e4m3fn, contiguous, K % 32 == 0.
        scales: (E, roundup(N, 128), C) uint8, E8M0 in 128x4 tiles, C = roundup(K/32, 4). Columns
            from K/32 on must hold zeros; padding rows may hold anything.
        scale_group: 32 or 128, as of :class:`GroupedMXFP8`.
        squares: whether moreover the 128 rows from row 0, 128, 256, ... of an expert have equal
            scales, none above 1; only with groups of 128. Not looked at either.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device, not contiguous, or one
            that requires grad.
    """

    values: torch.Tensor
    scales: torch.Tensor
    scale_group: int = BLOCK_SIZE
    squares: bool = False

    def __repr__(self) -> str:
        shape = f"num_experts={self.num_experts}, n={self.n}, k={self.k}"
        squares = ", squares=True" if self.squares else ""
        return f"ExpertWeights({shape}, scale_group={self.scale_group}{squares}, device={str(self.device)!r})"

    def __post_init__(self) -> None:
        check_weights(self.values, self.scales)
        checks.check_scale_group(self.scale_group, self.squares)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.values.shape[0]

    @property
    def n(self) -> int:
        """N."""
        return self.values.shape[1]

    @property
    def k(self) -> int:
        """K."""
        return self.values.shape[2]

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same weights on a device; these tensors where they are there already.

        Raises:
            ValueError: no such device; a dtype is none, and would turn bytes into numbers.
        """
        device = checks.resolve_device(device)
        return ExpertWeights.unchecked(self.values.to(device), self.scales.to(device), self.scale_group, self.squares)

    def regrouped(self, scale_group: int, *, squares: bool = False) -> tuple[ExpertWeights, float]:
        """The weights with one scale a group, the largest of its blocks', and the signal-to-noise
        ratio of that in dB: inf where no value changed. Syncs.

        With ``squares`` the groups of 128 rows share their largest scale, too, as in FP8 with a
        scale for 128x128: Hopper's fastest kernel wants that. The result's ``squares`` stays False
        if a scale is above 1, as no trained network's is.

        Elements under a smaller scale than their group's are rounded once where they leave e4m3's
        range downwards. Values that are NaN before or after don't count for the ratio: a block of
        scale 255 makes its group NaN, which a product of the row is anyway. One expert at a time,
        in float64. Weights that have the group already keep their tensors, as do those that get
        groups of 32.

        Raises:
            TypeError: ``squares`` is no bool.
            ValueError: ``scale_group`` is neither 32 nor 128, squares of 32 are asked for, or
                weights on meta or fake.
        """
        checks.check_scale_group(scale_group, squares)
        if scale_group <= self.scale_group and squares <= self.squares:
            return ExpertWeights.unchecked(self.values, self.scales, scale_group, squares), math.inf
        if self.values.is_meta or isinstance(self.values, FakeTensor):
            checks.fail("values", "must have data", "tensors on meta" if self.values.is_meta else "fake tensors")
        new = self.regroup_into(torch.empty_like(self.values), torch.empty_like(self.scales), scale_group, squares)
        power = noise = 0.0
        for e, (linear, new_linear) in enumerate(zip(self.linear_scales(), new.linear_scales(), strict=True)):
            before = dequantize(self.values[e], linear, torch.float64)
            change = dequantize(new.values[e], new_linear, torch.float64).sub_(before)
            power += float(before.masked_fill_(change.isnan(), 0).square_().sum())
            noise += float(change.square_().nansum())
        return new, decibels(power, noise)

    def regroup_into(
        self, values: torch.Tensor, scales: torch.Tensor, scale_group: int, squares: bool
    ) -> ExpertWeights:
        """``regrouped`` without its dB, into other tensors or its own; one expert at a time."""
        for e, linear in enumerate(self.linear_scales()):
            new_values, new_linear = regroup(self.values[e], linear, scale_group, squares)
            values[e].view(torch.uint8).copy_(new_values.view(torch.uint8))
            scales[e] = swizzle_scales(new_linear)
        return ExpertWeights.unchecked(values, scales, scale_group, squares and at_most_one(scales))

    def dequantize(self) -> torch.Tensor:
        """(E, N, K) fp32, exact."""
        return dequantize_experts(self.values, self.scales)

    def linear_scales(self) -> torch.Tensor:
        """The scales row-major, (E, N, K/32) uint8: what a checkpoint holds."""
        return unswizzle_scales(self.scales, self.n, self.k // BLOCK_SIZE)

    @classmethod
    def from_linear_scales(cls, values: torch.Tensor, scales: torch.Tensor) -> ExpertWeights:
        """Weights from a checkpoint's row-major scales. They are looked at once, which syncs: where
        all have groups of 128, or squares, the result says so.

        Args:
            values: (E, N, K) float8_e4m3fn, or its bytes as uint8.
            scales: (E, N, K/32) float8_e8m0fnu, or its bytes as uint8; row-major, not swizzled.

        Raises:
            TypeError, ValueError: a tensor of another dtype, shape or device, or one that requires
                grad.
        """
        values, scales = checks.wait_for(values, scales)
        _check_linear(values, scales, "E, N")
        found = find_scale_group(scales.view(torch.uint8))
        return cls(values.contiguous().view(torch.float8_e4m3fn), swizzle_scales(scales), *found)
