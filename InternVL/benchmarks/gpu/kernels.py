"""Compare attention, decoding and the optimizer step with a plain float64 or float32 computation.

Shapes: H query heads, K key/value heads, L tokens, D head dimension, N tiles.
"""

import itertools
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.check import Check, Skipped
from benchmarks.shapes import Shape, random_model
from internvl_chat.inference.decoding import Decoder
from internvl_chat.model.attention import VARLEN, bidirectional_attention, varlen_attention
from internvl_chat.model.tiny import TinyShape
from internvl_chat.train.optim.adamw import build_adamw

_DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
# (H, K, D) of InternVL3-8B, and smaller values for CPUs.
_HEADS = {"8b": (28, 4, 128), "small": (4, 2, 32)}
_LENGTHS = {"8b": (700, 1, 33, 1500, 128), "small": (60, 1, 33, 130)}
_TILES = {"8b": (4, 16, 1025, 64), "small": (2, 4, 65, 32)}  # (N, H, L, D)
# A model of two layers with the attention heads of InternVL3-8B, and a smaller one for CPUs.
_DECODERS = {
    "8b": Shape(TinyShape(56, 32, 1, 2, width=3584, layers=2, heads=28, kv_heads=4), 4096, 2048),
    "small": Shape(TinyShape(56, 32, 1, 2, width=64, layers=2, heads=4, kv_heads=2), 128, 512),
}
_PROMPTS = {"8b": (5, 700, 64, 301), "small": (5, 70, 33)}
_NEW_TOKENS, _END = 12, 1
# Shape of the weight matrix in the optimizer test.
_WEIGHTS = {"8b": (18_944, 3_584), "small": (512, 384)}
_LEARNING_RATE = 1e-3


def attention(check: Check) -> None:
    """Check attention over packed records, over tiles and in decoding, each in bf16 and float32."""
    for name, dtype in _DTYPES.items():
        _packed(check, name, dtype)
        _tiles(check, name, dtype)
        _decoded(check, name, dtype)
    worst = max(metric["error"] / metric["tolerance"] for metric in check.metrics.values())
    check.summary = f"{len(check.metrics)} comparisons; errors are at most {worst:.0%} of their tolerances"


def _packed(check: Check, name: str, dtype: torch.dtype) -> None:
    """Compare causal attention over packed records with that over separate records, including gradients."""
    heads, kv_heads, features = _HEADS[check.size]
    lengths = _LENGTHS[check.size]
    shapes = [(1, h, sum(lengths), features) for h in (heads, kv_heads, kv_heads, heads)]
    query, key, value, upstream = _random(shapes, dtype, check.device)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=check.device)

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, _ = varlen_attention(
            nn.Module(), query, key, value, None, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
            max_length_q=max(lengths), max_length_k=max(lengths),
        )  # fmt: skip
        return out.transpose(1, 2)

    def separate(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        records = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([exact_attention(*record, causal=True) for record in records], dim=2)

    expected = _with_gradients(separate, [x.double() for x in (query, key, value)], upstream.double())
    actual = _with_gradients(packed, [query, key, value], upstream)
    tolerance = attention_tolerance(query, key, max(lengths))
    for part, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        check.compare(f"{VARLEN} {name} {part}", relative_error(a, b), tolerance)


def _tiles(check: Check, name: str, dtype: torch.dtype) -> None:
    """Compare the attention of the vision tower with exact attention, including the gradients."""
    shape = _TILES[check.size]
    query, key, value, upstream = _random([shape] * 4, dtype, check.device)
    expected = _with_gradients(exact_attention, [x.double() for x in (query, key, value)], upstream.double())
    tolerance = attention_tolerance(query, key, shape[2])

    def tower(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return bidirectional_attention(query, key, value, VARLEN)

    actual = _with_gradients(tower, [query, key, value], upstream)
    for part, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        check.compare(f"tiles {name} {part}", relative_error(a, b), tolerance)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Compute attention with two matrix products and a softmax."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(dim=-1) @ value


def attention_tolerance(query: Tensor, key: Tensor, length: int) -> float:
    """Return a bound on the relative rounding error of attention and its gradients.

    bf16: there are at most four consecutive roundings (scores or their gradients, weights, sum, result), each
    by at most half an epsilon. The bound is twice the sum of these errors.

    float32: sums of D and of L terms have random rounding errors. Because of the exponential function, the
    absolute error of a score equals the relative error of its weight.
    """
    eps = torch.finfo(query.dtype).eps
    if query.dtype == torch.bfloat16:
        return 4 * eps
    norms = [x.double().norm(dim=-1).max().item() for x in (query, key)]
    return eps * (norms[0] * norms[1] + length**0.5)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, divided by the norm of the expected tensor."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _with_gradients(call: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _random(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes]


@torch.no_grad()
def _decoded(check: Check, name: str, dtype: torch.dtype) -> None:
    """Compare decoded tokens with the logits of a float64 model without a KV cache.

    The logit of a decoded token may be smaller than the largest logit by the rounding error of two logits.
    """
    device = torch.device(check.device)
    model = random_model(_DECODERS[check.size], 0, attn="eager", device=device)
    model = model.language_model.to(dtype).eval()
    embedding = model.get_input_embeddings()
    generator = torch.Generator(device).manual_seed(0)
    lengths = _PROMPTS[check.size]
    prompts = [embedding(torch.randint(2, 500, (n,), device=device, generator=generator)) for n in lengths]

    def decode(prompts: list[Tensor]) -> list[list[int]]:
        decoder = Decoder(model, end_id=_END)
        answers: list[list[int]] = [[] for _ in prompts]
        for number, token in decoder.run(prompts, max_new_tokens=_NEW_TOKENS):
            if token is not None:
                answers[number].append(token)
        return answers

    answers = decode(prompts)
    for number, prompt in enumerate(prompts):
        check.expect(decode([prompt]) == [answers[number]], f"{name}: answer {number} depends on the batch")
    model.double()
    worst, largest = 0.0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = answer if len(answer) == _NEW_TOKENS else [*answer, _END]
        tokens = torch.tensor(answer, device=device)
        inputs = torch.cat([prompt.double(), embedding(tokens[:-1])]).unsqueeze(0)
        logits = model(inputs_embeds=inputs, use_cache=False).logits[0, len(prompt) - 1 :]
        regret = logits.max(dim=-1).values - logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        worst, largest = max(worst, regret.max().item()), max(largest, logits.abs().max().item())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    # Random rounding errors of the float32 sums in all matrix products and, in bf16, of about 12 results per
    # layer.
    tolerance = 2 * sum(m.in_features for m in linear) ** 0.5 * torch.finfo(torch.float32).eps
    if dtype == torch.bfloat16:
        tolerance += 2 * (12 * model.config.num_hidden_layers) ** 0.5 * torch.finfo(dtype).eps
    check.compare(f"decoded {name}", worst / largest, tolerance)


def optimizer(check: Check) -> None:
    """Compare the results and the speed of the compiled and the eager optimizer step for bf16 weights."""
    if not check.on_gpu and shutil.which("c++") is None:
        raise Skipped("torch.compile requires a C++ compiler")
    steps = {
        (precision, compiled): _step(check, precision, compiled)
        for precision in ("master", "stochastic")
        for compiled in (False, True)
    }
    exact = steps["master", False].master
    # A step rounds the float32 weight twice, and its update (including both moments) about 16 times.
    absolute = 2 * 2**-24 * (2 * exact.abs().max().item() + 32 * _LEARNING_RATE)
    error = (steps["master", True].master - exact).abs().max().item()
    check.compare("masters", error, absolute)
    for compiled, name in ((False, "eager"), (True, "compiled")):
        error = steps["stochastic", compiled].weight.float() - exact
        spacing = torch.finfo(torch.bfloat16).eps * exact.abs() + absolute
        check.compare(f"stochastic {name}, in spacings", (error.abs() / spacing).max().item(), 1.0)
        # For independent, unbiased errors, the mean is within six of its standard deviations.
        deviation = error.square().mean().sqrt().item() / error.numel() ** 0.5
        check.compare(f"stochastic {name}, bias", abs(error.mean().item()), 6 * deviation)
    rates = []
    for precision in ("master", "stochastic"):
        eager, compiled = (steps[precision, c].seconds / exact.numel() for c in (False, True))
        check.add(**{f"{precision}, ns a weight": {"eager": 1e9 * eager, "compiled": 1e9 * compiled}})
        rates.append(f"{precision} {eager / compiled:.2f} times as fast")
    check.summary = f"compiled: {', '.join(rates)}"


class _Step(NamedTuple):
    """Weight and master copy after the first step, and the minimum duration of the next steps in seconds."""

    weight: Tensor
    master: Tensor | None
    seconds: float


def _step(check: Check, precision: str, compiled: bool) -> _Step:
    shape = _WEIGHTS[check.size]
    initial, gradient = _random([shape, shape], torch.bfloat16, check.device)
    weight = nn.Parameter(0.02 * initial)
    weight.grad = gradient
    options = {"precision": precision, "compiled": compiled, "lr": _LEARNING_RATE, "weight_decay": 0.05}
    optimizer = build_adamw([{"params": [weight]}], **options)
    optimizer.step()
    master = optimizer.state[weight].get("master")
    after = weight.detach().clone(), None if master is None else master.clone()
    durations = []
    for _ in range(5):
        _synchronize(check)
        start = time.perf_counter()
        optimizer.step()
        _synchronize(check)
        durations.append(time.perf_counter() - start)
    return _Step(*after, min(durations))


def _synchronize(check: Check) -> None:
    if check.on_gpu:
        torch.cuda.synchronize()
