"""Turn the experts of a checkpoint into MXFP8, a few rows at a time: from bf16, fp16, fp32, or FP8 in blocks of 128x128.

Enters: a safetensors file, or a folder with a checkpoint of several. Leaves: the same with each expert matrix replaced by
its e4m3 elements and ``NAME_scale_inv``, on request with the other FP8 matrices as bf16, everything else byte for byte.
Memory stays bounded whatever the size of a tensor: matrices are read and converted in blocks of rows, and tensors that
stay are copied one at a time.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import torch

from hybrid_mxfp8.checkpoint.atomic import partial, replace_folder
from hybrid_mxfp8.checkpoint.fp8_blocks import BLOCK, block_scales, dequantize
from hybrid_mxfp8.checkpoint.reader import (
    INDEX_FILE,
    METADATA,
    SCALE_SUFFIXES,
    Checkpoint,
    checkpoint_files,
    read_json,
    scale_entry,
)
from hybrid_mxfp8.checkpoint.writer import Entry, SafetensorsWriter
from hybrid_mxfp8.core.formats import BLOCK_SIZE, ceil_div
from hybrid_mxfp8.ops.quantize import quantize_weights

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
        widened: FP8 tensors that became bf16.
        kept: tensors that match the pattern but are no matrices: vectors and biases.
        expert_bytes_before: bytes of the quantized tensors in the source.
        expert_bytes_after: the same in the result, scales included.
        bytes_before: of all tensors.
        bytes_after: of all tensors.
        worst_db: the lowest signal-to-noise of a matrix, against what the source's bytes stand for.
        worst_name: which one.
    """

    experts: list[str] = field(default_factory=list)
    widened: list[str] = field(default_factory=list)
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
        others_to_bf16: write FP8 matrices in blocks of 128x128 that no pattern matches as bf16.
    """

    patterns: tuple[str, ...]
    scale_rounding: str = "rceil"
    device: torch.device | None = None
    others_to_bf16: bool = False

    def match(self, name: str) -> bool:
        """Whether a tensor of this name is meant."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)


@dataclass
class Plan:
    """What becomes of the tensors of a file.

    Attributes:
        quantized: to MXFP8.
        widened: from FP8 to bf16.
        copied: byte for byte.
        dropped: scales of FP8 tensors that are quantized or widened, be it in this file or in another.
        kept: names of those copied that match a pattern but are no matrices.
    """

    quantized: list[Entry] = field(default_factory=list)
    widened: list[Entry] = field(default_factory=list)
    copied: list[Entry] = field(default_factory=list)
    dropped: list[Entry] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def plan(checkpoint: Checkpoint, options: Options, whole: Checkpoint | None = None) -> Plan:
    """What to do with each tensor of a checkpoint. Reads headers only.

    Args:
        checkpoint: whose tensors are meant.
        options: what to quantize.
        whole: where a weight's scales are looked for, which may be in another file; default ``checkpoint``.

    Raises:
        ValueError: a tensor that matches can't be quantized.
    """
    whole = whole or checkpoint
    found = Plan()
    for name in checkpoint.names:
        entry = checkpoint.entry(name)
        if _leaves_with_its_weight(whole, name, options):
            found.dropped.append(entry)
        elif _is_quantized(entry, options):
            _check_source(whole, entry)
            found.quantized.append(entry)
        elif _is_widened(whole, entry, options):
            found.widened.append(entry)
        else:
            found.copied.append(entry)
            if options.match(name):
                found.kept.append(name)
    return found


def _is_quantized(entry: Entry, options: Options) -> bool:
    return options.match(entry.name) and len(entry.shape) >= 2 and not entry.name.endswith("bias")


def _is_widened(whole: Checkpoint, entry: Entry, options: Options) -> bool:
    matrix = len(entry.shape) in (2, 3) and 0 not in entry.shape
    return options.others_to_bf16 and matrix and block_scales(whole, entry) is not None


def _leaves_with_its_weight(whole: Checkpoint, name: str, options: Options) -> bool:
    """Whether a tensor is the scales of an FP8 weight that won't be FP8 any more."""
    for suffix in SCALE_SUFFIXES:
        weight = name.removesuffix(suffix)
        if weight != name and weight in whole and block_scales(whole, entry := whole.entry(weight)):
            return _is_quantized(entry, options) or _is_widened(whole, entry, options)
    return False


def _check_source(checkpoint: Checkpoint, entry: Entry) -> None:
    name, dtype, shape = entry
    place, fp8 = checkpoint.place(name), block_scales(checkpoint, entry)
    if dtype not in SOURCE_DTYPES and not fp8:
        quantized = dtype.startswith("F8") or dtype == "U8"
        hint = "it is quantized already" if quantized else "only those are converted, and FP8 in blocks of 128x128"
        raise ValueError(f"{place}: dtype must be BF16, F16 or F32, got {dtype}: {hint}")
    if len(shape) > 3:
        raise ValueError(f"{place}: must have shape (N, K) or (E, N, K), got {shape}")
    if not math.prod(shape) or shape[-1] % BLOCK_SIZE:
        raise ValueError(f"{place}: must have K, its last dimension, a positive multiple of {BLOCK_SIZE}, got {shape}")
    if checkpoint.scale_of(name) is not None and not fp8:
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


Progress = Callable[[str, int], None]


def convert_file(
    source: Path,
    target: Path,
    options: Options,
    summary: Summary,
    progress: Progress,
    *,
    whole: Checkpoint | None = None,
) -> list[str]:
    """Convert one safetensors file.

    Args:
        source: the file to read.
        target: the file to write, which appears when it is complete; replaced if it exists.
        options: what to quantize, and how.
        summary: added to.
        progress: told the name and the source bytes of each block that is done.
        whole: the checkpoint that the file belongs to, where a weight's scales may be in another file.

    Returns:
        The names of all tensors in ``target``.

    Raises:
        ValueError: a file that can't be read, or a matching tensor that can't be quantized or holds NaN or Inf.
    """
    with Checkpoint(source) as checkpoint:
        found = plan(checkpoint, options, whole)
        source_of = _Source(checkpoint, whole or checkpoint, options)
        entries = [*found.copied, *(Entry(entry.name, "BF16", entry.shape) for entry in found.widened)]
        for entry in found.quantized:
            after = [Entry(entry.name, "F8_E4M3", entry.shape), scale_entry(entry.name, entry.shape)]
            entries += after
            scales = block_scales(source_of.whole, entry)
            summary.expert_bytes_before += entry.num_bytes + (scales.num_bytes if scales else 0)
            summary.expert_bytes_after += sum(e.num_bytes for e in after)
        summary.bytes_before += sum(checkpoint.entry(name).num_bytes for name in checkpoint.names)
        summary.bytes_after += sum(e.num_bytes for e in entries)
        summary.experts += [e.name for e in found.quantized]
        summary.widened += [e.name for e in found.widened]
        summary.kept += found.kept
        metadata = dict(checkpoint.metadata)
        if found.quantized:
            metadata |= {**METADATA, "mxfp8.scale_rounding": options.scale_rounding}
        with SafetensorsWriter(target, entries, metadata) as writer:
            for entry in found.quantized:
                _quantize(source_of, entry, writer, summary, progress)
            for entry in found.widened:
                _widen(source_of, entry, writer, progress)
            for entry in found.copied:
                writer.append(entry.name, checkpoint.tensor(entry.name))
                progress(entry.name, entry.num_bytes)
            for entry in found.dropped:
                progress(entry.name, entry.num_bytes)
    return [e.name for e in entries]


@dataclass(frozen=True)
class _Source:
    """Where matrices come from."""

    checkpoint: Checkpoint
    whole: Checkpoint
    options: Options

    def blocks(self, entry: Entry) -> Iterator[tuple[str, torch.Tensor, int]]:
        """A tensor's matrices, a few rows at a time: which matrix, its rows (R, K) on the device, their bytes in the file."""
        part, shape = self.checkpoint.part(entry.name), entry.shape
        n, k = shape[-2:]
        scales = block_scales(self.whole, entry)
        scale_part = self.whole.part(scales.name) if scales else None
        rows = max(1, BLOCK_ELEMENTS // k)
        if scales:
            rows = max(1, rows // BLOCK) * BLOCK  # a block begins where one of the source's does
        item = entry.num_bytes // math.prod(shape)
        for e in range(shape[0]) if len(shape) == 3 else (None,):
            for start in range(0, n, rows):
                w = _rows(part, e, start, min(start + rows, n)).to(self.options.device or "cpu")
                num_bytes = w.numel() * item
                if scales:
                    w = dequantize(
                        w, _rows(scale_part, e, start // BLOCK, ceil_div(start + w.shape[0], BLOCK)).to(w.device)
                    )
                yield "" if e is None else f"[{e}]", w, num_bytes


def _rows(part: Any, e: int | None, start: int, end: int) -> torch.Tensor:
    """Rows of a matrix, or of one of a stack."""
    tensor: torch.Tensor = part[start:end] if e is None else part[e : e + 1, start:end][0]
    return tensor


def _quantize(source: _Source, entry: Entry, writer: SafetensorsWriter, summary: Summary, progress: Progress) -> None:
    name = entry.name
    for number, blocks in itertools.groupby(source.blocks(entry), key=itemgetter(0)):
        signal = noise = 0.0
        for _, w, num_bytes in blocks:
            wq = quantize_weights(w.unsqueeze(0), scale_rounding=source.options.scale_rounding)
            error = w.double() - wq.dequantize()[0].double()
            signal += float(w.double().square().sum())
            noise += float(error.square().sum())
            if not math.isfinite(signal) or not math.isfinite(noise):
                place = source.checkpoint.place(name) + number
                raise ValueError(f"{place}: holds NaN or Inf, each of which would make its whole block of 32 NaN")
            writer.append(name, wq.values)
            writer.append(name + SCALE_SUFFIXES[0], wq.linear_scales())
            progress(name, num_bytes)
        db = 10 * math.log10(signal / noise) if noise and signal else math.inf
        if db < summary.worst_db or not summary.worst_name:
            summary.worst_db, summary.worst_name = db, name + number


def _widen(source: _Source, entry: Entry, writer: SafetensorsWriter, progress: Progress) -> None:
    for _, w, num_bytes in source.blocks(entry):
        writer.append(entry.name, w.bfloat16())
        progress(entry.name, num_bytes)


def total_bytes(files: Sequence[Path]) -> int:
    """Bytes of all tensors of these files, from their headers."""
    total = 0
    for file in files:
        with Checkpoint(file) as checkpoint:
            total += sum(checkpoint.entry(name).num_bytes for name in checkpoint.names)
    return total


def convert_folder(source: Path, target: Path, options: Options, summary: Summary, progress: Progress) -> None:
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
        ValueError: as :func:`convert_file`; a ``config.json`` that is none, or that says the model is quantized already,
            unless all its FP8 is converted; a file that is a link to nothing.
    """
    config = _read_config(source)
    others = _other_files(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with Checkpoint(source) as whole, partial(target) as folder:
        if config is not None:
            _check_one_format(source / CONFIG_FILE, config, plan(whole, options))
        folder.mkdir()
        weight_map: dict[str, str] = {}
        for file in checkpoint_files(source):
            names = convert_file(file, folder / file.name, options, summary, progress, whole=whole)
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
    return config


def _check_one_format(file: Path, config: Mapping[str, Any], planned: Plan) -> None:
    """That ``quantization_config`` can say what all weights of the result are: it has room for one format beside floats.

    Raises:
        ValueError: it is of another format than MXFP8, and weights of that format would stay.
    """
    before = config.get("quantization_config")
    method = before.get("quant_method") if isinstance(before, dict) else before
    if before is None or method == "mxfp8":
        return
    if method != "fp8" or not planned.dropped:
        raise ValueError(
            f"{file}: says that the model is quantized already ({method!r}); its other weights would need that entry, and "
            "the experts another"
        )
    left = [entry.name for entry in planned.copied if entry.dtype == "F8_E4M3"]
    if left:
        raise ValueError(
            f"{file}: says that weights are FP8, and {len(left)} would stay so, {left[0]} first, which it can't say beside "
            "MXFP8: match them with --experts, too, or give --others-to-bf16"
        )


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
