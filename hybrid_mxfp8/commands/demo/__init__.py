"""``python -m hybrid_mxfp8 demo``: the main job on real weights, measured against fp32 and against per-tensor FP8."""
