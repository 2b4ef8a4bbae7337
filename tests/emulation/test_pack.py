"""csrc/cuda/pack.cu: every element equals what torch makes of the same floats, bit for bit: packing only multiplies
by powers of two and rounds once."""

import math

import pytest
import torch
from precisions import of_all, of_both

GUARD = 64  # elements behind each output that have to stay as they are
NAN_BITS = -1  # of 16-bit elements


def row_channels(channels):
    return -(-channels // 8) * 8


def poisoned(cuda, size, dtype=torch.float32):
    return torch.full((size + GUARD,), math.nan, dtype=dtype, device=cuda.device)


def unguarded(output, *shape):
    """The output without its guard, which is checked."""
    size = math.prod(shape)
    assert len(output) == size + GUARD
    assert output[size:].isnan().all()
    return output[:size].view(shape).cpu()


def weights(cuda, generator, *shape, offset=0):
    """Normal numbers of channels (the first dimension) of very different sizes, `offset` elements off alignment."""
    size = torch.randint(-12, 4, (shape[0],), generator=generator).exp2()
    values = torch.randn(*shape, generator=generator) * size.view(-1, *[1] * (len(shape) - 1))
    memory = torch.empty(values.numel() + offset, device=cuda.device)
    memory[offset:] = values.flatten().to(cuda.device)
    return values, memory[offset:]


def powers(generator, count, low=-20, high=20):
    return torch.randint(low, high, (count,), generator=generator).float().exp2()


def factor_to(magnitude, exponent):
    """The power of two that brings magnitudes to [2^(exponent - 1), 2^exponent); 1 for 0, inf and NaN."""
    own = torch.frexp(magnitude.double()).exponent
    factor = (exponent - own).clamp(-100, 100).double().exp2()
    return torch.where(magnitude.isfinite() & (magnitude > 0), factor, torch.ones_like(factor)).float()


def padded(values, *shape, fill=0.0):
    result = values.new_full(shape, fill)
    result[tuple(slice(0, n) for n in values.shape)] = values
    return result


def assert_same(output, expected):
    assert (output.dtype, output.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


def launch(cuda, function, nodes):
    function(nodes, cuda.stream)
    cuda.synchronize()


def test_norms(cuda):
    generator = torch.Generator().manual_seed(1)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 0.25, 0.2499999, -3e38, 1e-45, 1e-35, 0.0])
    other = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, -0.5, 0.25, 0.0, 1.0, 0.0, 0.0, -0.125])
    cases = [(special, other), (other, special)]
    for channels in (1, 8, 255, 256, 257, 1152):
        gamma, beta = torch.randn(2, channels, generator=generator) * powers(generator, channels)
        cases += [(gamma, beta), (None, beta), (gamma, None), (None, None)]
    for start in (0, 13):
        runs = []
        for index, (gamma, beta) in enumerate(cases[start : start + 13]):
            channels = 7 if gamma is None and beta is None else len(beta if gamma is None else gamma)
            inputs = [None if x is None else x.to(cuda.device) for x in (gamma, beta)]
            outputs = [poisoned(cuda, row_channels(channels)) for _ in range(3)]
            node = cuda.kernels.PackNorm(
                gamma=0 if gamma is None else inputs[0].data_ptr(),
                beta=0 if beta is None else inputs[1].data_ptr(),
                packed_gamma=outputs[0].data_ptr(),
                packed_beta=outputs[1].data_ptr(),
                factor=outputs[2].data_ptr() if index % 3 else 0,
                channels=channels,
            )
            gamma = torch.ones(channels) if gamma is None else gamma
            beta = torch.zeros(channels) if beta is None else beta
            runs.append((node, gamma, beta, outputs, inputs))
        launch(cuda, cuda.kernels.pack_norms, [run[0] for run in runs])
        for node, gamma, beta, outputs, _ in runs:
            stride = row_channels(len(gamma))
            assert_same(unguarded(outputs[0], stride), padded(gamma, stride))
            assert_same(unguarded(outputs[1], stride), padded(beta, stride))
            if node.factor:
                factor = factor_to(torch.maximum(gamma.abs(), beta.abs()), -2)
                assert_same(unguarded(outputs[2], stride), padded(factor, stride, fill=1.0))
            else:
                assert outputs[2].isnan().all()


POINTWISE = [  # rows, in, taps, elements off alignment
    (8, 8, 1, 0),
    (1, 1, 1, 0),
    (17, 20, 1, 0),
    (17, 20, 1, 1),
    (33, 67, 1, 3),
    (96, 16, 1, 0),
    (320, 72, 1, 0),
    (16, 3, 9, 0),
    (9, 3, 49, 1),
    (24, 5, 25, 0),
]


@of_all
def test_pointwise(cuda):
    generator = torch.Generator().manual_seed(2)
    nodes, outputs, expected, kept = [], [], [], []
    for rows, in_channels, taps, offset in POINTWISE:
        values, memory = weights(cuda, generator, rows, in_channels, taps, offset=offset)
        columns = row_channels(in_channels) if taps == 1 else -(-taps * in_channels // 16) * 16
        outputs.append(poisoned(cuda, row_channels(rows) * columns, cuda.dtype))
        kept.append(memory)
        nodes.append(
            cuda.maps.PackPointwise(
                weight=memory.data_ptr(),
                packed=outputs[-1].data_ptr(),
                rows=rows,
                in_channels=in_channels,
                taps=taps,
                packed_columns=columns,
            )
        )
        matrix = values.transpose(1, 2).reshape(rows, taps * in_channels).to(cuda.dtype)
        expected.append(padded(matrix, row_channels(rows), columns))
    launch(cuda, cuda.maps.pack_pointwise, nodes)
    for output, matrix in zip(outputs, expected, strict=True):
        assert_same(unguarded(output, *matrix.shape), matrix)


@of_all
def test_pointwise_multiplied_by_powers_of_two(cuda):
    """The largest weight of a row comes to [1/32, 1/16)."""
    generator = torch.Generator().manual_seed(5)
    runs = []
    for rows, in_channels, taps, offset in POINTWISE:
        values, memory = weights(cuda, generator, rows, in_channels, taps, offset=offset)
        if rows == 33:
            values[:3] = torch.tensor([0.0, math.nan, math.inf])[:, None, None]
            memory[:] = values.flatten()
        columns = row_channels(in_channels) if taps == 1 else -(-taps * in_channels // 16) * 16
        output = poisoned(cuda, row_channels(rows) * columns, cuda.dtype)
        stored = poisoned(cuda, row_channels(rows))
        node = cuda.maps.PackPointwise(
            weight=memory.data_ptr(),
            packed=output.data_ptr(),
            stored_factor=stored.data_ptr(),
            rows=rows,
            in_channels=in_channels,
            taps=taps,
            packed_columns=columns,
        )
        runs.append((node, values, columns, output, stored, memory))
    launch(cuda, cuda.maps.pack_pointwise, [run[0] for run in runs])
    for _, values, columns, output, stored, _ in runs:
        rows = len(values)
        matrix = values.transpose(1, 2).flatten(1)
        power = factor_to(matrix.abs().amax(1), -4)
        expected = (matrix * power[:, None]).to(cuda.dtype)
        assert_same(unguarded(output, row_channels(rows), columns), padded(expected, row_channels(rows), columns))
        assert_same(unguarded(stored, row_channels(rows)), padded(power, row_channels(rows), fill=1.0))


@of_all
@pytest.mark.parametrize("channels", [1, 8, 20, 300])
def test_pointwise_identity(cuda, channels):
    stride = row_channels(channels)
    output = poisoned(cuda, stride * stride, cuda.dtype)
    node = cuda.maps.PackPointwise(
        weight=0, packed=output.data_ptr(), rows=channels, in_channels=channels, taps=1, packed_columns=stride
    )
    launch(cuda, cuda.maps.pack_pointwise, [node])
    assert_same(unguarded(output, stride, stride), padded(torch.eye(channels).to(cuda.dtype), stride, stride))


def test_pointwise_rounding(cuda):
    """Ties to even in both directions, just beside a tie, what becomes inf, and what is not finite."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000]
    bits += [0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x00000001, 0x00008000, 0x80018000, 0x80000000]
    values = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    rounded = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82, 0x7F80, 0x7F7F, 0x7F80]
    rounded += [0xFF80, 0x7FC0, 0x7FC0, 0x7FC0, 0x0000, 0x0000, 0x8002, 0x8000]
    memory, output = values.to(cuda.device), poisoned(cuda, 8 * 16, torch.bfloat16)
    node = cuda.maps.PackPointwise(
        weight=memory.data_ptr(), packed=output.data_ptr(), rows=1, in_channels=16, taps=1, packed_columns=16
    )
    launch(cuda, cuda.maps.pack_pointwise, [node])
    row = unguarded(output, 8, 16)[0]
    assert_same(row, torch.tensor(rounded, dtype=torch.int64).to(torch.int16).view(torch.bfloat16))
    zeros = row == 0
    assert torch.equal(row[zeros].signbit(), values[zeros].signbit())


DEPTHWISE = [(1, 9), (7, 25), (8, 49), (63, 9), (64, 49), (65, 25), (128, 9), (130, 49), (576, 9), (136, 1)]


def depthwise_node(cuda, channels, taps, memory, before):
    packed = poisoned(cuda, taps * row_channels(channels), cuda.stored)
    stored = poisoned(cuda, row_channels(channels))
    node = cuda.maps.PackDepthwise(
        weight=memory.data_ptr(),
        before_factor=0 if before is None else before.data_ptr(),
        packed=packed.data_ptr(),
        stored_factor=stored.data_ptr(),
        channels=channels,
        taps=taps,
    )
    return node, packed, stored


@of_both
def test_depthwise(cuda):
    generator = torch.Generator().manual_seed(3)
    runs = []
    for index, (channels, taps) in enumerate(DEPTHWISE):
        values, memory = weights(cuda, generator, channels, taps, offset=index % 3)
        before = padded(powers(generator, channels), row_channels(channels), fill=1.0) if index % 2 else None
        device_before = None if before is None else before.to(cuda.device)
        runs.append(
            (values, before, *depthwise_node(cuda, channels, taps, memory, device_before), memory, device_before)
        )
    launch(cuda, cuda.maps.pack_depthwise, [run[2] for run in runs])
    for values, before, _, packed, stored, *_ in runs:
        channels, taps = values.shape
        stride = row_channels(channels)
        factor = factor_to(values.abs().amax(1), 0)
        halves = (values * factor[:, None]).to(cuda.stored)
        largest = halves.abs().amax(1)
        assert ((largest >= 0.5) & (largest <= 1)).all()
        assert_same(unguarded(packed, taps, stride), padded(halves.t(), taps, stride))
        expected = factor if before is None else factor * before[:channels]
        assert_same(unguarded(stored, stride), padded(expected, stride, fill=1.0))


@of_both
def test_depthwise_extremes(cuda):
    """Channels that are 0 or not finite keep the factor 1; factors stay within 2^-100 and 2^100, so do products."""
    inf, nan = math.inf, math.nan
    rows = [
        [0, 0],
        [1, inf],
        [nan, 0.25],
        [-inf, nan],
        [2.0**-120, 2.0**-121],
        [2.0**120, 1],
        [2.0**-60, 0],
        [2.0**60, 0],
    ]
    values = torch.tensor(rows)
    before = torch.tensor([1, 1, 1, 1, 1, 1, 2.0**80, 2.0**-80])
    power = torch.tensor([1, 1, 1, 1, 2.0**100, 2.0**-100, 2.0**20, 2.0**-20])
    memory, device_before = values.to(cuda.device), before.to(cuda.device)
    node, packed, stored = depthwise_node(cuda, 8, 2, memory, device_before)
    launch(cuda, cuda.maps.pack_depthwise, [node])
    assert_same(unguarded(packed, 2, 8), (values * power[:, None]).to(cuda.stored).t().contiguous())
    assert_same(unguarded(stored, 8), before * power)


PROJECT = [  # rows, columns, elements off alignment
    (1, 1, 0),
    (8, 8, 0),
    (7, 255, 0),
    (9, 256, 0),
    (9, 256, 1),
    (16, 257, 0),
    (24, 260, 0),
    (40, 264, 2),
    (33, 1152, 0),
    (320, 36, 0),
]


def project_node(cuda, rows, columns, memory, column_factor):
    packed = poisoned(cuda, row_channels(rows) * row_channels(columns), cuda.stored)
    factor = poisoned(cuda, row_channels(rows))
    node = cuda.maps.PackProject(
        weight=memory.data_ptr(),
        column_factor=0 if column_factor is None else column_factor.data_ptr(),
        packed=packed.data_ptr(),
        stored_factor=factor.data_ptr(),
        rows=rows,
        columns=columns,
    )
    return node, packed, factor


@of_both
def test_project(cuda):
    generator = torch.Generator().manual_seed(4)
    runs = []
    for index, (rows, columns, offset) in enumerate(PROJECT):
        values, memory = weights(cuda, generator, rows, columns, offset=offset)
        factor = padded(powers(generator, columns, -6, 6), row_channels(columns), fill=1.0) if index % 3 else None
        device_factor = None if factor is None else factor.to(cuda.device)
        runs.append((values, factor, *project_node(cuda, rows, columns, memory, device_factor), memory, device_factor))
    launch(cuda, cuda.maps.pack_project, [run[2] for run in runs])
    for values, column_factor, _, packed, factor, *_ in runs:
        rows, columns = values.shape
        if column_factor is not None:
            values = values / column_factor[:columns]
        power = factor_to(values.abs().amax(1), 0)
        halves = (values * power[:, None]).to(cuda.stored)
        largest = halves.abs().amax(1)
        assert ((largest >= 0.5) & (largest <= 1)).all()
        expected = padded(halves, row_channels(rows), row_channels(columns))
        assert_same(unguarded(packed, *expected.shape), expected)
        assert_same(unguarded(factor, row_channels(rows)), padded(power, row_channels(rows), fill=1.0))


@of_both
def test_project_extremes(cuda):
    inf, nan = math.inf, math.nan
    values = torch.tensor([[0, 0], [1, inf], [nan, 0.25], [-inf, nan], [2.0**-120, 0], [2.0**120, 1], [1, 1]])
    column_factor = torch.tensor([1, 2.0**-100] + [1.0] * 6)
    power = torch.tensor([1, 1, 1, 1, 2.0**100, 2.0**-100, 2.0**-100])
    power[2] = 2.0**0  # NaN is the largest of its row
    memory, device_factor = values.to(cuda.device), column_factor.to(cuda.device)
    node, packed, factor = project_node(cuda, 7, 2, memory, device_factor)
    launch(cuda, cuda.maps.pack_project, [node])
    halves = (values / column_factor[:2] * power[:, None]).to(cuda.stored)
    assert_same(unguarded(packed, 8, 8), padded(halves, 8, 8))
    assert_same(unguarded(factor, 8), padded(power, 8, fill=1.0))


# ---- from packed choice blocks (choice_block.h)


def packed_rows(cuda, rows):
    """[R, C] as a section of a packed block: what pads it is never to be read."""
    pitch = -(-rows.shape[1] // 16) * 16
    return padded(rows, len(rows), pitch, fill=math.nan).to(cuda.device), pitch


@of_all
def test_weights_of_packed_blocks_are_packed_alike(cuda):
    generator = torch.Generator().manual_seed(6)
    for rows, columns in [(1, 1), (8, 8), (17, 20), (33, 67), (96, 16), (320, 72)]:
        values, memory = weights(cuda, generator, rows, columns)
        section, pitch = packed_rows(cuda, values.t())
        factor = padded(powers(generator, columns, -6, 6), row_channels(columns), fill=1.0).to(cuda.device)
        for multiplied in (False, True):
            found = []
            for source, extra in ((memory, {}), (section, {"pitch": pitch})):
                packed = poisoned(cuda, row_channels(rows) * row_channels(columns), cuda.dtype)
                stored = poisoned(cuda, row_channels(rows))
                node = cuda.maps.PackPointwise(
                    weight=source.data_ptr(),
                    packed=packed.data_ptr(),
                    stored_factor=stored.data_ptr() if multiplied else 0,
                    rows=rows,
                    in_channels=columns,
                    taps=1,
                    packed_columns=row_channels(columns),
                    **extra,
                )
                launch(cuda, cuda.maps.pack_pointwise, [node])
                shape = row_channels(rows), row_channels(columns)
                found.append((unguarded(packed, *shape), unguarded(stored, shape[0]) if multiplied else None))
            assert_same(found[1][0], found[0][0])
            if multiplied:
                assert_same(found[1][1], found[0][1])
        node, packed, stored = project_node(cuda, rows, columns, memory, factor)
        other, packed_too, stored_too = project_node(cuda, rows, columns, section, factor)
        other.pitch = pitch
        launch(cuda, cuda.maps.pack_project, [node, other])
        assert_same(unguarded(packed_too, *shape), unguarded(packed, *shape))
        assert_same(unguarded(stored_too, shape[0]), unguarded(stored, shape[0]))


@of_both
def test_depthwise_weights_of_packed_blocks_are_packed_alike(cuda):
    generator = torch.Generator().manual_seed(7)
    for channels, taps in DEPTHWISE:
        values, memory = weights(cuda, generator, channels, taps)
        section, pitch = packed_rows(cuda, values.t())
        node, packed, stored = depthwise_node(cuda, channels, taps, memory, None)
        other, packed_too, stored_too = depthwise_node(cuda, channels, taps, section, None)
        other.pitch = pitch
        launch(cuda, cuda.maps.pack_depthwise, [node, other])
        stride = row_channels(channels)
        assert_same(unguarded(packed_too, taps, stride), unguarded(packed, taps, stride))
        assert_same(unguarded(stored_too, stride), unguarded(stored, stride))
