"""The kernels against their twins, without a GPU.

Their sums run in Triton's interpreter, in a process of its own: a function is interpreted or not from the moment that
it is defined. That they fit an H200 is asked of NVIDIA's compiler, which needs no GPU either.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from training import kernels
from training.kernels import plain

pytest.importorskip("triton")

Function = Callable[..., Tensor]
BF16, FP32 = torch.bfloat16, torch.float32
dtypes = st.sampled_from([FP32, BF16])


# Inside of the interpreter's process.


def _mend() -> None:
    """The interpreter multiplies bf16's bits as integers, and rounds to bf16 by cutting off: right both."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x: TensorHandle) -> TensorHandle:
        return cast(None, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def rounded(self: Any, x: TensorHandle, dtype: Any) -> TensorHandle:
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = torch.tensor(x.data).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(bits, tl.bfloat16)
        return cast(self, x, dtype)

    InterpreterBuilder.cast_impl = rounded
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


class Case(NamedTuple):
    """A kernel, its twin, and what gets gradients."""

    kernel: Function
    twin: Function
    leaves: list[Tensor]


def field_case(patches: int, pixels: int, channels: int, ratio: int, normalise2: bool) -> Case:
    from training.kernels import field

    torch.manual_seed(pixels)
    w_PW = torch.randn(patches, 2 * channels * channels * ratio)
    leaves = [torch.randn(patches, pixels, channels), torch.rand(channels) + 0.5, w_PW]
    return Case(
        lambda x, gain, w: field.field_product(x, gain, w, normalise2),
        lambda x, gain, w: plain.field_product(x, gain, w, normalise2),
        leaves,
    )


def modulate_case(images: int, tokens: int, hidden: int, shared: bool, weight_in_fp32: bool) -> Case:
    from training.kernels import modulate

    torch.manual_seed(tokens)

    def with_chunks(function: Function) -> Function:
        def called(x: Tensor, weight: Tensor, modulation: Tensor) -> Tensor:
            _, shift, scale, *_ = modulation[:, None].chunk(6, dim=-1)
            return function(x, weight, shift, scale, weight_in_fp32)

        return called

    modulation = torch.randn(1 if shared else images, 6 * hidden)
    leaves = [torch.randn(images, tokens, hidden), torch.rand(hidden) + 0.5, modulation]
    return Case(with_chunks(modulate.norm_modulate), with_chunks(plain.norm_modulate), leaves)


def rotate_case(images: int, tokens: int, heads: int, head_dim: int, weight_in_fp32: bool) -> Case:
    from training.kernels import rotary

    torch.manual_seed(tokens)
    angles_ND = torch.rand(tokens, head_dim // 2) * 6

    def of_slice(function: Function) -> Function:
        def called(qkv: Tensor, weight: Tensor) -> Tensor:
            k = qkv.unflatten(-1, (3, heads, head_dim)).unbind(2)[1]
            # As attention wants it, so that the gradient comes with heads before tokens.
            return function(k, weight, angles_ND.cos(), angles_ND.sin(), weight_in_fp32).transpose(1, 2)

        return called

    leaves = [torch.randn(images, tokens, 3 * heads * head_dim), torch.rand(head_dim) + 0.5]
    return Case(of_slice(rotary.norm_rotate), of_slice(plain.norm_rotate), leaves)


def _result_and_gradients(function: Function, leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    tensors = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    out = function(*tensors)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, g)]


def error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found - truth).abs().max() / truth.abs().max())


def hold_to_the_twin(make: Callable[..., Case], sizes: tuple[Any, ...], dtype: torch.dtype) -> None:
    kernel, twin, leaves = make(*sizes)
    leaves = [leaf.to(dtype) for leaf in leaves]
    truth = _result_and_gradients(twin, leaves, torch.float64)
    by_twin = _result_and_gradients(twin, leaves, dtype)
    by_kernel = _result_and_gradients(kernel, leaves, dtype)
    for what, (ours, theirs, true) in enumerate(zip(by_kernel, by_twin, truth, strict=True)):
        assert ours.dtype == dtype
        # A few roundings of 2^-9 lie between in and out; of a single pixel the twin's may happen to cancel.
        bound = 2e-6 if dtype == FP32 else 1.5 * error(theirs, true) + 2**-7
        assert error(ours, true) <= bound, (sizes, dtype, what, error(ours, true), error(theirs, true))


def pass_the_compiler(make: Callable[..., Case], sizes: tuple[Any, ...]) -> None:
    """One graph with the kernels in it, and the same results."""
    kernel, _, leaves = make(*sizes)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    plainly, graphed = (_result_and_gradients(f, leaves, FP32) for f in (kernel, compiled))
    for one, other in zip(plainly, graphed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def check_operators() -> None:
    from training.kernels import field, modulate, rotary

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    cos_sin = (torch.randn(3, 8), torch.randn(3, 8))
    operators: list[tuple[Any, tuple[Any, ...]]] = [
        (field._field_product, (leaf(2, 5, 8), leaf(8), leaf(2, 256), True)),
        (modulate.norm_modulate, (leaf(2, 3, 24), leaf(24), leaf(1, 1, 24), leaf(2, 1, 24), True)),
        (rotary.norm_rotate, (leaf(2, 3, 2, 16), leaf(16), *cos_sin, False)),
    ]
    for operator, inputs in operators:
        torch.library.opcheck(operator, inputs, test_utils=checks)


def zero_columns() -> None:
    kernel, twin, (x, gain, w) = field_case(2, 16, 16, 2, True)
    w1_PCI, w2_PIC = plain.matrices(w, 16)
    w1_PCI[:, :, 3], w2_PIC[:, :, 5] = 0, 0
    torch.testing.assert_close(kernel(x, gain, w), twin(x, gain, w), rtol=1e-5, atol=1e-6)


# Outside.


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., None]]:
    """Runs a function in the interpreter's process."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _mend)
    with pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(torch.set_num_threads, 1).result()  # the process starts with what is set now
        yield lambda function, *args: pool.submit(function, *args).result()


@settings(max_examples=25)
@given(
    patches=st.integers(1, 3),
    pixels=st.integers(1, 100),
    channels=st.sampled_from([8, 16, 36, 64, 72]),
    ratio=st.sampled_from([1, 2, 3]),
    normalise2=st.booleans(),
    dtype=dtypes,
)
def test_the_field_is_its_twin(
    interpreted: Callable[..., None],
    patches: int,
    pixels: int,
    channels: int,
    ratio: int,
    normalise2: bool,
    dtype: torch.dtype,
):
    interpreted(hold_to_the_twin, field_case, (patches, pixels, channels, ratio, normalise2), dtype)


def test_the_field_at_its_real_sizes(interpreted: Callable[..., None]):
    for dtype in (FP32, BF16):
        interpreted(hold_to_the_twin, field_case, (2, 256, 64, 2, True), dtype)  # 16 x 16 pixels
    interpreted(hold_to_the_twin, field_case, (1, 48 * 64, 64, 2, False), BF16)  # any resolution


def test_a_column_of_zeros_has_no_direction(interpreted: Callable[..., None]):
    interpreted(zero_columns)


@settings(max_examples=20)
@given(
    images=st.integers(1, 3),
    tokens=st.integers(1, 70),
    hidden=st.sampled_from([16, 36, 96, 1152]),
    shared=st.booleans(),
    weight_in_fp32=st.booleans(),
    dtype=dtypes,
)
def test_modulation_is_its_twin(
    interpreted: Callable[..., None],
    images: int,
    tokens: int,
    hidden: int,
    shared: bool,
    weight_in_fp32: bool,
    dtype: torch.dtype,
):
    interpreted(hold_to_the_twin, modulate_case, (images, tokens, hidden, shared, weight_in_fp32), dtype)


@settings(max_examples=20)
@given(
    images=st.integers(1, 3),
    tokens=st.integers(1, 70),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([16, 24, 64, 72]),
    weight_in_fp32=st.booleans(),
    dtype=dtypes,
)
def test_rotation_is_its_twin(
    interpreted: Callable[..., None],
    images: int,
    tokens: int,
    heads: int,
    head_dim: int,
    weight_in_fp32: bool,
    dtype: torch.dtype,
):
    interpreted(hold_to_the_twin, rotate_case, (images, tokens, heads, head_dim, weight_in_fp32), dtype)


def test_a_compiler_passes_through(interpreted: Callable[..., None]):
    interpreted(pass_the_compiler, field_case, (2, 20, 16, 2, True))
    interpreted(pass_the_compiler, field_case, (2, 20, 72, 2, True))
    interpreted(pass_the_compiler, modulate_case, (2, 5, 24, False, True))
    interpreted(pass_the_compiler, rotate_case, (2, 5, 2, 16, True))


def test_the_operators_are_well_formed(interpreted: Callable[..., None]):
    interpreted(check_operators)


# Which form is taken. Fake tensors say that they are on a GPU.


def _calls(dtype: torch.dtype, device: str) -> dict[str, Callable[[], Tensor]]:
    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    table = torch.empty(6, 8, device=device)
    return {
        "field": lambda: kernels.field_product(tensor(2, 16, 8), tensor(8), tensor(2, 256), True),
        "modulate": lambda: kernels.norm_modulate(
            tensor(2, 6, 32), tensor(32), tensor(2, 1, 32), tensor(1, 1, 32), True
        ),
        "rotary": lambda: kernels.norm_rotate(tensor(2, 6, 2, 16), tensor(16), table, table, True),
    }


def _operators(call: Callable[[], Tensor], *, compiled: bool) -> set[str]:
    """Ours that a call comes down to."""
    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    if compiled:
        torch.compile(call, fullgraph=True, backend=backend)()
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        found.update(event.key.replace("::", ".") for event in profile.key_averages())
    return {name.split(".")[1] for name in found if name.startswith("pixnerd.")}


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_gpu_takes_the_kernels_and_a_compiler_the_field_alone(dtype: torch.dtype):
    with FakeTensorMode():
        calls = _calls(dtype, "cuda")
        took = {name: _operators(call, compiled=False) for name, call in calls.items()}
        assert took == {"field": {"field_product"}, "modulate": {"norm_modulate"}, "rotary": {"norm_rotate"}}
        took = {name: _operators(call, compiled=True) for name, call in calls.items()}
        assert took == {"field": {"field_product"}, "modulate": set(), "rotary": set()}


def test_anything_else_takes_the_twins():
    kernel_names = {"field_product", "norm_modulate", "norm_rotate"}
    with FakeTensorMode():
        others = ((torch.float64, "cuda"), (torch.float16, "cuda"), (BF16, "cpu"), (FP32, "cpu"), (FP32, "meta"))
        for dtype, device in others:
            for call in _calls(dtype, device).values():
                assert not _operators(call, compiled=False) & kernel_names


# Through NVIDIA's compiler.


class Compiled(NamedTuple):
    shared: int  # bytes of a program
    registers: int  # of a thread
    spilled: int  # bytes of a thread
    warps: int

    @property
    def at_once(self) -> int:
        """Programs that fit a multiprocessor of an H200: 64 Ki registers, given out by eights; 228 KiB, one kept."""
        threads = 32 * self.warps
        return min(2**16 // (threads * -(-self.registers // 8) * 8), 228 * 2**10 // (self.shared + 2**10))


@pytest.fixture
def for_h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[dict[str, Compiled]]:
    """Launches of kernels compile them for an H200 and leave what came of it here; nothing runs."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from training.kernels import field, modulate, rotary

    target = GPUTarget("cuda", 90, 32)
    gpu = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(field, "_fast", lambda x: x.dtype == BF16)  # as if x were there
    devices: list[Tensor] = []  # whose device is the current one

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        devices.append(x)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (field, modulate, rotary):
        for kernel in (module.forward_kernel, module.backward_kernel):
            monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    found: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert devices and devices[-1] is args[0], "Triton would launch it on another GPU"
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        file = tmp_path / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        listed = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file], capture_output=True, text=True)
        used = re.search(r"REG:(\d+) STACK:(\d+)", listed.stdout)
        assert used is not None, listed.stdout
        registers, spilled = used.groups()
        found[self.__name__] = Compiled(kernel.metadata.shared, int(registers), int(spilled), kernel.metadata.num_warps)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield found


def test_the_field_fits_an_h200(for_h200: dict[str, Compiled]):
    _compile(field_case(1, 256, 64, 2, True), BF16)
    forward, backward = for_h200["forward_kernel"], for_h200["backward_kernel"]
    assert forward.at_once == 4 and forward.spilled <= 16
    # Constants of the loop, and what stands ready for its end: less than what one program alone would lose in waiting.
    assert backward.at_once == 2 and backward.spilled <= 256


@pytest.mark.parametrize(("channels", "dtype"), [(72, BF16), (64, FP32)])
def test_other_fields_can_be_compiled(for_h200: dict[str, Compiled], channels: int, dtype: torch.dtype):
    _compile(field_case(1, 256, channels, 2, True), dtype)
    assert all(kernel.shared <= 227 * 2**10 for kernel in for_h200.values())


@pytest.mark.parametrize(
    ("make", "sizes"), [(modulate_case, (2, 1024, 1536, False, True)), (rotate_case, (2, 1024, 24, 64, True))]
)
def test_the_norms_fit_an_h200(for_h200: dict[str, Compiled], make: Callable[..., Case], sizes: tuple[Any, ...]):
    _compile(make(*sizes), BF16)
    assert len(for_h200) == 2
    assert all(kernel.at_once >= 4 and not kernel.spilled for kernel in for_h200.values())


def _compile(case: Case, dtype: torch.dtype) -> None:
    _result_and_gradients(case.kernel, case.leaves, dtype)
