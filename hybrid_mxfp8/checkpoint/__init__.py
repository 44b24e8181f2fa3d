"""MXFP8 experts in files: read, write, convert. May import all packages but ``commands``."""

from hybrid_mxfp8.checkpoint.reader import Checkpoint, checkpoint_files, find_experts, load_experts, save_experts

__all__ = ["Checkpoint", "checkpoint_files", "find_experts", "load_experts", "save_experts"]
