"""How many instructions a launch of a kernel issues: its machine code, part by part, times how often each is executed.

Parts are found by what is in them (the loop that multiplies tiles of pixels has tensor instructions, that of the
depthwise convolution as many half-precision multiply-adds as there are taps and outputs), how often they are executed
follows from the launch's plan. A part that is not found is an error. All counts are of warps. Around loops, what no way
misses is counted; of activations and of items at the border, the way that is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sass import Kernel, Loop

Kinds = Counter[str]
RELU6 = 2  # Activation of choice_block.h
_COLS = 7  # kCols of expand_depthwise_tiling.h
_SLOTS = 8  # kSlots


@dataclass(frozen=True)
class Launch:
    """As record_launches.cu prints it."""

    symbol: str
    grid: tuple[int, int, int]
    threads: int
    dynamic_shared: int
    plan: dict[str, int]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def times(kinds: Kinds, count: float) -> Kinds:
    """Of `count` executions."""
    return Counter({kind: value * count for kind, value in kinds.items()})


def added(parts: Iterable[Kinds]) -> Kinds:
    total: Kinds = Counter()
    for part in parts:
        for kind, value in part.items():
            total[kind] += value
    return total


def _less(kinds: Kinds, other: Kinds, count: float) -> Kinds:
    return Counter({kind: max(0, value - other[kind] * count) for kind, value in kinds.items()})


def _only(found: list[Any], what: str, kernel: Kernel) -> Any:
    if not found:
        raise ValueError(f"{kernel.symbol}: found no {what}")
    return found[0]


def _activated(kernel: Kernel, loops: list[Loop], activation: int) -> Loop:
    """Of loops that are alike but for the activation, the one with ReLU6: the others have none or another minimum."""
    if activation != RELU6:
        raise ValueError(f"activation: expected ReLU6 ({RELU6}), whose code is recognised, got {activation}")
    found: Loop = _only([loop for loop in loops if kernel.count(loop.blocks, "HMNMX2")], "loop with ReLU6", kernel)
    return found


def _certain_and_not(kernel: Kernel, within: Loop | None, inner: Loop) -> tuple[set[int], set[int]]:
    """Blocks around a loop: those that no way to it and on misses, and the others."""
    certain = kernel.certain(within, [inner.header])
    return certain, kernel.path(within, [inner.header]) - certain


# ---- expand_depthwise


@dataclass(frozen=True)
class Piece:
    """What blocks at one place of the image do, for one image and channel group."""

    count: int  # blocks like it
    tiles: int  # of 32 pixels that are expanded
    pixels: int  # expanded
    whole: int  # items of the depthwise convolution that are complete
    cut: int  # and those at the border
    item_warps: float  # turns of a warp at items, of either kind
    steps: int


def pieces(shape: dict[str, int], plan: dict[str, int]) -> list[Piece]:
    """Of all places of an image; the arithmetic is that of `locate` and `rows_of` in expand_depthwise.cuh."""
    height, width, kernel, stride = (shape[name] for name in ("height", "width", "kernel", "stride"))
    rows, cols, step, images = (plan[name] for name in ("rows", "cols", "step", "images"))
    out_height, out_width = ceil_div(height, stride), ceil_div(width, stride)
    item, halo, whole = (4 if stride == 1 else 2), kernel - stride, step >= rows
    found = []
    for first_row in range(0, out_height, rows):
        for first_col in range(0, out_width, cols):
            out_rows, out_cols = min(rows, out_height - first_row), min(cols, out_width - first_col)
            in_row, in_col = first_row * stride - kernel // 2, first_col * stride - kernel // 2
            in_rows = out_rows * stride + halo
            inside = min(out_cols * stride + halo, width - in_col) - max(0, -in_col)
            lag = 0 if whole else ceil_div(halo, step * stride)
            steps = lag + (1 if whole else ceil_div(out_rows, step))
            tiles = pixels = complete = cut = 0
            turns = 0.0
            for t in range(steps):
                begin, end = 0, in_rows
                if not whole and t < lag:
                    begin = t * step * stride
                    end = min(begin + step * stride, halo)
                elif not whole:
                    begin = halo + (t - lag) * step * stride
                    end = min(begin + step * stride, in_rows)
                high = min(end, height - in_row)
                low = min(max(begin, -in_row), high)
                here = images * (high - low) * inside
                pixels += here
                tiles += ceil_div(here, 32)
                if t < lag:
                    continue
                step_rows = min(step, out_rows - (t - lag) * step)
                segments, strips = ceil_div(step_rows, item), ceil_div(out_cols, _COLS)
                items = images * segments * strips
                full = images * (step_rows // item) * (out_cols // _COLS)
                complete += full
                cut += items - full
                lanes = plan["group"] // 2
                turns += sum(ceil_div(min(_SLOTS, items - first) * lanes, 32) for first in range(0, items, _SLOTS))
            found.append(Piece(1, tiles, pixels, complete, cut, turns, steps))
    return found


def expand_depthwise(kernel: Kernel, launch: Launch, shape: dict[str, int]) -> dict[str, Kinds]:
    """By part; `shape`: images height width in_channels hidden_channels kernel stride activation."""
    taps, stride, group = shape["kernel"] ** 2, shape["stride"], launch.plan["group"]
    multiply_adds = taps * _COLS * (4 if stride == 1 else 2)
    loops = kernel.loops
    item_loop = _only(
        [loop for loop in reversed(loops) if kernel.count(loop.own, "HFMA2") >= multiply_adds], "items", kernel
    )
    step_loop, group_loop = item_loop.parent, item_loop.parent and item_loop.parent.parent
    if step_loop is None or group_loop is None:
        raise ValueError(f"{kernel.symbol}: expected the loop of items in those of steps and groups")
    tile_loop = _activated(
        kernel, [loop for loop in step_loop.children if kernel.count(loop.blocks, "HMMA")], shape["activation"]
    )
    k_loop = _only([loop for loop in tile_loop.children if kernel.count(loop.blocks, "HMMA")], "k loop", kernel)
    a_multiply = 2 * group // 8  # tensor instructions of a step of 16 channels
    k_step = times(kernel.kinds(k_loop.blocks), a_multiply / kernel.count(k_loop.blocks, "HMMA"))
    copies = kernel.count(tile_loop.own, "HMMA") / a_multiply
    k_steps = ceil_div(shape["in_channels"], 16)
    tile = added([_less(kernel.kinds(tile_loop.own), k_step, copies - 1), times(k_step, k_steps - 1)])

    whole_block = max(item_loop.own, key=lambda at: kernel.blocks[at].count("STG"))
    item_whole = kernel.kinds(kernel.path(item_loop, [whole_block]))
    others = [at for at in item_loop.own - kernel.path(item_loop, [whole_block]) if kernel.blocks[at].count("STG")]
    item_cut = kernel.kinds(kernel.path(item_loop, [max(others)])) if others else item_whole

    def copying(loops: list[Loop], stores: bool) -> tuple[Loop, Kinds]:
        """The loop, and instructions of a copy of 16 bytes by each lane."""
        fitting = [
            loop
            for loop in loops
            if kernel.count(loop.blocks, "LDGSTS")
            and not kernel.count(loop.blocks, "HMMA", "HFMA2.MMA")
            and bool(kernel.count(loop.blocks, "STS")) == stores
        ]
        best = _only(sorted(fitting, key=lambda loop: -kernel.count(loop.blocks, "LDGSTS")), "loop of copies", kernel)
        return best, times(kernel.kinds(best.blocks), 1 / kernel.count(best.blocks, "LDGSTS"))

    children = [loop for loop in loops if loop.parent is step_loop]
    (x_loop, copy_x), (_, copy_weight) = copying(children, False), copying(children, True)
    # Of a block that keeps x, steps do not load any.
    whole = launch.plan["step"] >= launch.plan["rows"]
    through = [tile_loop.header, item_loop.header] if whole else [tile_loop.header, x_loop.header, item_loop.header]
    a_step = kernel.kinds(kernel.certain(step_loop, through))
    # What is not certain is done by one warp (where the block is), or by as many as there are channels (moments).
    a_group, of_few = (kernel.kinds(part) for part in _certain_and_not(kernel, group_loop, step_loop))
    a_block, of_one = (kernel.kinds(part) for part in _certain_and_not(kernel, None, group_loop))
    before = [loop for loop in loops if loop.parent is None and loop is not group_loop]
    zeroing = _only([loop for loop in before if kernel.count(loop.blocks, "STS.128")], "loop of zeros", kernel)
    zero = times(kernel.kinds(zeroing.blocks), 1 / kernel.count(zeroing.blocks, "STS.128"))
    placing = _only(
        [loop for loop in before if kernel.count(loop.blocks, "STS") and not kernel.count(loop.blocks, "STS.128")],
        "loop of places",
        kernel,
    )
    place = times(kernel.kinds(placing.blocks), 1 / kernel.count(placing.blocks, "STS"))

    plan, warps = launch.plan, launch.threads // 32
    row = ceil_div(shape["in_channels"], 8) * 8
    groups = ceil_div(ceil_div(shape["hidden_channels"], 8) * 8, group)
    # Blocks of whole images have `images` of them, and keep x for all their groups.
    image_blocks = shape["images"] / plan["images"]
    loads_of_x = plan["group_blocks"] if whole else groups
    weights = group * row / 8 + taps * group / 8 + 3 * group / 4  # pieces of 16 bytes
    parts: dict[str, list[Kinds]] = {"expansion": [], "depthwise": [], "copies": [], "steps": [], "blocks": []}
    for piece in pieces(shape, plan):
        cut_share = piece.cut / (piece.cut + piece.whole)
        item = added([times(item_whole, 1 - cut_share), times(item_cut, cut_share)])
        parts["expansion"].append(times(tile, piece.tiles * groups))
        parts["depthwise"].append(times(item, piece.item_warps * groups))
        parts["copies"].append(times(copy_weight, weights / 32 * groups))
        parts["copies"].append(times(copy_x, piece.pixels * row / 8 / 32 * loads_of_x))
        parts["steps"].append(times(a_step, piece.steps * warps * groups))
        of_block = [times(zero, plan["ring_bytes"] / 512), times(place, plan["places"] / 32)]
        of_block += [times(a_block, warps), of_one]
        parts["blocks"] += [times(part, plan["group_blocks"]) for part in of_block]
        parts["blocks"] += [times(a_group, warps * groups), times(of_few, group / 32 * groups)]
    return {name: times(added(of), image_blocks) for name, of in parts.items()}


# ---- products whose rows are pixels


def _pointwise_tile(name: str) -> tuple[int, int, int]:
    """Width, chunk and warps across of the PointwiseTile in a kernel's name."""
    found = re.search(r"PointwiseTile<(\d+), (\d+), (\d+)>", name)
    if found is None:
        raise ValueError(f"{name}: expected a PointwiseTile among its arguments")
    width, chunk, across = map(int, found.groups())
    return width, chunk, across


def pointwise(kernel: Kernel, name: str, launch: Launch, pixels: int, depth: int, activation: int | None) -> Kinds:
    """Of project (`activation`: of what it reads), strided_conv and stem_conv kernels that store sums."""
    width, chunk, across = _pointwise_tile(name)
    down = 8 // across
    row_tiles, column_tiles = 128 // (16 * down), width // (8 * across)
    full = max(range(len(kernel.blocks)), key=lambda at: kernel.blocks[at].count("HMMA"))
    steps = kernel.blocks[full].count("HMMA") / (row_tiles * column_tiles)
    around = [loop for loop in reversed(kernel.loops) if full in loop.blocks]
    chunk_loop = _only(around, "loop of chunks", kernel)
    tile_loop = chunk_loop.parent
    if tile_loop is None or steps != chunk // 16:
        raise ValueError(f"{kernel.symbol}: expected a loop of tiles, and {chunk // 16} steps a chunk, got {steps}")
    # Copies of pixels come before those of weights, which most tiles find where they are.
    copies = sorted(at for at in chunk_loop.own if kernel.blocks[at].count("LDGSTS"))
    pixel_copies = copies[: 128 * chunk // 8 // 256] if activation is not None or "strided" in name else []
    through = [*pixel_copies, full]
    mapped: Kinds = Counter()
    if activation is not None:
        mapping = _activated(
            kernel, [loop for loop in chunk_loop.children if kernel.count(loop.own, "STS")], activation
        )
        through.insert(0, mapping.header)
        turns = kernel.count(mapping.blocks, "STS.128")
        mapped = times(kernel.kinds(mapping.blocks), 128 * (chunk // 8) / 256 / turns)  # of a chunk, by each warp
    around_chunk = kernel.certain(chunk_loop, through) if pixel_copies else kernel.path(chunk_loop, through)
    a_chunk = added([kernel.kinds(around_chunk), mapped])
    chunks, last_steps = ceil_div(depth, chunk), ceil_div(depth % chunk, 16)
    all_chunks = times(a_chunk, chunks)
    if depth % chunk and last_steps < steps:
        partial = _only([loop for loop in chunk_loop.children if kernel.count(loop.blocks, "HMMA")], "steps", kernel)
        per_step = times(kernel.kinds(partial.blocks), row_tiles * column_tiles / kernel.count(partial.blocks, "HMMA"))
        all_chunks = added([_less(all_chunks, kernel.kinds([full]), 1), times(per_step, last_steps)])
        # Pieces behind the depth are neither copied nor mapped.
        all_chunks = _less(all_chunks, mapped, 1 - last_steps * 16 / chunk)

    staged, copied_rows, summed_rows = 16 * down, 256 // (width // 8), 256 // (width // 2)
    ending = [loop for loop in tile_loop.children if loop is not chunk_loop]
    storing = _only([loop for loop in ending if kernel.count(loop.own, "STG")], "loop of stores", kernel)
    stored = times(kernel.kinds(storing.blocks), 1 / kernel.count(storing.blocks, "STG"))
    summing = _only(
        sorted(
            (loop for loop in ending if not kernel.count(loop.own, "STG")),
            key=lambda loop: -kernel.count(loop.own, "LDS"),
        ),
        "loop of sums",
        kernel,
    )
    summed = times(kernel.kinds(summing.blocks), 1 / kernel.count(summing.blocks, "LDS"))
    a_tile = added(
        [
            all_chunks,
            kernel.kinds(kernel.certain(tile_loop, [chunk_loop.header, storing.header, summing.header])),
            times(stored, row_tiles * ceil_div(staged, copied_rows)),
            times(summed, row_tiles * ceil_div(staged, summed_rows)),
        ]
    )
    a_block = kernel.kinds(kernel.path(None, [tile_loop.header]))
    tiles = ceil_div(pixels, 128) * launch.plan["passes"]
    return times(added([times(a_tile, tiles), times(a_block, launch.blocks)]), launch.threads // 32)


def moments(kernel: Kernel, launch: Launch, pixels: int) -> Kinds:
    """Of finish_map's moments_kernel."""
    sweeping = [loop for loop in reversed(kernel.loops) if kernel.count(loop.own, "HMMA")]
    sweep = _only(sweeping, "loop of sweeps", kernel)
    tiles = launch.plan["block_tiles"]
    step = 2 * 16 * max(1, 8 // tiles)  # pixels between two barriers
    turns = pixels / launch.plan["chunk"] * ceil_div(launch.plan["chunk"], step)
    a_block = kernel.kinds(kernel.outside)
    parts = [times(kernel.kinds(sweep.blocks), turns * launch.plan["window_pairs"]), times(a_block, launch.blocks)]
    return times(added(parts), launch.threads // 32)


def head_pool(kernel: Kernel, launch: Launch, images: int, image_pixels: int, depth: int) -> Kinds:
    """Of head_pool_kernel, with a fifth of what ends a tile, for there are five activations, without storing means."""
    full = max(range(len(kernel.blocks)), key=lambda at: kernel.blocks[at].count("HMMA"))
    chunk_loop = _only([loop for loop in reversed(kernel.loops) if full in loop.blocks], "loop of chunks", kernel)
    tile_loop = chunk_loop.parent
    if tile_loop is None:
        raise ValueError(f"{kernel.symbol}: expected a loop of tiles")
    each = launch.plan["images_each"]
    tiles = images / each * ceil_div(each * ceil_div(image_pixels, 8), 14) * launch.grid[2]
    summing = {at for at in tile_loop.own if not kernel.blocks[at].count("STG", "SHFL")}
    ending = times(kernel.kinds(summing), 1 / 5)
    a_tile = added([times(kernel.kinds(kernel.path(chunk_loop, [full])), ceil_div(depth, 32)), ending])
    return times(a_tile, tiles * launch.threads // 32)


def plain(kernel: Kernel, launch: Launch, vectors: int) -> Kinds:
    """Of finish_map's plain_kernel: `vectors` of 8 channels, four of which are a turn."""
    turn = _only([loop for loop in kernel.loops if kernel.count(loop.own, "STG")], "loop of pixels", kernel)
    return times(kernel.kinds(turn.blocks), vectors / 32 / max(1, kernel.count(turn.blocks, "STG")))
