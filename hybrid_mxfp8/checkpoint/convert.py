"""Turn a checkpoint's experts into MXFP8: from bf16, fp16, fp32, or FP8 in blocks of 128x128.

Enters: a safetensors file, or a folder of them. Leaves: the same with each expert matrix replaced
by its e4m3 elements and ``NAME_scale_inv``, on request with other FP8 matrices as bf16, all else
byte for byte. Experts kept as (E, K, N), or with gate and up rows interleaved, leave as (E, N, K)
with all gate rows first. Memory stays bounded whatever the size of a tensor: matrices are converted
in blocks of rows, and tensors that stay are copied one at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8.checkpoint.fp8_blocks import BLOCK, block_scales, dequantize
from hybrid_mxfp8.checkpoint.parallel import in_order
from hybrid_mxfp8.checkpoint.reader import INDEX_FILE, METADATA, NO_MXFP4, Checkpoint, is_mxfp8, read_json, scale_entry
from hybrid_mxfp8.checkpoint.source_layout import CONFIG_FILE, Patterns, layout_of, matches, parts_of
from hybrid_mxfp8.checkpoint.writer import (
    Entry,
    SafetensorsWriter,
    atomic_write,
    check_still_absent,
    errors_name,
    replace_folder,
)
from hybrid_mxfp8.core.formats import BLOCK_SIZE, ceil_div
from hybrid_mxfp8.core.metrics import decibels
from hybrid_mxfp8.ops.experts import gate_then_up
from hybrid_mxfp8.ops.quantize import quantize_weights

QUANTIZATION_FILES: Final = ("hf_quant_config.json", "quantization_config.json", "quantize_config.json")
"""Files of their own in which exporters describe a quantization; the result has none."""

SOURCE_DTYPES: Final = ("BF16", "F16", "F32")
BLOCK_ELEMENTS: Final = 2**20  # of a block of rows: 4 MiB in fp32, which malloc reuses
MAX_THREADS: Final = 8  # blocks of rows in work at a time: each takes some 30 MiB

QUANTIZATION_CONFIG: Final = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [1, BLOCK_SIZE],
}
"""What SGLang and MiniMax-M3-MXFP8 write in a checkpoint's ``config.json``."""

Progress = Callable[[str, int], None]
"""Told the name and the source bytes of each block that is done."""

Block = tuple[str, torch.Tensor, int]
"""``NAME`` of a matrix or ``NAME[e]`` of a stack's, rows of it (R, K), and their source bytes."""


@dataclass(frozen=True)
class Options:
    """How to convert."""

    patterns: Patterns  # as in a shell, for the names of the expert tensors
    scale_rounding: str = "rceil"
    device: torch.device | None = None  # where to quantize; None means the CPU
    others_to_bf16: bool = False  # FP8 matrices in blocks of 128x128 that no pattern matches
    transposed: Patterns | None = None  # stacks kept as (E, K, N); None: as config.json says
    interleaved: Patterns | None = None  # weights of interleaved gate and up rows; None: likewise


class Tensor(NamedTuple):
    """A tensor of the source, and what becomes of it."""

    entry: Entry
    action: str  # "quantize"; "widen" to bf16; "copy"; or "drop", scales of what is quantized or widened
    scales: Entry | None
    matches: bool  # one of the patterns
    transposed: bool  # a stack (E, K, N)
    interleaved: bool  # gate and up rows, or their biases, take turns

    @property
    def shape(self) -> tuple[int, ...]:
        """In the result: (..., N, K)."""
        shape = self.entry.shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def results(self) -> list[Entry]:
        """What it is in the result."""
        if self.action == "quantize":
            return [Entry(self.entry.name, "F8_E4M3", self.shape), scale_entry(self.entry.name, self.shape)]
        if self.action == "widen":
            return [Entry(self.entry.name, "BF16", self.shape)]
        return [self.entry] if self.action == "copy" else []


Plan = list[Tensor]  # of a whole checkpoint


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """What to do with each tensor, by the headers; ValueError for one that can't be quantized."""
    entries = {name: checkpoint.entry(name) for name in checkpoint.names}
    matching = {name for name in entries if matches(name, options.patterns)}
    for name in entries:
        weight = checkpoint.mxfp4_weight(name)
        if weight and (name in matching or matches(weight, options.patterns)):
            raise ValueError(f"{checkpoint.place(name)}: {NO_MXFP4}")
    quantized = {name for name in matching if len(entries[name].shape) >= 2 and not name.endswith("bias")}
    shapes = {name: entry.shape for name, entry in entries.items()}
    transposed, interleaved = _find_layout(checkpoint.path, shapes, quantized, options)
    scales = {}
    for name, entry in entries.items():
        widened = options.others_to_bf16 and len(entry.shape) in (2, 3) and 0 not in entry.shape
        if (widened or name in quantized) and (found := block_scales(checkpoint, entry)):
            scales[name] = found
    actions = dict.fromkeys(entries, "copy")
    actions |= dict.fromkeys(scales, "widen") | dict.fromkeys(quantized, "quantize")
    actions |= dict.fromkeys((entry.name for entry in scales.values()), "drop")
    planned = [
        Tensor(entry, actions[name], scales.get(name), name in matching, name in transposed, name in interleaved)
        for name, entry in entries.items()
    ]
    for tensor in (tensor for tensor in planned if tensor.action == "quantize"):
        _check_source(checkpoint, tensor)
    if "quantize" not in actions.values():
        shown = ", ".join(checkpoint.names[:3]) + (", ..." if len(checkpoint.names) > 3 else "")
        raise ValueError(f"--experts: no matrix matches {' or '.join(options.patterns)} among {shown or 'no tensors'}")
    return planned


def _find_layout(
    path: Path, shapes: Mapping[str, tuple[int, ...]], quantized: set[str], options: Options
) -> tuple[set[str], set[str]]:
    """The names of quantized stacks (E, K, N), and of weights and biases of gate and up rows in
    turns; ValueError where options, ``model_type`` and shapes contradict one another."""
    known = layout_of(path)
    patterns = known.transposed if options.transposed is None else options.transposed
    stacks = {name for name, shape in shapes.items() if len(shape) == 3}
    transposed = {name for name in quantized & stacks if matches(name, patterns)}
    in_turns = known.interleaved if options.interleaved is None else options.interleaved
    interleaved = {name for name in quantized if matches(name, in_turns)}
    for option, what, given, names in (
        ("transposed", "stack of three dimensions", options.transposed, transposed),
        ("interleaved", "matrix", options.interleaved, interleaved),
    ):
        if given and not names:
            raise ValueError(f"--{option}: no {what} that --experts matches has a name like {' or '.join(given)}")
    if wrong := sorted(name for name in interleaved if "down_proj" in name):
        raise ValueError(f"--interleaved: must match gate and up alone, got {wrong[0]}")
    if known.interleaved and options.interleaved is None:
        fused = sorted(n for n in quantized - interleaved if "gate_up_proj" in n or "w13" in n)
        if fused:
            likely = f"has gate and up rows in turns in {' or '.join(known.interleaved)}"
            raise ValueError(f"{fused[0]}: a model of config.json's model_type {likely}: --interleaved says where here")
    for up in (name for name in shapes if name in stacks and "gate_up_proj" in name):
        down = up.replace("gate_up_proj", "down_proj")
        if down in stacks and quantized & {up, down}:
            _check_last_dimensions(*((name, shapes[name], matches(name, patterns)) for name in (up, down)))
    for weight in list(interleaved):
        n = shapes[weight][-1 if weight in transposed else -2]
        biases = f"{weight}_bias", f"{weight.removesuffix('weight')}bias"
        interleaved |= {name for name in biases if shapes.get(name, (0,))[-1:] == (n,)}
    return transposed, interleaved


def _check_last_dimensions(up: tuple[str, tuple[int, ...], bool], down: tuple[str, tuple[int, ...], bool]) -> None:
    """That fused experts will be (E, N, K): gate_up_proj (E, 2I, H) beside down_proj (E, H, I).
    Each is given by name, shape and whether it will be transposed. By their own shapes alone (E, K,
    N) look like any others, and would be quantized along N."""
    (a, b), (c, d) = (shape[:0:-1] if transposed else shape[1:] for _, shape, transposed in (up, down))
    if (b != 2 * c or a != d) and up[2] == down[2]:
        return
    if up[2] and down[2]:
        hint = "they look like (E, N, K), which --transposed, or config.json's model_type, says they are not"
    elif up[2] or down[2]:
        hint = "--transposed must match both"
    else:
        hint = "they look like (E, K, N): give --transposed, and --interleaved if gate and up rows take turns"
    expected = f"must be (E, N, K) = (E, 2I, H), as {down[0]} is (E, H, I)"
    raise ValueError(f"{up[0]}: {expected}, got {up[1]} and {down[1]}: {hint}")


def _check_source(checkpoint: Checkpoint, tensor: Tensor) -> None:
    (name, dtype, _), shape, fp8 = tensor.entry, tensor.shape, tensor.scales is not None
    place, scale_name = checkpoint.place(name), checkpoint.scale_of(name)
    if dtype not in SOURCE_DTYPES and not fp8:
        quantized = dtype.startswith("F8") or dtype == "U8"
        hint = "it is quantized already" if quantized else "only those are converted, and FP8 in blocks of 128x128"
        raise ValueError(f"{place}: dtype must be BF16, F16 or F32, got {dtype}: {hint}")
    if len(shape) > 3:
        raise ValueError(f"{place}: must have shape (N, K) or (E, N, K), got {shape}")
    if 0 in shape:
        raise ValueError(f"{place}: must have no empty dimension, got {tensor.entry.shape}")
    if shape[-1] % BLOCK_SIZE:
        which = f"its {'second' if tensor.transposed else 'last'} dimension"
        raise ValueError(
            f"{place}: must have K, {which}, a positive multiple of {BLOCK_SIZE}, got {tensor.entry.shape}"
        )
    if tensor.interleaved and shape[-2] % 2:
        raise ValueError(f"{place}: must have an even N for gate and up rows in turns, got {shape}")
    if fp8 and (tensor.transposed or tensor.interleaved):
        raise ValueError(f"{place}: FP8 in blocks of 128x128 must be (E, N, K) with all gate rows first")
    if scale_name is not None and not fp8:
        raise ValueError(f"{place}: has scales, {scale_name}, so it is quantized already")


def convert(
    checkpoint: Checkpoint, planned: Plan, target: Path, options: Options, progress: Progress = lambda name, size: None
) -> dict[str, float]:
    """Convert a safetensors file, or each file of a checkpoint's folder; ``target`` appears when it
    is whole, and replaces what is there.

    Files of other kinds are copied, but for those that describe a quantization. ``config.json``
    gets a ``quantization_config`` with the modules whose matrices stay as
    ``modules_to_not_convert``. ValueError for NaN or Inf in a tensor, a ``config.json`` that is
    none or can't say what the result is, and a link to nothing; OSError for a file that can't be
    read or written.

    Returns each matrix's signal-to-noise in dB against what the source's bytes stand for.
    """
    conversion = _Conversion(checkpoint, planned, options, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.path.is_dir():
        conversion.folder(target)
    else:
        conversion.file(checkpoint.path, target)
    return {matrix: decibels(signal, noise) for matrix, (signal, noise) in conversion.energies.items()}


@dataclass(frozen=True)
class _Conversion:
    checkpoint: Checkpoint
    planned: Plan
    options: Options
    progress: Progress
    energies: dict[str, tuple[float, float]] = field(default_factory=dict)  # of matrices, and what they lost

    def folder(self, target: Path) -> None:
        replaces = os.path.lexists(target)
        others = _other_files(self.checkpoint)  # before anything is converted, which may take hours
        config = _new_config(self.checkpoint, self.planned)
        with atomic_write(target) as folder:
            folder.mkdir()
            for file in self.checkpoint.files:
                self.file(file, folder / file.name)
            for path in others:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, folder / path.name)
            if (self.checkpoint.path / INDEX_FILE).exists():
                written = [
                    (self.checkpoint.file(t.entry.name).name, entry) for t in self.planned for entry in t.results
                ]
                weight_map = {entry.name: file_name for file_name, entry in written}
                metadata = {"total_size": sum(entry.num_bytes for _, entry in written)}
                _write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
            if config is not None:
                _write_json(folder / CONFIG_FILE, config)
            check_still_absent(target, replaces)
            replace_folder(folder, target)

    def file(self, file: Path, target: Path) -> None:
        """Convert the tensors of one file."""
        tensors = [tensor for tensor in self.planned if self.checkpoint.file(tensor.entry.name) == file]
        entries = [entry for tensor in tensors for entry in tensor.results]
        rounding = {"mxfp8.scale_rounding": self.options.scale_rounding}
        said = METADATA | rounding if any(tensor.action == "quantize" for tensor in tensors) else {}
        with SafetensorsWriter(target, entries, self.checkpoint.files[file] | said) as writer:
            for tensor in tensors:
                with contextlib.closing(self.pieces(tensor)) as pieces:
                    for num_bytes, *data in pieces:
                        for entry, part in zip(tensor.results, data, strict=True):
                            writer.append(entry.name, part)
                        self.progress(tensor.entry.name, num_bytes)

    def pieces(self, tensor: Tensor) -> Generator[tuple[Any, ...], None, None]:
        """The source bytes of each part of a tensor, and what it is in each of the results."""
        name = tensor.entry.name
        if tensor.action == "quantize":
            with contextlib.closing(in_order(self.quantized, self.blocks(tensor), self.threads)) as done:
                for matrix, signal, noise, *piece in done:
                    if not math.isfinite(signal) or not math.isfinite(noise):
                        place = f"{self.checkpoint.file(name)}: {matrix}"
                        raise ValueError(
                            f"{place}: holds NaN or Inf, or elements that MXFP8 rounds to 2**128, each of which "
                            "would make its whole block of 32 NaN"
                        )
                    before = self.energies.get(matrix, (0.0, 0.0))
                    self.energies[matrix] = before[0] + signal, before[1] + noise
                    yield tuple(piece)
        elif tensor.action == "widen":
            for _, w, num_bytes in self.blocks(tensor):
                yield num_bytes, w.bfloat16()
        elif tensor.action == "copy":
            data = self.checkpoint.tensor(name)
            yield tensor.entry.num_bytes, gate_then_up(data, -1) if tensor.interleaved else data
        else:
            yield (tensor.entry.num_bytes,)

    @property
    def threads(self) -> int:
        """Blocks at a time. Triton's interpreter takes one, a GPU is busy with one."""
        on_cpu = self.options.device is None or self.options.device.type == "cpu"
        return min(torch.get_num_threads(), MAX_THREADS) if on_cpu and not env.triton_interpret() else 1

    def quantized(self, block: Block) -> tuple[str, float, float, int, torch.Tensor, torch.Tensor]:
        """A block's sum of squares, that of what it lost, its bytes, its elements and scales."""
        matrix, w, num_bytes = block
        w = w.float()  # once for all that follows
        wq = quantize_weights(w.unsqueeze(0), scale_rounding=self.options.scale_rounding)
        signal, noise = _energy(w), _energy(wq.dequantize()[0].sub_(w))
        return matrix, signal, noise, num_bytes, wq.values, wq.linear_scales()

    def blocks(self, tensor: Tensor) -> Iterator[Block]:
        """A tensor's matrices, each in blocks of rows."""
        (name, _, _), (*stack, n, k), scales = tensor.entry, tensor.shape, tensor.scales
        parts = 2 if tensor.interleaved else 1  # gate's rows, then up's
        rows = max(1, BLOCK_ELEMENTS // k // parts)
        if scales:
            rows = max(1, rows // BLOCK) * BLOCK  # a block begins where one of the source's does
        item = tensor.entry.num_bytes // math.prod(tensor.shape)
        for place in itertools.product(*map(range, stack)):  # (e,), or () of a matrix
            matrix = name + "".join(f"[{e}]" for e in place)
            for part, start in itertools.product(range(parts), range(0, n // parts, rows)):
                end = min(start + rows, n // parts)
                w = self.rows(name, place, start * parts, end * parts, tensor.transposed)[part::parts]
                if scales:
                    w = dequantize(w, self.rows(scales.name, place, start // BLOCK, ceil_div(end, BLOCK)))
                yield matrix, w, (end - start) * k * item

    def rows(self, name: str, place: tuple[int, ...], start: int, end: int, transposed: bool = False) -> torch.Tensor:
        """Rows of a matrix, or of one of a stack."""
        at = (*place, slice(None), slice(start, end)) if transposed else (*place, slice(start, end))
        tensor: torch.Tensor = self.checkpoint.part(name)[at]
        return (tensor.T.contiguous() if transposed else tensor).to(self.options.device or "cpu")


def _energy(x: torch.Tensor) -> float:
    """The sum of squares, accumulated in float64 without a copy of x."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _new_config(checkpoint: Checkpoint, planned: Plan) -> dict[str, Any] | None:
    """The result's ``config.json``, with the modules whose weight matrix is a float in it; None
    where the source has none."""
    file = checkpoint.path / CONFIG_FILE
    if not file.exists():
        return None
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: must hold an object, got a {type(config).__name__}")
    found = [part.pop("quantization_config", None) for part in parts_of(config)]
    _check_one_format(checkpoint, [each for each in found if each is not None], planned)
    left = [entry for tensor in planned if tensor.action != "quantize" for entry in tensor.results]
    floats = [entry for entry in left if entry.dtype in SOURCE_DTYPES and len(entry.shape) >= 2]
    untouched = [entry.name.removesuffix(".weight") for entry in floats if entry.name.endswith(".weight")]
    return {**config, "quantization_config": {**QUANTIZATION_CONFIG, "modules_to_not_convert": sorted(untouched)}}


def _check_one_format(checkpoint: Checkpoint, before: Sequence[Any], planned: Plan) -> None:
    """That one ``quantization_config`` can say what all weights are in the result."""
    file = checkpoint.path / CONFIG_FILE
    copied = [tensor.entry for tensor in planned if tensor.action == "copy"]
    fp8 = [entry for entry in copied if entry.dtype.startswith("F8")]
    scales = {checkpoint.scale_of(entry.name) for entry in fp8} - {None}
    weights = (entry for entry in fp8 if entry.name not in scales and checkpoint.scale_of(entry.name) is not None)
    left = [entry.name for entry in weights if not is_mxfp8(checkpoint, entry)]
    if left:
        raise ValueError(
            f"{file}: can't say beside MXFP8 that weights are FP8, and {len(left)} would stay so, {left[0]} first: match "
            "them with --experts, too, or give --others-to-bf16"
        )
    methods = [(file, found.get("quant_method") if isinstance(found, dict) else found) for found in before]
    methods += [(path, path.stem) for name in QUANTIZATION_FILES if (path := file.with_name(name)).exists()]
    others = [(where, method) for where, method in methods if method != "mxfp8"]
    packed = [e for e in copied if e.dtype in ("U8", "I8", "I32") and len(e.shape) > 1 and e.name not in scales]
    if others and (packed or not any(tensor.action == "drop" for tensor in planned)):
        raise ValueError(
            f"{others[0][0]}: says that the model is quantized already ({others[0][1]!r}); its other weights would need that "
            "entry, and the experts another"
        )


def _other_files(checkpoint: Checkpoint) -> list[Path]:
    """What is neither a tensor's nor made anew: tokenizer, licence, folders and the like."""
    made = {INDEX_FILE, CONFIG_FILE, *QUANTIZATION_FILES, *(file.name for file in checkpoint.files)}
    here = sorted(checkpoint.path.iterdir())
    others = [path for path in here if path.suffix != ".safetensors" and path.name not in made]
    for path in itertools.chain(others, *(other.rglob("*") for other in others if other.is_dir())):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path}: is a link to nothing")
        if path.is_symlink() and path.resolve() in (path.parent / "_").resolve().parents:  # a copy would have no end
            raise ValueError(f"{path}: is a link to a folder that it is in")
    return [path for path in others if path.is_file() or path.is_dir()]


def _write_json(file: Path, content: object) -> None:
    with errors_name(file):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
