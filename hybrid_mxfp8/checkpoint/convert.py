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
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from hybrid_mxfp8 import env
from hybrid_mxfp8.checkpoint.atomic import atomic_write, replace_folder
from hybrid_mxfp8.checkpoint.fp8_blocks import BLOCK, block_scales, dequantize
from hybrid_mxfp8.checkpoint.parallel import in_order
from hybrid_mxfp8.checkpoint.reader import INDEX_FILE, METADATA, NO_MXFP4, Checkpoint, is_mxfp8, read_json, scale_entry
from hybrid_mxfp8.checkpoint.source_layout import CONFIG_FILE, Patterns, layout_of, matches, parts_of
from hybrid_mxfp8.checkpoint.writer import Entry, SafetensorsWriter, errors_name
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
"""Which matrix of a stack, rows of it (R, K), and their bytes in the source."""


@dataclass(frozen=True)
class Options:
    """How to convert."""

    patterns: Patterns  # as in a shell, for the names of the expert tensors
    scale_rounding: str = "rceil"
    device: torch.device | None = None  # where to quantize; None means the CPU
    others_to_bf16: bool = False  # FP8 matrices in blocks of 128x128 that no pattern matches
    transposed: Patterns | None = None  # stacks kept as (E, K, N); None: as config.json says
    interleaved: Patterns | None = None  # weights of interleaved gate and up rows; None: likewise


@dataclass
class Plan:
    """What becomes of the tensors of a checkpoint."""

    quantized: list[Entry] = field(default_factory=list)  # to MXFP8
    widened: list[Entry] = field(default_factory=list)  # from FP8 to bf16
    copied: list[Entry] = field(default_factory=list)  # byte for byte
    dropped: list[Entry] = field(default_factory=list)  # scales of FP8 tensors that are converted
    kept: list[str] = field(default_factory=list)  # names of copied ones that match but are no matrices
    scales: dict[str, Entry] = field(default_factory=dict)  # the dropped ones, by their weights' names
    transposed: set[str] = field(default_factory=set)  # names of quantized stacks (E, K, N)
    interleaved: set[str] = field(default_factory=set)  # names of weights and biases to be put in order

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as they are in the source."""
        return sum(e.num_bytes for part in (self.quantized, self.widened, self.copied, self.dropped) for e in part)

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """Of a tensor in the result: (..., N, K)."""
        *stack, n, k = entry.shape
        return (*stack, k, n) if entry.name in self.transposed else entry.shape


@dataclass
class Summary:
    """What a conversion did; bytes in the source and in the result, scales included."""

    plan: Plan
    expert_bytes_before: int = 0
    expert_bytes_after: int = 0
    bytes_after: int = 0
    worst_db: float = math.inf  # signal-to-noise against what the source's bytes stand for
    worst_name: str = ""


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """What to do with each tensor, by the headers; ValueError for one that can't be quantized."""
    found = Plan()
    entries = [checkpoint.entry(name) for name in checkpoint.names]
    for name in checkpoint.names:
        weight = checkpoint.mxfp4_weight(name)
        if weight and (matches(name, options.patterns) or matches(weight, options.patterns)):
            raise ValueError(f"{checkpoint.place(name)}: {NO_MXFP4}")
    _find_layout(found, checkpoint, entries, options)
    for entry in entries:
        widened = options.others_to_bf16 and len(entry.shape) in (2, 3) and 0 not in entry.shape
        if (widened or _is_quantized(entry, options)) and (scales := block_scales(checkpoint, entry)):
            found.scales[entry.name] = scales
    dropped = {scales.name for scales in found.scales.values()}
    for entry in entries:
        if entry.name in dropped:
            found.dropped.append(entry)
        elif _is_quantized(entry, options):
            _check_source(checkpoint, entry, found)
            found.quantized.append(entry)
        elif entry.name in found.scales:
            found.widened.append(entry)
        else:
            found.copied.append(entry)
            if matches(entry.name, options.patterns) and entry.name not in found.interleaved:
                found.kept.append(entry.name)
    if not found.quantized:
        shown = ", ".join(checkpoint.names[:3]) + (", ..." if len(checkpoint.names) > 3 else "")
        raise ValueError(f"--experts: no matrix matches {' or '.join(options.patterns)} among {shown or 'no tensors'}")
    return found


def _find_layout(found: Plan, checkpoint: Checkpoint, entries: Sequence[Entry], options: Options) -> None:
    """Which tensors that will be quantized are not (E, N, K) with gate before up; ValueError where
    options, ``model_type`` and shapes contradict one another."""
    known = layout_of(checkpoint.path)
    transposed = known.transposed if options.transposed is None else options.transposed
    interleaved = known.interleaved if options.interleaved is None else options.interleaved
    quantized = {entry.name for entry in entries if _is_quantized(entry, options)}
    stacks = {e.name: e.shape for e in entries if len(e.shape) == 3}
    found.transposed = {name for name in quantized & stacks.keys() if matches(name, transposed)}
    found.interleaved = {name for name in quantized if matches(name, interleaved)}
    for option, what, given, names in (
        ("transposed", "stack of three dimensions", options.transposed, found.transposed),
        ("interleaved", "matrix", options.interleaved, found.interleaved),
    ):
        if given and not names:
            raise ValueError(f"--{option}: no {what} that --experts matches has a name like {' or '.join(given)}")
    if known.interleaved and options.interleaved is None:
        fused = sorted(n for n in quantized - found.interleaved if "gate_up_proj" in n or "w13" in n)
        if fused:
            likely = f"has gate and up rows in turns in {' or '.join(known.interleaved)}"
            raise ValueError(f"{fused[0]}: a model of config.json's model_type {likely}: --interleaved says where here")
    for up in (name for name in stacks if "gate_up_proj" in name):
        down = up.replace("gate_up_proj", "down_proj")
        if down in stacks and quantized & {up, down}:
            _check_last_dimensions(*((name, stacks[name], matches(name, transposed)) for name in (up, down)))
    shapes = {entry.name: entry.shape for entry in entries}
    for weight in [entry for entry in entries if entry.name in found.interleaved]:
        n = found.shape(weight)[-2]
        biases = f"{weight.name}_bias", f"{weight.name.removesuffix('weight')}bias"
        found.interleaved |= {name for name in biases if shapes.get(name, (0,))[-1:] == (n,)}


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


def _is_quantized(entry: Entry, options: Options) -> bool:
    return matches(entry.name, options.patterns) and len(entry.shape) >= 2 and not entry.name.endswith("bias")


def _check_source(checkpoint: Checkpoint, entry: Entry, found: Plan) -> None:
    dtype, shape, fp8 = entry.dtype, found.shape(entry), entry.name in found.scales
    place, scale_name = checkpoint.place(entry.name), checkpoint.scale_of(entry.name)
    if dtype not in SOURCE_DTYPES and not fp8:
        quantized = dtype.startswith("F8") or dtype == "U8"
        hint = "it is quantized already" if quantized else "only those are converted, and FP8 in blocks of 128x128"
        raise ValueError(f"{place}: dtype must be BF16, F16 or F32, got {dtype}: {hint}")
    if len(shape) > 3:
        raise ValueError(f"{place}: must have shape (N, K) or (E, N, K), got {shape}")
    if not math.prod(shape) or shape[-1] % BLOCK_SIZE:
        which = f"its {'second' if entry.name in found.transposed else 'last'} dimension"
        raise ValueError(f"{place}: must have K, {which}, a positive multiple of {BLOCK_SIZE}, got {entry.shape}")
    if entry.name in found.interleaved and shape[-2] % 2:
        raise ValueError(f"{place}: must have an even N for gate and up rows in turns, got {shape}")
    if fp8 and entry.name in found.transposed | found.interleaved:
        raise ValueError(f"{place}: FP8 in blocks of 128x128 must be (E, N, K) with all gate rows first")
    if scale_name is not None and not fp8:
        raise ValueError(f"{place}: has scales, {scale_name}, so it is quantized already")


def convert(
    checkpoint: Checkpoint, planned: Plan, target: Path, options: Options, progress: Progress = lambda name, size: None
) -> Summary:
    """Convert a safetensors file, or each file of a checkpoint's folder; ``target`` appears when it
    is whole, and replaces what is there.

    Files of other kinds are copied, but for those that describe a quantization. ``config.json``
    gets a ``quantization_config`` with the modules whose matrices stay as
    ``modules_to_not_convert``. ValueError for NaN or Inf in a tensor, a ``config.json`` that is
    none or can't say what the result is, and a link to nothing; OSError for a file that can't be
    read or written.
    """
    conversion = _Conversion(checkpoint, planned, options, progress, Summary(planned))
    target.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.path.is_dir():
        conversion.folder(target)
    else:
        conversion.file(checkpoint.path, target)
    return conversion.summary


@dataclass(frozen=True)
class _Conversion:
    checkpoint: Checkpoint
    planned: Plan
    options: Options
    progress: Progress
    summary: Summary

    def folder(self, target: Path) -> None:
        source = self.checkpoint.path
        others = _other_files(self.checkpoint)  # before anything is converted, which may take hours
        config = _new_config(self.checkpoint, self.planned)
        with atomic_write(target) as folder:
            folder.mkdir()
            weight_map: dict[str, str] = {}
            for file in self.checkpoint.files:
                weight_map |= dict.fromkeys(self.file(file, folder / file.name), file.name)
            for path in others:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, folder / path.name)
            if (source / INDEX_FILE).exists():
                metadata = {"total_size": self.summary.bytes_after}
                _write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
            if config is not None:
                _write_json(folder / CONFIG_FILE, config)
            replace_folder(folder, target)

    def file(self, file: Path, target: Path) -> list[str]:
        """Convert the tensors of one file; returns the names of all tensors in ``target``."""
        p, summary = self.planned, self.summary
        quantized, widened, copied, dropped = (
            [entry for entry in part if self.checkpoint.file(entry.name) == file]
            for part in (p.quantized, p.widened, p.copied, p.dropped)
        )
        shapes = {q.name: p.shape(q) for q in quantized}
        after = [e for name, shape in shapes.items() for e in (Entry(name, "F8_E4M3", shape), scale_entry(name, shape))]
        entries = [*copied, *(Entry(entry.name, "BF16", entry.shape) for entry in widened), *after]
        scales = [p.scales[entry.name] for entry in quantized if entry.name in p.scales]
        summary.expert_bytes_before += sum(e.num_bytes for e in [*quantized, *scales])
        summary.expert_bytes_after += sum(e.num_bytes for e in after)
        summary.bytes_after += sum(e.num_bytes for e in entries)
        said = {**METADATA, "mxfp8.scale_rounding": self.options.scale_rounding} if quantized else {}
        with SafetensorsWriter(target, entries, self.checkpoint.files[file] | said) as writer:
            for entry in quantized:
                self.quantize(entry, writer)
            for entry in widened:
                for _, w, num_bytes in self.blocks(entry):
                    writer.append(entry.name, w.bfloat16())
                    self.progress(entry.name, num_bytes)
            for entry in copied:
                tensor = self.checkpoint.tensor(entry.name)
                writer.append(entry.name, gate_then_up(tensor, -1) if entry.name in p.interleaved else tensor)
                self.progress(entry.name, entry.num_bytes)
            for entry in dropped:
                self.progress(entry.name, entry.num_bytes)
        return [e.name for e in entries]

    def quantize(self, entry: Entry, writer: SafetensorsWriter) -> None:
        name, summary = entry.name, self.summary
        energies: dict[str, tuple[float, float]] = {}  # of each matrix, and of what it lost
        with contextlib.closing(in_order(self.quantized, self.blocks(entry), self.threads)) as done:
            for matrix, num_bytes, values, scales, signal, noise in done:
                if not math.isfinite(signal) or not math.isfinite(noise):
                    place = self.checkpoint.place(name) + matrix
                    raise ValueError(f"{place}: holds NaN or Inf, each of which would make its whole block of 32 NaN")
                writer.append(name, values)
                writer.append(f"{name}_scale_inv", scales)
                self.progress(name, num_bytes)
                before = energies.get(matrix, (0.0, 0.0))
                energies[matrix] = before[0] + signal, before[1] + noise
        for matrix, (signal, noise) in energies.items():
            db = decibels(signal, noise)
            if db < summary.worst_db or not summary.worst_name:
                summary.worst_db, summary.worst_name = db, name + matrix

    @property
    def threads(self) -> int:
        """Blocks at a time. Triton's interpreter takes one, a GPU is busy with one."""
        on_cpu = self.options.device is None or self.options.device.type == "cpu"
        return min(torch.get_num_threads(), MAX_THREADS) if on_cpu and not env.triton_interpret() else 1

    def quantized(self, block: Block) -> tuple[str, int, torch.Tensor, torch.Tensor, float, float]:
        """Elements and scales of a block, and the sums of squares of it and of what it lost."""
        matrix, w, num_bytes = block
        w = w.float()  # once for all that follows
        wq = quantize_weights(w.unsqueeze(0), scale_rounding=self.options.scale_rounding)
        signal, noise = _energy(w), _energy(wq.dequantize()[0].sub_(w))
        return matrix, num_bytes, wq.values, wq.linear_scales(), signal, noise

    def blocks(self, entry: Entry) -> Iterator[Block]:
        """A tensor's matrices, each in blocks of rows."""
        shape, scales = self.planned.shape(entry), self.planned.scales.get(entry.name)
        n, k = shape[-2:]
        parts = 2 if entry.name in self.planned.interleaved else 1  # gate's rows, then up's
        rows = max(1, BLOCK_ELEMENTS // k // parts)
        if scales:
            rows = max(1, rows // BLOCK) * BLOCK  # a block begins where one of the source's does
        item = entry.num_bytes // math.prod(shape)
        for e in range(shape[0]) if len(shape) == 3 else (None,):
            for part, start in itertools.product(range(parts), range(0, n // parts, rows)):
                end = min(start + rows, n // parts)
                w = self.rows(entry.name, e, start * parts, end * parts)[part::parts]
                if scales:
                    w = dequantize(w, self.rows(scales.name, e, start // BLOCK, ceil_div(end, BLOCK)))
                yield "" if e is None else f"[{e}]", w, (end - start) * k * item

    def rows(self, name: str, e: int | None, start: int, end: int) -> torch.Tensor:
        """Rows of a matrix, or of one of a stack."""
        part = self.checkpoint.part(name)
        tensor: torch.Tensor
        if e is None:
            tensor = part[start:end]
        elif name in self.planned.transposed:
            tensor = part[e : e + 1, :, start:end][0].T.contiguous()
        else:
            tensor = part[e : e + 1, start:end][0]
        return tensor.to(self.options.device or "cpu")


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
    floats = [*planned.widened, *(entry for entry in planned.copied if entry.dtype in SOURCE_DTYPES)]
    weights = (entry.name for entry in floats if len(entry.shape) >= 2 and entry.name.endswith(".weight"))
    untouched = sorted(name.removesuffix(".weight") for name in weights)
    return {**config, "quantization_config": {**QUANTIZATION_CONFIG, "modules_to_not_convert": untouched}}


def _check_one_format(checkpoint: Checkpoint, before: Sequence[Any], planned: Plan) -> None:
    """That one ``quantization_config`` can say what all weights are in the result."""
    file = checkpoint.path / CONFIG_FILE
    fp8 = [entry for entry in planned.copied if entry.dtype.startswith("F8")]
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
    packed = [e for e in planned.copied if e.dtype in ("U8", "I8", "I32") and len(e.shape) > 1 and e.name not in scales]
    if others and (packed or not planned.dropped):
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
