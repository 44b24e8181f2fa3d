"""The command line: ``python -m hybrid_mxfp8 COMMAND``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> exit code``. Only that of
the command typed is imported, so that ``doctor`` works where another's dependencies are missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from hybrid_mxfp8 import env
from hybrid_mxfp8._version import __version__
from hybrid_mxfp8.errors import BackendUnavailableError

PROG = "python -m hybrid_mxfp8"

COMMANDS = {
    "doctor": ("doctor", "what is installed here, and which backends can run"),
    "demo": ("demo.command", "the main job on real weights, measured against fp32 and per-tensor FP8"),
    "quantize": ("quantize", "convert the experts of a safetensors checkpoint to MXFP8"),
    "accuracy": ("accuracy.command", "what MXFP8, bf16 and FP8 keep of real operands: a table and a plot"),
    "warmup": ("warmup", "compile the CUTLASS backend ahead of time"),
    "cache": ("cache", "list or clear what was compiled and verified here"),
    "bench": ("bench", "the benchmark suite of a checkout"),
}
"""Each command's module below this package, and its line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's: returns 0, or 1 for a fault, 2 if it could not
    run."""
    listing = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="MXFP8 grouped GEMM for mixture-of-experts layers.",
        epilog=f"commands:\n{listing}\n\n{PROG} COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hybrid_mxfp8 {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help=", ".join(COMMANDS))
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # or the error without a command would ask for it, too
    args = parser.parse_args(argv)
    env.start()

    name, text = COMMANDS[args.command]
    module = importlib.import_module(f"hybrid_mxfp8.commands.{name}")
    prog = f"{PROG} {args.command}"
    command_parser = argparse.ArgumentParser(prog=prog, description=f"{text[0].upper()}{text[1:]}.")
    module.add_arguments(command_parser)
    try:
        code: int = module.run(command_parser.parse_args(args.arguments))
        sys.stdout.flush()
    except BackendUnavailableError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; without this Python complains when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
