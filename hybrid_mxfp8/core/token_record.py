"""A token's bytes on the way to the ranks of its experts: one row, so that one collective moves all
tokens, and kernels read them as they arrive.

    | H elements, e4m3 | H/32 scales | top_k ids, int32 | top_k weights, fp32 |   to 16 bytes
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hybrid_mxfp8.core.formats import BLOCK_SIZE, round_up


class TokenRecord(NamedTuple):
    """The layout of one token's bytes; ``top_k`` is 0 for a token without choices."""

    hidden: int
    top_k: int = 0

    @property
    def ids_at(self) -> int:
        """The first byte of the ids, which are followed by the weights."""
        return round_up(self.hidden + self.hidden // BLOCK_SIZE, 4)

    @property
    def size(self) -> int:
        """Bytes; a multiple of 16, so that every token's elements can be read 16 bytes at once."""
        return round_up(self.ids_at + 8 * self.top_k, 16)

    def split(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Elements (M, H), scales (M, H/32), ids (M, top_k) int32 and weights (M, top_k) fp32 of
        records (M, size) uint8, as views."""
        weights_at = self.ids_at + 4 * self.top_k
        return (
            records[:, : self.hidden].view(torch.float8_e4m3fn),
            records[:, self.hidden : self.hidden + self.hidden // BLOCK_SIZE],
            records[:, self.ids_at : weights_at].view(torch.int32),
            records[:, weights_at : weights_at + 4 * self.top_k].view(torch.float32),
        )
