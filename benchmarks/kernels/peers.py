"""The CUDA kernels that qjax is compared with: torch, humming and gemlite.

Their packages are imported only when one is measured, and JAX is not, since only one library of a
process can hold CUPTI. Times are CUPTI's, as qjax's are, taken
through torch.profiler, with the weights rotated past the cache in the same way. Operands are the
peer's own quantization of random weights, or random quantized weights where it takes them.
"""

import dataclasses
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.kernels import bound
from benchmarks.kernels.sweep import WARM_UP_SECONDS, Ops

OPS = {"torch": Ops(), "humming": Ops(), "gemlite": Ops()}
_TORCH, _HUMMING, _GEMLITE = OPS.values()


@dataclasses.dataclass(frozen=True)
class Call:
    """One peer at one size.

    Attributes:
      calls: one for each copy of the weight; each returns the product, perhaps without scales.
      finish: of the first call's result: with what the peer leaves to the caller; not timed.
      reference: what the first call should give, in float64.
    """

    calls: Sequence[Callable[[], Any]]
    reference: Callable[[], Any]
    finish: Callable[[Any], Any] = lambda result: result


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes: calls, by name of the peer; work, of one call."""

    calls: Mapping[str, Call]
    work: bound.Work


def measure(
    case: Case,
    implementation: str,
    iterations: int = 5,
    clock: Callable[..., float] | None = None,
) -> tuple[float, float | None]:
    """Microseconds of one call, and its maximum relative error over all rows (None: not finite).

    Args:
      case: what to run.
      implementation: the name of one of the case's calls.
      iterations: of the clock.
      clock: (calls, iterations) -> microseconds of one; None: `time_calls`.
    """
    import torch

    call = case.calls[implementation]
    found, expected = call.finish(call.calls[0]()).double(), call.reference()
    off, size = torch.linalg.norm(found - expected, dim=-1), torch.linalg.norm(expected, dim=-1)
    error = (off / size).max()
    us = (clock or time_calls)(call.calls, iterations)
    return us, float(error) if torch.isfinite(error) else None


def time_calls(calls: Sequence[Callable[[], Any]], iterations: int = 5) -> float:
    """Microseconds of one call: the time in which a kernel of it runs; the median over iterations.

    Some peers let a kernel start before the one in front has ended (programmatic dependent launch)
    and wait there. That overlap is counted once.

    Raises:
      RuntimeError: no kernel ran, or the iterations ran different ones.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    def run() -> list:
        return [call() for call in calls]  # all alive together, as in qjax's timing

    run()
    torch.cuda.synchronize()
    end = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < end:
        run()
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(iterations):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return per_call(json.loads(path.read_text()), len(calls), iterations)


def per_call(trace: Mapping[str, Any], calls: int, iterations: int) -> float:
    """Microseconds of one call in a trace of `iterations` times `calls` calls, in Chrome's format.

    Raises:
      RuntimeError: it has no kernel, or the iterations ran different ones.
    """
    kernels = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    kernels.sort(key=lambda event: event["ts"])
    each, rest = divmod(len(kernels), iterations)
    if not kernels or rest:
        raise RuntimeError(f"{len(kernels)} GPU kernels in {iterations} iterations")
    runs = [kernels[i * each : (i + 1) * each] for i in range(iterations)]
    if any([e["name"] for e in run] != [e["name"] for e in runs[0]] for run in runs):
        raise RuntimeError("the iterations ran different kernels")
    return median(busy([(e["ts"], e["ts"] + e["dur"]) for e in run]) for run in runs) / calls


def busy(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals sorted by start."""
    total, until = 0.0, float("-inf")
    for start, end in intervals:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def missing(peer: str) -> str | None:
    """Why a peer cannot be measured here; None if it can."""
    try:
        import torch

        importlib.import_module(peer)
    except Exception as reason:  # some look for a GPU or a compiler when they are imported
        return f"{peer} cannot be imported ({type(reason).__name__}: {reason})"
    return None if torch.cuda.is_available() else f"{peer} needs an NVIDIA GPU"


def _count(op: str, n: int, k: int, group_size: int | None = None) -> int:
    return bound.copies(bound.LINEAR[op].weight_bytes(n, k, group_size))


def _case(peer: str, op: str, m: int, n: int, k: int, group_size: int | None, call: Call) -> Case:
    return Case({peer: call}, bound.LINEAR[op].work(m, n, k, group_size))


def _normal(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _scales(*shape: int) -> Any:
    import torch

    return torch.empty(shape, device="cuda", dtype=torch.float32).uniform_(0.005, 0.02)


def _int8(*shape: int) -> Any:
    import torch

    return torch.randint(-128, 128, shape, device="cuda", dtype=torch.int8)


@_TORCH.register("bf16")
def _torch_bf16(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """cuBLAS."""
    import torch

    weights = [_normal(n, k) for _ in range(_count("bf16", n, k))]

    def case(m: int) -> Case:
        x = _normal(m, k)
        calls = [lambda w=w: torch.mm(x, w.t()) for w in weights]
        call = Call(calls, lambda: x.double() @ weights[0].double().t())
        return _case("torch", "bf16", m, n, k, None, call)

    return case


@_TORCH.register("fp8")
def _torch_fp8(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """`_scaled_mm` with a scale for each row and each output."""
    return _torch_scaled("fp8", n, k, lambda m: ((m, 1), (1, n)))


@_TORCH.register("fp8_tensor")
def _torch_fp8_tensor(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """`_scaled_mm` with one scale for x and one for w."""
    return _torch_scaled("fp8_tensor", n, k, lambda m: ((), ()))


def _torch_scaled(
    op: str, n: int, k: int, scale_shapes: Callable[[int], tuple[tuple, tuple]]
) -> Callable[[int], Case]:
    import torch

    weights = [_normal(n, k).to(torch.float8_e4m3fn) for _ in range(_count(op, n, k))]

    def case(m: int) -> Case:
        x = _normal(m, k).to(torch.float8_e4m3fn)
        a, b = (_scales(*shape) for shape in scale_shapes(m))

        def product(w: Any) -> Any:
            return torch._scaled_mm(
                x, w.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        def reference() -> Any:
            return (x.double() @ weights[0].double().t()) * a.double() * b.double()

        calls = [lambda w=w: product(w) for w in weights]
        return _case("torch", op, m, n, k, None, Call(calls, reference))

    return case


@_TORCH.register("int8")
def _torch_int8(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """`_int_mm`, which leaves int32 sums and the scales to the caller."""
    import torch

    weights = [_int8(n, k) for _ in range(_count("int8", n, k))]

    def case(m: int) -> Case:
        if m <= 16:
            raise NotImplementedError("torch._int_mm takes more than 16 rows")
        x, a, b = _int8(m, k), _scales(m, 1), _scales(1, n)
        calls = [lambda w=w: torch._int_mm(x, w.t()) for w in weights]

        def reference() -> Any:
            return (x.double() @ weights[0].double().t()) * a.double() * b.double()

        call = Call(calls, reference, lambda sums: sums.float() * a * b)
        return _case("torch", "int8", m, n, k, None, call)

    return case


@_TORCH.register("w4a16", grouped=True)
def _torch_w4a16(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """tinygemm: (q - 8) * scale + zero, a bfloat16 scale and zero for each group."""
    import torch

    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    count = _count("w4a16", n, k, group_size)
    packed = torch._convert_weight_to_int4pack(pairs, 8)
    weights = [packed.clone() for _ in range(count)]  # caches go by address, not by content
    scale = _scales(k // group_size, n).bfloat16()
    scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), -1)

    def case(m: int) -> Case:
        if m > 256:
            raise NotImplementedError(
                "tinygemm takes milliseconds from there on; it is for small M"
            )
        x = _normal(m, k)
        calls = [
            lambda w=w: torch._weight_int4pack_mm(x, w, group_size, scale_and_zero) for w in weights
        ]

        def reference() -> Any:
            w = (codes.double() - 8) * scale.t().double().repeat_interleave(group_size, 1)
            return x.double() @ w.t()

        return _case("torch", "w4a16", m, n, k, group_size, Call(calls, reference))

    return case


@_HUMMING.register("w4a16", grouped=True)
def _humming_w4a16(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    return _humming("w4a16", n, k, {"dtype": "int4", "group_size": group_size}, None, group_size)


@_HUMMING.register("w8a16")
def _humming_w8a16(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    return _humming("w8a16", n, k, {"dtype": "int8"}, None)


@_HUMMING.register("w4a8", grouped=True)
def _humming_w4a8(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    return _humming(
        "w4a8", n, k, {"dtype": "int4", "group_size": group_size}, "float8e4m3", group_size
    )


@_HUMMING.register("fp8")
def _humming_fp8(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    return _humming("fp8", n, k, {"dtype": "float8e4m3"}, "float8e4m3")


@_HUMMING.register("int8")
def _humming_int8(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    return _humming("int8", n, k, {"dtype": "int8"}, "int8")


def _humming(
    op: str,
    n: int,
    k: int,
    weight_config: dict[str, Any],
    input_dtype: str | None,
    group_size: int | None = None,
) -> Callable[[int], Case]:
    """Products of a HummingLayer, with activations that are quantized before they are timed."""
    import torch
    from humming.forward import may_process_input
    from humming.layer import HummingLayer

    layers: list = []
    weight: Any = None
    for _ in range(_count(op, n, k, group_size)):
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config=dict(weight_config),
            input_config={"dtype": input_dtype} if input_dtype else None,
            torch_dtype=torch.bfloat16,
        ).cuda()
        schema = layer.weight_schema
        tensors = schema.quant_tensor(_normal(n, k) / k**0.5, schema, torch.bfloat16)
        layer.load_from_tensors(tensors)
        if weight is None:
            weight = schema.dequant_tensors(tensors)
        layer.transform()
        layers.append(layer)

    def case(m: int) -> Case:
        x, x_scale = _normal(m, k), None
        exact = x.double()
        if input_dtype:
            x, _, x_scale = may_process_input(layers[0].humming_config, x)
            exact = x.double() * x_scale.double()
        calls = [lambda layer=layer: layer(x, input_scale=x_scale) for layer in layers]
        call = Call(calls, lambda: exact @ weight.double().t())
        return _case("humming", op, m, n, k, group_size, call)

    return case


@_GEMLITE.register("w4a16", grouped=True)
def _gemlite_w4a16(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """(q - 8) * scale, in Triton."""
    import torch
    from gemlite import DType, GemLiteLinear

    layers = []
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    scale = _scales(n, k // group_size).bfloat16()
    for _ in range(_count("w4a16", n, k, group_size)):
        layer = GemLiteLinear(
            4,
            group_size=group_size,
            in_features=k,
            out_features=n,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        layer.pack(codes, scale.clone(), torch.full_like(scale, 8), None)
        layers.append(layer)

    def case(m: int) -> Case:
        if m > 64:
            raise NotImplementedError("its autotuning takes minutes from there on")
        x = _normal(m, k)

        def reference() -> Any:
            w = (codes.double() - 8) * scale.double().repeat_interleave(group_size, 1)
            return x.double() @ w.t()

        calls = [lambda layer=layer: layer(x) for layer in layers]
        return _case("gemlite", "w4a16", m, n, k, group_size, Call(calls, reference))

    return case
