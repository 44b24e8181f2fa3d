"""Turn the bf16, fp16 or fp32 experts of a checkpoint into MXFP8, a few rows at a time.

Enters: a safetensors file, or a folder with a checkpoint of several. Leaves: the same with each expert matrix replaced by
its e4m3 elements and ``NAME_scale_inv``, everything else byte for byte. Memory stays bounded whatever the size of a
tensor: expert matrices are read and quantized in blocks of rows, and other tensors are copied one at a time.
"""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from hybrid_mxfp8.checkpoint import (
    INDEX_FILE,
    METADATA,
    SCALE_SUFFIXES,
    Checkpoint,
    checkpoint_files,
    fp8_of_large_blocks,
    read_json,
    scale_entry,
)
from hybrid_mxfp8.formats import BLOCK_SIZE
from hybrid_mxfp8.ops import quantize_weights
from hybrid_mxfp8.partial import partial, replace_folder
from hybrid_mxfp8.safetensors_writer import Entry, SafetensorsWriter

CONFIG_FILE: Final = "config.json"
SOURCE_DTYPES: Final = ("BF16", "F16", "F32")
BLOCK_ELEMENTS: Final = 2**22
"""Of one block of rows: 16 MiB in fp32, of which the reference quantizer makes several copies."""

QUANTIZATION_CONFIG: Final = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [1, BLOCK_SIZE],
}
"""What SGLang and MiniMax-M3-MXFP8 write in a checkpoint's ``config.json``."""


@dataclass
class Summary:
    """What a conversion did.

    Attributes:
        experts: tensors that were quantized.
        kept: tensors that match the pattern but are no matrices: vectors and biases.
        expert_bytes_before: bytes of the quantized tensors in the source.
        expert_bytes_after: the same in the result, scales included.
        bytes_before: of all tensors.
        bytes_after: of all tensors.
        worst_db: the lowest signal-to-noise of a matrix.
        worst_name: which one.
    """

    experts: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    expert_bytes_before: int = 0
    expert_bytes_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    worst_db: float = math.inf
    worst_name: str = ""


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        patterns: shell patterns for the names of the expert tensors.
        scale_rounding: ``rceil``, ``floor`` or ``even``.
        device: where to quantize; None means the CPU.
    """

    patterns: tuple[str, ...]
    scale_rounding: str = "rceil"
    device: torch.device | None = None

    def match(self, name: str) -> bool:
        """Whether a tensor of this name is meant."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)


def plan(checkpoint: Checkpoint, options: Options) -> tuple[list[Entry], list[Entry], list[str]]:
    """Which tensors to quantize, which to copy, and which of those match the pattern but are no matrices. Reads headers only.

    Raises:
        ValueError: a tensor that matches can't be quantized.
    """
    quantized: list[Entry] = []
    copied: list[Entry] = []
    kept: list[str] = []
    for name in checkpoint.names:
        entry = checkpoint.entry(name)
        if not options.match(name):
            copied.append(entry)
        elif len(entry.shape) < 2 or name.endswith("bias"):
            copied.append(entry)
            kept.append(name)
        else:
            _check_source(checkpoint, entry)
            quantized.append(entry)
    return quantized, copied, kept


def _check_source(checkpoint: Checkpoint, entry: Entry) -> None:
    name, dtype, shape = entry
    place = checkpoint.place(name)
    if dtype not in SOURCE_DTYPES:
        quantized = dtype.startswith("F8") or dtype == "U8"
        hint = "it is quantized already" if quantized else "only those are converted"
        if fp8 := fp8_of_large_blocks(checkpoint, entry):
            hint = f"it is {fp8}"
        raise ValueError(f"{place}: dtype must be BF16, F16 or F32, got {dtype}: {hint}")
    if len(shape) > 3:
        raise ValueError(f"{place}: must have shape (N, K) or (E, N, K), got {shape}")
    if not math.prod(shape) or shape[-1] % BLOCK_SIZE:
        raise ValueError(f"{place}: must have K, its last dimension, a positive multiple of {BLOCK_SIZE}, got {shape}")
    if checkpoint.scale_of(name) is not None:
        raise ValueError(f"{place}: has scales, {checkpoint.scale_of(name)}, so it is quantized already")


def check_last_dimensions(shapes: Mapping[str, tuple[int, ...]], quantized: Sequence[str]) -> None:
    """That fused experts to be quantized are (E, N, K): gate_up_proj (E, 2I, H) beside down_proj (E, H, I).

    By their own shapes alone (E, K, N) look like any others, and would be quantized along N.

    Args:
        shapes: of a checkpoint's tensors.
        quantized: names of those that are to be.

    Raises:
        ValueError: two of a layer that are (E, H, 2I) and (E, I, H).
    """
    for name in quantized:
        up, down = (name.replace(*names) for names in (("down_proj", "gate_up_proj"), ("gate_up_proj", "down_proj")))
        if up == down or len(shapes.get(up, ())) != 3 or len(shapes.get(down, ())) != 3:
            continue
        (_, a, b), (_, c, d) = shapes[up], shapes[down]
        if b == 2 * c and a == d:
            raise ValueError(
                f"{up}: must be (E, N, K) = (E, 2I, H), as {down} is (E, H, I), got {shapes[up]} and {shapes[down]}: they "
                "look like (E, K, N), and have to be transposed first"
            )


def convert_file(
    source: Path, target: Path, options: Options, summary: Summary, progress: Callable[[str, int], None]
) -> list[str]:
    """Convert one safetensors file.

    Args:
        source: the file to read.
        target: the file to write, which appears when it is complete; replaced if it exists.
        options: what to quantize, and how.
        summary: added to.
        progress: told the name and the source bytes of each block that is done.

    Returns:
        The names of all tensors in ``target``.

    Raises:
        ValueError: a file that can't be read, or a matching tensor that can't be quantized or holds NaN or Inf.
    """
    with Checkpoint(source) as checkpoint:
        quantized, copied, kept = plan(checkpoint, options)
        entries = [*copied]
        for entry in quantized:
            after = [Entry(entry.name, "F8_E4M3", entry.shape), scale_entry(entry.name, entry.shape)]
            entries += after
            summary.expert_bytes_before += entry.num_bytes
            summary.expert_bytes_after += sum(e.num_bytes for e in after)
        summary.bytes_before += sum(e.num_bytes for e in (*quantized, *copied))
        summary.bytes_after += sum(e.num_bytes for e in entries)
        summary.experts += [e.name for e in quantized]
        summary.kept += kept
        metadata = dict(checkpoint.metadata)
        if quantized:
            metadata |= {**METADATA, "mxfp8.scale_rounding": options.scale_rounding}
        with SafetensorsWriter(target, entries, metadata) as writer:
            for entry in quantized:
                _quantize(checkpoint, entry, options, writer, summary, progress)
            for entry in copied:
                writer.append(entry.name, checkpoint.tensor(entry.name))
                progress(entry.name, entry.num_bytes)
    return [e.name for e in entries]


def _quantize(
    checkpoint: Checkpoint,
    entry: Entry,
    options: Options,
    writer: SafetensorsWriter,
    summary: Summary,
    progress: Callable[[str, int], None],
) -> None:
    name, _, shape = entry
    part, (n, k) = checkpoint.part(name), shape[-2:]
    rows = max(1, BLOCK_ELEMENTS // k)
    item = entry.num_bytes // math.prod(shape)
    for e in range(shape[0]) if len(shape) == 3 else (None,):
        number = "" if e is None else f"[{e}]"
        matrix, place = name + number, checkpoint.place(name) + number
        signal = noise = 0.0
        for start in range(0, n, rows):
            block = slice(start, min(start + rows, n))
            w = (part[block] if e is None else part[e : e + 1, block][0]).to(options.device or "cpu")
            wq = quantize_weights(w.unsqueeze(0), scale_rounding=options.scale_rounding)
            error = w.double() - wq.dequantize()[0].double()
            signal += float(w.double().square().sum())
            noise += float(error.square().sum())
            if not math.isfinite(signal) or not math.isfinite(noise):
                raise ValueError(f"{place}: holds NaN or Inf, each of which would make its whole block of 32 NaN")
            writer.append(name, wq.values)
            writer.append(name + SCALE_SUFFIXES[0], wq.linear_scales())
            progress(name, w.numel() * item)
        db = 10 * math.log10(signal / noise) if noise and signal else math.inf
        if db < summary.worst_db or not summary.worst_name:
            summary.worst_db, summary.worst_name = db, matrix


def total_bytes(files: Sequence[Path]) -> int:
    """Bytes of all tensors of these files, from their headers."""
    total = 0
    for file in files:
        with Checkpoint(file) as checkpoint:
            total += sum(checkpoint.entry(name).num_bytes for name in checkpoint.names)
    return total


def convert_folder(
    source: Path, target: Path, options: Options, summary: Summary, progress: Callable[[str, int], None]
) -> None:
    """Convert a checkpoint's folder: every safetensors file by itself, then the index and ``config.json``.

    Safetensors files that an index does not name are left out, files of other kinds are copied. ``config.json`` gets a
    ``quantization_config`` whose ``modules_to_not_convert`` lists the modules whose weight matrices stayed as they were.

    Args:
        source: the folder to read.
        target: the folder to write, which appears when it is complete; replaced if it exists.
        options: as for :func:`convert_file`.
        summary: added to.
        progress: as for :func:`convert_file`.

    Raises:
        ValueError: as :func:`convert_file`; a ``config.json`` that is none, or that says the model is quantized already;
            a file that is a link to nothing.
    """
    config = _read_config(source)
    others = _other_files(source)
    with Checkpoint(source):
        pass  # the files, which are opened one by one below, are those of the index and fit together
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial(target) as folder:
        folder.mkdir()
        weight_map: dict[str, str] = {}
        for file in checkpoint_files(source):
            names = convert_file(file, folder / file.name, options, summary, progress)
            weight_map |= dict.fromkeys(names, file.name)
        for file in others:
            shutil.copy2(file, folder / file.name)
        if (source / INDEX_FILE).exists():
            index = {"metadata": {"total_size": summary.bytes_after}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(folder / INDEX_FILE, index)
        if config is not None:
            untouched = _modules_not_converted(folder, set(summary.experts))
            config["quantization_config"] = {**QUANTIZATION_CONFIG, "modules_to_not_convert": untouched}
            _write_json(folder / CONFIG_FILE, config)
        replace_folder(folder, target)


def _read_config(folder: Path) -> dict[str, Any] | None:
    """``config.json``, None if there is none. Before anything is converted, which may take hours."""
    file = folder / CONFIG_FILE
    if not file.exists():
        return None
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: must hold an object, got a {type(config).__name__}")
    before = config.get("quantization_config")
    if before is not None and (not isinstance(before, dict) or before.get("quant_method") != "mxfp8"):
        method = before.get("quant_method") if isinstance(before, dict) else before
        raise ValueError(
            f"{file}: says that the model is quantized already ({method!r}); its other weights would need that entry, and "
            "the experts another"
        )
    return config


def _other_files(folder: Path) -> list[Path]:
    """Files that are neither tensors nor made anew: tokenizer, licence and the like."""
    others = [file for file in sorted(folder.iterdir()) if file.suffix != ".safetensors"]
    for file in others:
        if file.is_symlink() and not file.exists():
            raise ValueError(f"{file}: is a link to nothing")
    return [file for file in others if file.is_file() and file.name not in (INDEX_FILE, CONFIG_FILE)]


def _write_json(file: Path, content: object) -> None:
    try:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, f"can't be written: {error.strerror}", str(file)) from error


def _modules_not_converted(folder: Path, experts: set[str]) -> list[str]:
    """Modules with a weight matrix that stayed in its dtype."""
    modules = set()
    with Checkpoint(folder) as checkpoint:
        for name in checkpoint.names:
            entry = checkpoint.entry(name)
            if (
                name.endswith(".weight")
                and name not in experts
                and len(entry.shape) >= 2
                and entry.dtype in SOURCE_DTYPES
            ):
                modules.add(name.removesuffix(".weight"))
    return sorted(modules)
