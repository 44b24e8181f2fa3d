"""Generation with transformers: ms a token with experts in MXFP8 beside its own ``grouped_mm``.

    python -m bench.generation --out FILE.json     # some 100 s on an H100, half of it compilation
    python -m bench.generation --layers 2 --batches 1 --static-batches "" --out FILE.json
    python -m bench.generation --model tiny --out FILE.json        # anywhere: no figures to quote

A model of Qwen3-30B-A3B's sizes, but for its layers, with random weights in bf16, and a copy of it
after ``quantize_model_``. Both ``generate`` from the same random prompts, in turns, in one process.
A step's time is that between two calls of a stopping criterion that waits for the GPU. Their
median, without the first of each ``generate``, is ms a token. With a static cache transformers
compiles the model and captures it in CUDA graphs, with its dynamic one it runs eagerly. Newer
versions take ``batched_mm`` in the place of ``grouped_mm`` while they decode.
"""

from __future__ import annotations

import argparse
import copy
import functools
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

SIZES = {
    "qwen3-30b-a3b": (151936, 2048, 768, 32, 4, 128, 128, 8),
    "tiny": (97, 64, 32, 4, 2, 16, 8, 2),
}
NAMES = (
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
)
OURS, BASELINE = "hybrid_mxfp8", "grouped_mm"
PROMPT = 32
"""Tokens."""
FIRST = 8
"""Steps of a ``generate`` that are not counted: prefill, compilation, capture."""
PREFILL = (4, 2048)
PREFILL_ROUNDS = 9

Models = Mapping[str, Any]


def make_models(size: str, layers: int, device: torch.device) -> dict[str, Any]:
    """Two models for inference of the same weights, ours and transformers'."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from hybrid_mxfp8.integrations import transformers as integration

    integration.register()
    sizes = dict(zip(NAMES, SIZES[size], strict=True))
    config = Qwen3MoeConfig(num_hidden_layers=layers, norm_topk_prob=True, **sizes)
    options = {"dtype": torch.bfloat16, "experts_implementation": BASELINE}
    with device:
        baseline = AutoModelForCausalLM.from_config(config, **options).eval()
    ours = copy.deepcopy(baseline)
    ours.set_experts_implementation(OURS)
    integration.quantize_model_(ours, progress=False)
    return {OURS: ours, BASELINE: baseline}


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps_ms(model: Any, prompt: torch.Tensor, steps: int, cache_implementation: str) -> list[float]:
    """ms of each decoding step of one ``generate``, without its first."""
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        """Never stops, and notes when a step has ended."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            synchronize(ids.device)
            self.ends.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    clock, tokens = Clock(), FIRST + steps
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[clock],
        cache_implementation=cache_implementation,
    )
    return [1e3 * (end - start) for start, end in zip(clock.ends[FIRST - 1 :], clock.ends[FIRST:], strict=False)]


@torch.no_grad()
def prefill_ms(model: Any, prompt: torch.Tensor) -> list[float]:
    """ms of one forward that fills a cache."""
    synchronize(prompt.device)
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    synchronize(prompt.device)
    return [1e3 * (time.perf_counter() - start)]


def row(case: str, models: Models, rounds: int, sample: Callable[[Any], list[float]]) -> dict[str, Any]:
    """The case's medians in ms, from ``rounds`` in which the models take turns."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            samples[name] += sample(model)
    ms = {name: round(statistics.median(values), 3) for name, values in samples.items()}
    found = {"case": case, "ms": ms, "ratio": round(ms[BASELINE] / ms[OURS], 2)}
    report.say(f"{case}: {OURS} {ms[OURS]:.2f} ms, {BASELINE} {ms[BASELINE]:.2f} ms, {found['ratio']:.2f}x")
    return found


def prompt_for(model: Any, *shape: int) -> torch.Tensor:
    """Random tokens (batch, length)."""
    return torch.randint(3, model.config.vocab_size, shape, device=model.device)


def measure(
    models: Models, batches: Sequence[int], static_batches: Sequence[int], steps: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """The rows of all cases."""
    ids = prompt_for(models[BASELINE], *PREFILL)
    sample: Callable[[Any], list[float]] = functools.partial(prefill_ms, prompt=ids)
    yield row("prefill of {} x {} tokens".format(*PREFILL), models, PREFILL_ROUNDS, sample)
    for cache, how, sizes in (("dynamic", "eager", batches), ("static", "static cache", static_batches)):
        for batch in sizes:
            # What was compiled for another batch would be compiled again for any batch.
            torch._dynamo.reset()
            ids = prompt_for(models[BASELINE], batch, PROMPT)
            sample = functools.partial(steps_ms, prompt=ids, steps=steps, cache_implementation=cache)
            yield row(f"a token, batch {batch}, {how}", models, rounds, sample)


def integers(text: str) -> list[int]:
    """Of a list with commas, which may be empty."""
    return [int(part) for part in text.split(",") if part]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE.json", required=True)
    add("--model", choices=SIZES, default="qwen3-30b-a3b", help="its sizes")
    add("--layers", type=int, default=8)
    add("--batches", type=integers, default=[1, 16, 64], metavar="N,N", help="with the dynamic cache, eagerly")
    add("--static-batches", type=integers, default=[16], metavar="N,N", help="compiled: some 25 s for each model")
    add("--steps", type=int, default=16, help="counted steps of a round")
    add("--rounds", type=int, default=2)
    add("--commit", metavar="ID", help="recorded as the commit, where there is no git checkout")
    args = parser.parse_args(argv)
    # On a CPU its real sizes take tens of GB and, without a word, a long time.
    if args.model != "tiny" and (reason := why_not()) is not None:
        sys.exit(f"Nothing was measured: {reason}. A CPU can try it with --model tiny.")
    started = time.monotonic()
    torch.manual_seed(0)
    import transformers

    models = make_models(args.model, args.layers, default_device())
    ids = prompt_for(models[BASELINE], 4, PROMPT)
    with torch.no_grad():
        snr = mx.signal_to_noise_db(*(models[name](ids).logits for name in (BASELINE, OURS)))
    report.say(f"logits at {snr:.1f} dB of {BASELINE}'s")
    machine = report.describe_machine(args.commit) if torch.cuda.is_available() else {"gpu": "none"}
    record: dict[str, Any] = {
        "machine": machine | {"transformers": transformers.__version__},
        "method": " ".join(__doc__.partition("\n\n")[2].rpartition("\n\n")[2].split()),
        "model": f"{args.layers} layers of {args.model}",
        "logits_db": round(snr, 1),
        "rows": [],
    }
    for each in measure(models, args.batches, args.static_batches, args.steps, args.rounds):
        record["rows"].append(each)
        record["seconds"] = round(time.monotonic() - started, 1)
        report.write_json(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
