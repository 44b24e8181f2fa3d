"""The command line: ``python -m hybrid_mxfp8 COMMAND``.

Each command is a module with ``add_arguments(parser)`` and ``run(args) -> exit code``. Only the module of the
command that is typed gets imported, so that ``doctor`` works where another command's dependencies are missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_mxfp8._version import __version__
from hybrid_mxfp8.errors import BackendUnavailableError

PROG = "python -m hybrid_mxfp8"


@dataclass(frozen=True)
class Command:
    """A word of the command line, the module that does the work, and one line of help."""

    name: str
    module: str
    help: str


COMMANDS = (
    Command("doctor", "hybrid_mxfp8.commands.doctor", "what is installed here, and which backends can run"),
    Command(
        "demo",
        "hybrid_mxfp8.commands.demo.command",
        "the main job on real weights, measured against fp32 and per-tensor FP8",
    ),
    Command("quantize", "hybrid_mxfp8.commands.quantize", "convert the experts of a safetensors checkpoint to MXFP8"),
    Command(
        "accuracy",
        "hybrid_mxfp8.commands.accuracy.command",
        "what MXFP8, bf16 and FP8 keep of real operands: a table and a plot",
    ),
    Command("warmup", "hybrid_mxfp8.commands.warmup", "compile the CUTLASS backend ahead of time"),
    Command("bench", "hybrid_mxfp8.commands.bench", "the benchmark suite of a checkout"),
)


def commands() -> dict[str, Command]:
    """The commands whose modules are part of this installation, by name."""
    return {c.name: c for c in COMMANDS if importlib.util.find_spec(c.module) is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 well, 1 the command found a fault, 2 it could not run.

    Args:
        argv: words after the program's name; default: those of this process.
    """
    known = commands()
    listing = "\n".join(f"  {c.name:<10} {c.help}" for c in known.values())
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="MXFP8 grouped GEMM for mixture-of-experts layers.",
        epilog=f"commands:\n{listing}\n\n{PROG} COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hybrid_mxfp8 {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=list(known), help=", ".join(known))
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # as it is: none may follow, but the error without a command would ask for it, too
    args = parser.parse_args(argv)

    command = known[args.command]
    module = importlib.import_module(command.module)
    command_parser = argparse.ArgumentParser(
        prog=f"{PROG} {command.name}", description=f"{command.help[0].upper()}{command.help[1:]}."
    )
    module.add_arguments(command_parser)
    try:
        code: int = module.run(command_parser.parse_args(args.arguments))
        sys.stdout.flush()
    except BackendUnavailableError as error:
        print(f"{PROG} {command.name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; without this Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
