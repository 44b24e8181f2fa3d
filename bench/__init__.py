"""The benchmark suite: ``python -m bench`` from the root, or ``python -m hybrid_mxfp8 bench``.

It is not part of the wheel. Modules import one another relatively, so that both ways work.

- shapes: what is measured; work: its bytes and flops; timing: how; limits: what the card can do
- bench_quantize, bench_grouped_gemm, bench_moe: inputs and contenders of one case
- peers, deep_gemm, sglang_moe: the baselines and other libraries behind one interface
- run: the loop; report, plots: what comes of the rows; model: what can't be run here
- generation: a model of transformers; speed: the README's table from records
"""
