"""The ``demo`` command: the main job on real weights, against fp32 and per-tensor FP8."""
