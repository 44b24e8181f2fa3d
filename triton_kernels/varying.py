"""What changes from batch to batch, by the names of kernels' parameters.

No kernel is specialized on these, so that a new number of tokens compiles no new kernel.
"""

from __future__ import annotations

_SIZES = ("num_tokens", "num_rows", "num_scale_rows", "num_source_rows", "num_slots", "num_blocks", "num_records")
_OTHERS = ("num_experts", "top_k", "row_programs", "max_tiles", "tokens_at")
_LAYOUT = ("layout_ptr", "expert_offsets_ptr", "scale_offsets_ptr", "counts_ptr", "given_ptr", "row_index_ptr")
_CALLER = ("tokens_ptr", "scale_starts_ptr", "out_tokens_ptr", "out_offsets_ptr", "out_scale_offsets_ptr")
_ROUTING = ("ids_ptr", "weights_ptr", "rows_ptr", "inverse_permutation_ptr")

VARYING = [*_SIZES, *_OTHERS, *_LAYOUT, *_CALLER, *_ROUTING]
