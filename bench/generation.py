"""Generation with transformers: ms a token with experts in MXFP8 beside its own in bf16.

    python -m bench.generation --out FILE.json     # 73 s on an H200
    python -m bench.generation --tiny --out FILE.json    # anywhere: no figures to quote

8 layers of Qwen3-30B-A3B's sizes with random weights in bf16, and a copy of that model after
``quantize_model_``. They ``generate`` from the same random prompts, in turns, in one process. A
step's time is that between two calls of a stopping criterion that waits for the GPU. Their median,
without the first of each ``generate``, is ms a token. With a static cache transformers compiles
the model and captures it in CUDA graphs, with its dynamic one it runs eagerly. On a GPU newer
versions take ``batched_mm`` in the place of ``grouped_mm`` while they decode: that is
"transformers", and "grouped_mm" a copy that never does. The ratio is to the faster of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.dispatch.device import default_device

from . import report
from .run import why_not

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
OURS, DEFAULT, GROUPED = "hybrid_mxfp8", "transformers", "grouped_mm"
PROMPT = 32
"""Tokens."""
FIRST, STEPS = 8, 16
"""Steps of a ``generate`` that are not counted, prefill, compilation and capture, and that are."""

Models = Mapping[str, Any]


def make_models(tiny: bool, device: torch.device) -> Models:
    """Models for inference of the same weights, ours and transformers'."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from hybrid_mxfp8.integrations import transformers as integration

    integration.register()
    # The configuration's defaults are Qwen3-30B-A3B's sizes, but for these.
    sizes = {"num_hidden_layers": 1, "head_dim": 16, **TINY} if tiny else {"num_hidden_layers": 8, "head_dim": 128}
    options = {"dtype": torch.bfloat16, "experts_implementation": GROUPED}
    with device:
        config = Qwen3MoeConfig(norm_topk_prob=True, **sizes)
        baseline = AutoModelForCausalLM.from_config(config, **options).eval()
    ours, grouped = copy.deepcopy(baseline), copy.deepcopy(baseline)
    grouped._optimize_model_for_decode = contextlib.nullcontext  # where ``generate`` takes batched_mm
    ours.set_experts_implementation(OURS)
    integration.quantize_model_(ours, progress=False)
    return {OURS: ours, DEFAULT: baseline, GROUPED: grouped}


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode_ms(model: Any, prompt: torch.Tensor, cache_implementation: str) -> list[float]:
    """ms of each decoding step of one ``generate``, without its first."""
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        """Never stops, and notes when a step has ended."""

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            synchronize(ids.device)
            ends.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    ends: list[float] = []
    tokens = FIRST + STEPS
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[Clock()],
        cache_implementation=cache_implementation,
    )
    return [1e3 * (end - start) for start, end in itertools.pairwise(ends[FIRST - 1 :])]


@torch.no_grad()
def prefill_ms(model: Any, prompt: torch.Tensor) -> list[float]:
    """ms of one forward that fills a cache."""
    synchronize(prompt.device)
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    synchronize(prompt.device)
    return [1e3 * (time.perf_counter() - start)]


def row(case: str, models: Models, rounds: int, sample: Callable[[Any], list[float]]) -> dict[str, Any]:
    """The case's medians in ms, from ``rounds`` in which the models take turns. A round before is
    not counted: whichever model attends to so many tokens first waits for cuDNN's plans of that."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    for counted in [False, *[True] * rounds]:
        for name, model in models.items():
            found = sample(model)
            samples[name] += found if counted else []
    ms = {name: round(statistics.median(values), 3) for name, values in samples.items()}
    line = {"case": case, "ms": ms, "ratio": round(min(ms[DEFAULT], ms[GROUPED]) / ms[OURS], 2)}
    report.say(f"{case}: {', '.join(f'{name} {ms[name]:.2f} ms' for name in ms)}, {line['ratio']:.2f}x")
    return line


def random_prompt(model: Any, *shape: int) -> torch.Tensor:
    """Tokens (batch, length)."""
    return torch.randint(3, model.config.vocab_size, shape, device=model.device)


def measure(models: Models, tiny: bool) -> Iterator[dict[str, Any]]:
    """The rows of all cases."""
    prompt = functools.partial(random_prompt, models[OURS])
    batch, length = (2, 16) if tiny else (4, 2048)
    prefill = functools.partial(prefill_ms, prompt=prompt(batch, length))
    yield row(f"prefill of {batch} x {length} tokens", models, 9, prefill)
    cases = [("dynamic", "eager", batch) for batch in ((2,) if tiny else (1, 16, 64))]
    for cache, how, batch in cases if tiny else [*cases, ("static", "static cache", 16)]:
        # What was compiled for another batch would be compiled again for any batch.
        torch._dynamo.reset()
        decode = functools.partial(decode_ms, prompt=prompt(batch, PROMPT), cache_implementation=cache)
        yield row(f"a token, batch {batch}, {how}", models, 2, decode)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE.json", required=True)
    add("--tiny", action="store_true", help="a layer that any machine has room for")
    add("--commit", metavar="ID", help="recorded as the commit, where there is no git checkout")
    args = parser.parse_args(argv)
    # On a CPU its real sizes take tens of GB and, without a word, a long time.
    if not args.tiny and (reason := why_not()) is not None:
        sys.exit(f"Nothing was measured: {reason}. A CPU can try it with --tiny.")
    started = time.monotonic()
    torch.manual_seed(0)
    import transformers

    models = make_models(args.tiny, default_device())
    ids = random_prompt(models[OURS], 4, PROMPT)
    with torch.no_grad():
        snr = mx.signal_to_noise_db(*(models[name](ids).logits for name in (DEFAULT, OURS)))
    report.say(f"logits at {snr:.1f} dB of {DEFAULT}'s")
    machine = report.describe_machine(args.commit) if torch.cuda.is_available() else {"gpu": "none"}
    record: dict[str, Any] = {
        "machine": machine | {"transformers": transformers.__version__},
        "method": " ".join(__doc__.partition("\n\n")[2].rpartition("\n\n")[2].split()),
        "model": "tiny" if args.tiny else "8 layers of qwen3-30b-a3b",
        "logits_db": round(snr, 1),
        "rows": [],
    }
    for each in measure(models, args.tiny):
        record["rows"].append(each)
        record["seconds"] = round(time.monotonic() - started, 1)
        report.write_json(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
