"""How a checkpoint keeps its experts: MXFP8 is (E, N, K), with all gate rows before all up rows.

Some models keep (E, K, N), and some interleave gate and up rows. Shapes don't show it; the
``model_type`` in ``config.json`` does.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from hybrid_mxfp8.checkpoint.reader import read_json

CONFIG_FILE: Final = "config.json"

Patterns = tuple[str, ...]  # of names of tensors, as in a shell


class SourceLayout(NamedTuple):
    """Which weights are not kept as MXFP8 is."""

    transposed: Patterns = ()  # stacks (E, K, N)
    interleaved: Patterns = ()  # gate and up rows alternate along N, as in their biases


_FUSED: Final = ("*.experts.gate_up_proj", "*.experts.down_proj")
_W13: Final = ("*.experts.w13_weight",)

OF_MODELS: Final[Mapping[str, SourceLayout]] = {
    "gpt_oss": SourceLayout(_FUSED, _FUSED[:1]),
    **dict.fromkeys(("inkling_mm_model", "inkling2", "inkling2_text"), SourceLayout(interleaved=_W13)),
    **dict.fromkeys(("llama4", "llama4_text", "openai_privacy_filter"), SourceLayout(_FUSED)),
}
"""By ``model_type``."""


def matches(name: str, patterns: Patterns) -> bool:
    """Whether one of the patterns means a tensor of this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def parts_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration and all within it, such as ``thinker_config`` and its ``text_config``."""
    parts = [config]
    for part in parts:  # the list grows while it is read
        parts += [value for value in part.values() if isinstance(value, dict)]
    return parts


def layout_of(checkpoint: Path) -> SourceLayout:
    """The layout for the ``model_type`` in a checkpoint's ``config.json``, or in a part of it."""
    file = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / CONFIG_FILE
    config: Any = read_json(file) if file.exists() else None
    if not isinstance(config, dict):
        return SourceLayout()
    types = [kind for part in parts_of(config) if isinstance(kind := part.get("model_type"), str)]
    return next((OF_MODELS[kind] for kind in types if kind in OF_MODELS), SourceLayout())
