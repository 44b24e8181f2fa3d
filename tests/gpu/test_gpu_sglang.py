"""SGLang's two functions in a CUDA graph, and with metadata that nobody can look at."""

from __future__ import annotations

import pytest
import sglang_case
import torch
from bad_calls import sglang as tables
from bad_calls.row import ints
from guards import Guards
from on_gpu import captured

import hybrid_mxfp8 as mx

pytestmark = pytest.mark.gpu


def test_a_captured_graph_follows_new_metadata() -> None:
    """And nothing syncs."""
    workspace = torch.empty(1 << 24, dtype=torch.uint8, device="cuda")
    case = sglang_case.random_case([40, 60, 28], 256, 256, torch.bfloat16, 1, device="cuda", spare=256)

    def step() -> torch.Tensor:
        case.quantize_tokens()
        return case.multiply(workspace, torch.bfloat16)

    case.quantize()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph, d = captured(step)
    for counts in ([1, 0, 127], [128, 0, 0], [40, 60, 28]):
        case.set_counts(counts)
        graph.replay()
        assert torch.equal(d, step())
        for rows, truth in case.experts():
            assert mx.calc_diff(d[rows], truth) < 0.001


WRONG_METADATA = {
    "negative counts": {"tokens_per_expert": (-3, -(2**31), 130)},
    "counts beyond T": {"tokens_per_expert": (2**31 - 1, 2**31 - 1, 130)},
    "scale offsets off a tile": {"blockscale_offsets": (1, 100, 129)},
    "scale offsets outside": {"blockscale_offsets": (-128, 2**31 - 128, 2**31 - 1)},
    "scale offsets that overlap": {"blockscale_offsets": (0, 0, 0)},
    "offsets that fall": {"expert_offsets": (9, -7, 2**31 - 1)},
}


@pytest.mark.sanitizer
@pytest.mark.parametrize("what", WRONG_METADATA)
def test_metadata_that_make_no_sense_lead_nowhere(what: str) -> None:
    """A GPU's can't be looked at: numbers are wrong, and nothing outside is written."""
    g = Guards("cuda")
    plain = tables._tokens()
    given = {name: g.place(value) for name, value in plain.items()}
    given |= {name: g(ints(*values)) for name, values in WRONG_METADATA[what].items()}
    given |= {name: g.out(plain[name]) for name in ("quant_output", "scale_factor")}
    w = g.place(mx.quantize_weights(torch.randn(tables.E, tables.N, tables.K), backend="reference"))
    g.ready()
    sglang_case.grouped_quant(**given)
    sglang_case.moe_grouped_gemm(
        w.values, given["quant_output"], w.scales, given["scale_factor"], given["expert_offsets"],
        given["blockscale_offsets"], given["tokens_per_expert"],
        torch.empty(1 << 20, dtype=torch.uint8, device="cuda"), torch.bfloat16,
    )  # fmt: skip
    torch.cuda.synchronize()
    g.check()
