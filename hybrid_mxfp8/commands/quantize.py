"""The ``quantize`` command: convert a checkpoint's experts to MXFP8."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid_mxfp8.checkpoint.convert import Options, Plan, convert, plan
from hybrid_mxfp8.checkpoint.reader import Checkpoint
from hybrid_mxfp8.commands.terminal import progress, size
from hybrid_mxfp8.core.checks import resolve_device
from hybrid_mxfp8.core.formats import SCALE_ROUNDINGS
from hybrid_mxfp8.dispatch.device import default_device

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="a safetensors file, or the folder of a checkpoint")
    add("target", type=Path, metavar="OUT", help="a file, or a folder if IN is one")
    patterns = "names of the tensors to quantize, with * and ? as in a shell, such as '*.experts.*'; may be given again"
    add("--experts", action="append", required=True, metavar="PATTERN", help=patterns)
    others = "write FP8 matrices (128x128 blocks) that no PATTERN matches as bf16; default: copy them"
    add("--others-to-bf16", action="store_true", help=others)
    known = "default: as the model_type in config.json says; may be given again"
    kept = "stacks kept as (E, K, N), as gpt-oss has them"
    add("--transposed", action="append", metavar="PATTERN", help=f"{kept}; {known}")
    in_turns = "weights whose gate and up rows take turns, as gpt-oss's do; their biases are put in order, too"
    add("--interleaved", action="append", metavar="PATTERN", help=f"{in_turns}; {known}")
    add("--scale-rounding", choices=SCALE_ROUNDINGS, default="rceil", help="default: rceil")
    add("--force", action="store_true", help="replace OUT if it exists")
    add("--device", choices=("cuda", "cpu"), help="where to quantize (default: the GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Convert and print a summary; 0, 2 with a line on stderr if it failed, 130 if interrupted."""
    try:
        with _terminated_like_interrupted():
            print(describe(*_convert(args), args.target))
    except KeyboardInterrupt:
        print(f"quantize: interrupted, {args.target} was not written", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, and SIGHUP, of a terminal that is gone, remove what
    was half written, as Ctrl-C does. What is ignored, as SIGHUP under nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: handler for number in _ENDING if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _convert(args: argparse.Namespace) -> tuple[Plan, dict[str, float]]:
    """Convert, with a progress bar on stderr if that is a terminal; what was done, and each
    matrix's signal-to-noise in dB."""
    if not args.source.exists():
        raise FileNotFoundError(f"{args.source}: no such file or folder")
    check_target(args.source, args.target, args.force)
    device = default_device() if args.device is None else resolve_device(args.device)
    transposed, interleaved = (None if p is None else tuple(p) for p in (args.transposed, args.interleaved))
    options = Options(tuple(args.experts), args.scale_rounding, device, args.others_to_bf16, transposed, interleaved)
    with Checkpoint(args.source) as checkpoint:
        planned = plan(checkpoint, options)
        total = sum(tensor.entry.num_bytes for tensor in planned)
        with progress(total, unit="B", unit_scale=True, unit_divisor=1024) as bar:

            def advance(name: str, num_bytes: int) -> None:
                bar.set_description_str(name[-40:], refresh=False)
                bar.update(num_bytes)

            return planned, convert(checkpoint, planned, args.target, options, advance)


def check_target(source: Path, target: Path, force: bool) -> None:
    """Whether OUT may be written: neither IN nor inside it or around it (ValueError), and no more
    than an earlier OUT of IN's kind, with ``force`` (FileExistsError)."""
    a, b = (Path(os.path.realpath(path)) for path in (source, target))  # resolve() fails for links in a ring
    if a == b or (target.exists() and target.samefile(source)):
        raise ValueError(f"{target}: IN and OUT must not be the same")
    if (a in b.parents and source.is_dir()) or b in a.parents:
        raise ValueError(f"{target}: IN and OUT must not lie in one another")
    if not os.path.lexists(target):  # exists() is false for a link to nothing
        return
    if not force:
        raise FileExistsError(f"{target}: exists; --force replaces it")
    if target.is_dir() != source.is_dir():
        raise FileExistsError(f"{target}: is a {'folder' if target.is_dir() else 'file'}, unlike {source}")
    if target.is_dir() and target.is_symlink():
        raise FileExistsError(f"{target}: is a link to a folder, which --force does not replace")
    if target.is_dir() and any(target.iterdir()) and not any(target.glob("*.safetensors")):
        raise FileExistsError(f"{target}: is a folder with no safetensors file, which --force does not replace")


def describe(planned: Plan, signal_to_noise: dict[str, float], target: Path) -> str:
    """What was done, in a few lines."""
    quantized = [tensor for tensor in planned if tensor.action == "quantize"]
    before = sum(entry.num_bytes for tensor in quantized for entry in (tensor.entry, tensor.scales) if entry)
    after = sum(entry.num_bytes for tensor in quantized for entry in tensor.results)
    all_after = sum(entry.num_bytes for tensor in planned for entry in tensor.results)
    lines = [
        f"{target}: {len(quantized)} expert tensor{'s' if len(quantized) > 1 else ''} to MXFP8, "
        f"{size(before)} -> {size(after)} ({after / before:.2f}x); "
        f"all tensors {size(sum(tensor.entry.num_bytes for tensor in planned))} -> {size(all_after)}"
    ]
    names = Counter(re.sub(r"\b\d+\b", "*", tensor.entry.name) for tensor in quantized)
    lines.append("quantized: " + ", ".join(f"{name} ({count})" for name, count in sorted(names.items())))
    worst, db = min(signal_to_noise.items(), key=lambda item: item[1])
    lines.append(f"worst signal-to-noise {db:.1f} dB, in {worst}" if math.isfinite(db) else "no matrix lost anything")
    for what, tensors in (
        ("transposed from (E, K, N)", [tensor for tensor in planned if tensor.transposed]),
        ("gate and up rows put one after another", [tensor for tensor in planned if tensor.interleaved]),
        ("other FP8 tensors written as bf16", [tensor for tensor in planned if tensor.action == "widen"]),
    ):
        lines += [f"{what}: {len(tensors)}, {tensors[0].entry.name} among them"] if tensors else []
    if kept := [t.entry.name for t in planned if t.action == "copy" and t.matches and not t.interleaved]:
        lines.append(f"{len(kept)} matching vectors and biases stay as they were, {kept[0]} among them")
    return "\n".join(lines)
