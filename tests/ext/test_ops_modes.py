"""The operations inside torch.compile, torch.export, autocast and inference mode, and called by threads at once.

Everywhere the bits are those of a plain call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from choice_blocks import ConvSpec, Spec, make_block
from test_ops_contract import CASES, operation
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from greedynas_ext import ops, ops_cuda, reference


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_same_bits(result: Any, expected: Any) -> None:
    for one, other in zip(outputs_of(result), outputs_of(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one, other)


# torch.compile and torch.export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_one_graph(name: str) -> None:
    """fullgraph=True raises an error at a graph break."""
    arguments = CASES[name]()
    compiled = torch.compile(operation(name), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*arguments), operation(name)(*arguments))


def filter_paths(inputs: Tensor, input_index: Tensor, op_index: Tensor, block: Any, targets: Tensor) -> Any:
    """All operations, with torch's own between them."""
    outputs, used = ops.mixed_op(inputs, input_index, op_index, block)
    again, _ = ops.mixed_op(inputs, input_index, op_index, block, used)
    losses, image_losses, correct = ops.path_cross_entropy((outputs + again).mean((2, 3)) / 2, targets, 0.1)
    return ops.select_top_k(losses * 2, 2), image_losses, correct, used


def nodes(
    batch: int, images: int, height: int, width: int, count: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, their indices, operations and targets for a block of 3 to 5 channels with two operations."""
    index = torch.arange(count)
    return draw(batch, images, height, width, 3, dtype=dtype), index % batch, index % 2, torch.arange(images) % 5


# None of them 1, no two of the first alike (torch would take that for a rule), and the second different in each.
SIZES = [(2, 4, 8, 6, 7), (3, 5, 9, 10, 2), (3, 2, 7, 7, 5), (2, 6, 9, 4, 4)]


@pytest.mark.parametrize("dynamic", [True, None])
def test_other_sizes_take_the_same_graph(dynamic: bool | None) -> None:
    """With dynamic=True what the first call compiles serves all; by default what the second does, when sizes vary."""
    block = make_block([Spec(se=2), ConvSpec()], 3, 5, 2, dtype=torch.float32).packed
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(filter_paths, fullgraph=True, dynamic=dynamic, backend=counter)
    graphs = []
    for size in SIZES:
        inputs, input_index, op_index, targets = nodes(*size)
        arguments = (inputs, input_index, op_index, block, targets)
        assert_same_bits(compiled(*arguments), filter_paths(*arguments))
        graphs.append(counter.frame_count)
    assert len(set(graphs if dynamic else graphs[1:])) == 1


def test_another_k_is_another_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.select_top_k, fullgraph=True, backend=counter)
    losses = draw(9)
    for k in (2, 5, 0, 2):
        assert_same_bits(compiled(losses, k), ops.select_top_k(losses, k))
    assert counter.frame_count == 3


def test_a_bad_argument_of_a_compiled_function_is_named() -> None:
    compiled = torch.compile(ops.path_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"path_cross_entropy: targets should be in \[0, C=3\), got 3 at position 1"):
        compiled(draw(2, 2, 3), torch.tensor([0, 3]))


class Losses(torch.nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, image_losses, _ = ops.path_cross_entropy(logits, targets)
        return ops.select_top_k(losses, 2), image_losses


def test_export() -> None:
    paths, images = torch.export.Dim("paths", min=2), torch.export.Dim("images", min=2)
    exported = torch.export.export(
        Losses(),
        (draw(4, 5, 3), torch.tensor([0, 1, 2, 0, 1])),
        dynamic_shapes={"logits": {0: paths, 1: images}, "targets": {0: images}},
    ).module()
    other = draw(6, 7, 3, seed=1), torch.arange(7) % 3
    assert_same_bits(exported(*other), Losses()(*other))


@pytest.mark.slow
def test_inductor() -> None:
    """The default backend compiles C++."""
    block = make_block([Spec(se=2), ConvSpec()], 3, 5, 2, dtype=torch.float32).packed
    inputs, input_index, op_index, targets = nodes(2, 3, 8, 6, 3)
    arguments = (inputs, input_index, op_index, block, targets)
    compiled = torch.compile(filter_paths, fullgraph=True)
    best, image_losses, correct, used = compiled(*arguments)
    expected = filter_paths(*arguments)
    assert torch.equal(best, expected[0])
    torch.testing.assert_close(image_losses, expected[1])  # its own code for what is between the operations
    assert torch.equal(correct, expected[2])
    assert torch.equal(used, expected[3])


# Autocast and inference mode ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    arguments = CASES[name]()
    expected = operation(name)(*arguments)
    with torch.autocast("cpu", dtype):
        assert_same_bits(operation(name)(*arguments), expected)
        compiled = torch.compile(operation(name), fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(*arguments), expected)


def test_what_autocast_made_is_taken_as_it_is() -> None:
    logits, weight = draw(2, 4, 6), draw(5, 6, seed=1)
    targets = torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        made = torch.nn.functional.linear(logits, weight)
        assert made.dtype == torch.bfloat16
        losses, image_losses, _ = ops.path_cross_entropy(made, targets)
    assert losses.dtype == image_losses.dtype == torch.float32
    assert_same_bits(ops.path_cross_entropy(made, targets)[:2], (losses, image_losses))


def test_mixed_op_refuses_what_autocast_made() -> None:
    block = make_block([Spec()], 3, 5, dtype=torch.float32).packed
    index = torch.tensor([0])
    expected = r"mixed_op: inputs should be float64 or float32, .*, \[B, N, H, W, C\], got bfloat16 \[1, 2, 4, 4, 3\]"
    with torch.autocast("cpu", torch.bfloat16):
        inputs = torch.nn.functional.linear(draw(1, 2, 4, 4, 3), draw(3, 3, seed=1))
        with pytest.raises(ValueError, match=expected):
            ops.mixed_op(inputs, index, index, block)
        outputs, _ = ops.mixed_op(inputs.float(), index, index, block)
    assert torch.equal(outputs, ops.mixed_op(inputs.float(), index, index, block)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_does_not_reach_the_references(dtype: torch.dtype) -> None:
    """They are what GPU tensors without a kernel are given to, under the caller's autocast."""
    block = make_block([Spec(se=2), ConvSpec()], 3, 5, 2, dtype=dtype).packed
    inputs, input_index, op_index, targets = nodes(2, 3, 8, 6, 3, dtype)
    packed = (inputs, input_index, op_index, block.weights, block.op_table, block.bn_eps)
    calls: list[Callable[[], Any]] = [
        lambda: reference.mixed_op(inputs, input_index, op_index, block),
        lambda: ops_cuda.mixed_op(*packed),
        lambda: reference.path_cross_entropy(inputs[:, :, 0, 0], targets % 3),
        lambda: reference.select_top_k(inputs[0, 0, 0, 0], 2),
    ]
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(call(), expected)


@pytest.mark.parametrize("name", CASES)
def test_inference_mode(name: str) -> None:
    arguments = CASES[name]()
    expected = operation(name)(*arguments)
    with torch.inference_mode():
        inside = operation(name)(*arguments)
        copies = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
    assert_same_bits(inside, expected)
    assert all(result.is_inference() for result in outputs_of(inside))
    assert copies[0].is_inference()
    assert_same_bits(operation(name)(*copies), expected)


# Threads --------------------------------------------------------------------------------------------------------------

THREADS, CALLS = 4, 4


def large_calls() -> list[Callable[[], Any]]:
    """Different calls, large enough that torch's threads divide the loops of each."""
    wide = make_block([Spec(expansion=6, kernel=5, se=4), ConvSpec("relu")], 24, 24, dtype=torch.float32).packed
    deep = make_block([Spec(kernel=7, activation="hswish"), Spec()], 19, 33, 2, dtype=torch.float64).packed
    logits, targets = draw(12, 200, 300), torch.arange(200) % 300
    losses = draw(5000)
    index = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1])
    maps, other_maps = draw(2, 6, 24, 22, 24), draw(2, 5, 17, 21, 19, dtype=torch.float64)
    used = ops.mixed_op(maps, *index, wide)[1]
    return [
        lambda: ops.mixed_op(maps, *index, wide),
        lambda: ops.mixed_op(maps, *index, wide, used),
        lambda: ops.mixed_op(other_maps, *index, deep),
        lambda: ops.path_cross_entropy(logits, targets, 0.1),
        lambda: ops.path_cross_entropy(logits.bfloat16(), targets),
        lambda: ops.select_top_k(losses, 100),
    ]


def at_once(calls: Sequence[Callable[[], Any]]) -> list[list[Any]]:
    """Each call CALLS times in a thread of its own, all threads beginning together."""
    barrier = threading.Barrier(len(calls))

    def repeat(call: Callable[[], Any]) -> list[Any]:
        barrier.wait(60)
        return [call() for _ in range(CALLS)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(repeat, call) for call in calls]]


@pytest.fixture(params=[1, 2, 3])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_threads_that_call_with_the_same_tensors(torch_threads: int) -> None:
    for call in large_calls():
        expected = call()
        for results in at_once([call] * THREADS):
            for result in results:
                assert_same_bits(result, expected)


def test_threads_that_call_with_different_tensors(torch_threads: int) -> None:
    calls = large_calls()
    expected = [call() for call in calls]
    for results, alone in zip(at_once(calls), expected, strict=True):
        for result in results:
            assert_same_bits(result, alone)


def test_an_error_stays_in_its_thread() -> None:
    def fails() -> str:
        with pytest.raises(ValueError, match="targets should be in") as raised:
            ops.path_cross_entropy(draw(3, 200, 5), torch.full((200,), 5))
        return str(raised.value)

    calls = [fails, *large_calls()[:3], fails]
    expected = [call() for call in calls[1:-1]]
    errors, *results, _ = at_once(calls)
    assert set(errors) == {fails()}
    for repeated, alone in zip(results, expected, strict=True):
        for result in repeated:
            assert_same_bits(result, alone)


def test_threads_have_modes_of_their_own() -> None:
    """Autocast and inference mode of one thread do not reach the calls of another."""
    call = large_calls()[0]
    expected = call()

    def in_modes() -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return call()

    for results in at_once([call, in_modes, call, in_modes]):
        for result in results:
            assert_same_bits(result, expected)
