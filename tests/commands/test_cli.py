"""The command line: its commands, its exit codes and its errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hybrid_mxfp8 as mx
from hybrid_mxfp8.commands import cli


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"] if name is None else [name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m hybrid_mxfp8{f' {name}' if name else ''} ")


def test_exit_code_passes_through_and_an_unavailable_backend_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: Any) -> int:
        if args.times == 1:
            raise mx.BackendUnavailableError("backend cutlass: no GPU")
        return int(args.times)

    fake = types.SimpleNamespace(run=run, add_arguments=lambda p: p.add_argument("--times", type=int, default=1))
    monkeypatch.setattr(cli, "COMMANDS", {"fake": ("fake", "pretends")})
    monkeypatch.setitem(sys.modules, "hybrid_mxfp8.commands.fake", fake)
    assert (cli.main(["fake", "--times", "7"]), cli.main(["fake"])) == (7, 2)
    assert capsys.readouterr().err == "python -m hybrid_mxfp8 fake: backend cutlass: no GPU\n"


@pytest.mark.parametrize("program", ["-m hybrid_mxfp8 doctor", "-m bench --list"])
def test_a_reader_that_goes_away_is_no_traceback(program: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words, root = [sys.executable, *program.split()], Path(__file__).parents[2]
    with open(writing, "wb") as pipe:
        done = subprocess.run(words, cwd=root, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


NO_GPU = "device: there are 0 GPUs that this PyTorch can use, got 'cuda'"
SECONDS = "argument --budget: must be a positive number of seconds, got "
WRONG: list[tuple[str, str]] = [
    ("", r"the following arguments are required: COMMAND$"),
    ("bogus", r"argument COMMAND: invalid choice: 'bogus'"),
    ("doctor --bogus", r"unrecognized arguments: --bogus"),
    *((f"demo --experts {number}", f"argument --experts: invalid choice: {number}") for number in (0, 7)),
    ("demo --max-rows 0", r"argument --max-rows: must be a number of at least 1, got '0'"),
    ("demo --max-rows many", r"argument --max-rows: must be a number of at least 1, got 'many'"),
    ("quantize", r"the following arguments are required: IN, OUT, --experts"),
    ("quantize {tmp}/none {tmp}/out --experts *", r"none: no such file or folder"),
    ("quantize {file} {pipe} --experts * --force", r"pipe: must be a file or a folder to be replaced, got a device"),
    ("quantize {file} {ring} --experts nothing* --force", r"--experts: no matrix matches nothing\*"),
    ("accuracy --plot {tmp}/x.docx --synthetic --no-transformers", r"--plot: must end in \.png, \.svg, \.pdf"),
    ("accuracy --json {tmp}/no/x.json --synthetic --no-transformers", r"there is no folder"),
    ("accuracy --json {tmp} --synthetic --no-transformers", r": is a folder"),
    *((f"warmup --jobs {number}", f"--jobs: must be a number of at least 1, got '{number}'") for number in "0x"),
    ("warmup --arch 9.0", r"argument --arch: invalid choice: '9\.0'"),
    ("warmup --configs 1sm_128x64x128,", r"argument --configs: config: expected one of .* got ''"),
    ("warmup --configs 1sm_128x64x128_8x8", r"argument --configs: config: expected one of"),
    ("warmup --out-dtypes int8", r"argument --out-dtypes: expected some of bf16, fp16, fp32, got int8"),
    ("demo --synthetic --device cuda", NO_GPU),
    ("quantize {file} {tmp}/out --experts * --device cuda", NO_GPU),
    *((f"bench --budget={value}", f"{SECONDS}'{value}'") for value in ("x", "nan", "-1", "inf")),
    ("bench --from-json {tmp}/none", r"--from-json: .*none: .*No such file"),
    ("bench --from-json {text}", r"--from-json: .*text: Expecting value"),
    ("bench --from-json {json}", r"--from-json: .*json: must be a record of schema"),
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("file", "text", "json", "pipe", "ring")}
    save_file({"experts.w": torch.ones(2, 8, 64)}, found["file"])
    found["text"].write_text("no tensors")
    found["json"].write_text(json.dumps({"a": 1}))
    os.mkfifo(found["pipe"])
    found["ring"].symlink_to(found["ring"])
    return {**found, "tmp": tmp_path}


def run(words: Sequence[str]) -> int:
    try:
        return cli.main(words)
    except SystemExit as leaving:  # argparse's way
        return int(leaving.code or 0)


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_wrong_words(
    line: str, message: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, the reason on stderr, no traceback and nothing written."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = sorted(files["tmp"].iterdir())
    assert run([word.format(**files) for word in line.split()]) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err), said.err
    assert "Traceback" not in said.err
    assert sorted(files["tmp"].iterdir()) == before


@pytest.mark.parametrize("value", ["bogus", "cuda", "auto,triton", "0", "none"])
def test_wrong_backend_in_the_environment(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every function that chooses says so; a name given to the call is not affected."""
    x, counts = torch.ones(3, 32), torch.tensor([3], dtype=torch.int32)
    xq = mx.quantize_grouped(x, counts, backend="reference")
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    w, w13, w2 = (mx.quantize_weights(torch.ones(1, n, 32), backend="reference") for n in (8, 64, 32))
    calls: list[Callable[[], Any]] = [
        lambda: mx.quantize_grouped(x, counts),
        lambda: mx.quantize_weights(torch.ones(1, 8, 32)),
        lambda: mx.grouped_gemm(xq, w),
        lambda: mx.explain(xq, w),
        lambda: mx.grouped_gemm_workspace_size(w, 3),
        lambda: mx.moe_forward(x, w13, w2, ids, weights),
        lambda: mx.MXFP8Experts(w13, w2),
        lambda: mx.MoEWorkspace(w13, w2, max_tokens=3, top_k=1),
        lambda: torch.ops.hybrid_mxfp8.quantize_weights(torch.ones(1, 8, 32), "rceil", None),
    ]
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", value)
    message = f"HYBRID_MXFP8_BACKEND: must be one of auto, cutlass, triton, reference, got '{value}'"
    for call in calls:
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()
    assert run(["demo"]) == 2
    assert capsys.readouterr().err == f"{message}\n"
    assert mx.grouped_gemm(xq, w, backend="reference").shape == (3, 8)
