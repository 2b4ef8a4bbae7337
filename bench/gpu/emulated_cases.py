"""The calls of kernels that bench/gpu/emulate_report.py counts, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu_kernels import LAYERS, SHUFFLED_MAPS, UNIT_MAPS
from kernel_nodes import MAXIMUM, MEAN, Node, Nodes

PARTS = 132  # multiprocessors of an H100, of which one is emulated
UNITS = 2048  # kMaxUnits (csrc/cuda/pointwise.cuh)

KERNELS = (
    *("stem_conv", "expand_depthwise", "project", "finish_map", "strided_conv", "squeeze", "head_pool", "linear"),
    *("path_cross_entropy", "pointwise_affine", "norm_affine", "pool", "depthwise_conv", "arrange_channels"),
)
_ONLY_QUICK = {"32x3 to 32 k3 s2", "7x40 to 256", "40 to 100", "100 classes"}


@dataclass(frozen=True)
class Case:
    """A call of a kernel.

    Attributes:
        kernel: its name.
        name: the shape in words.
        make: makes its node, for that many images.
        quick: whether it is one of the few small ones.
    """

    kernel: str
    name: str
    make: Callable[[Nodes, int], Node]
    quick: bool = False


def _node(method: str, *numbers: int, images_each: int | None = 1) -> Callable[[Nodes, int], Node]:
    """Makes the node of a method of Nodes, whose first argument is that many times the images; None: it takes none."""

    def make(nodes: Nodes, images: int) -> Node:
        first = [] if images_each is None else [images * images_each]
        made: Node = getattr(nodes, method)(*first, *numbers)
        return made

    return make


def _all_cases() -> Iterator[Case]:
    """Every kernel at every shape, some of them more than once."""
    for height, into, out, stride in LAYERS:
        small = -(-height // stride)
        quick = (into, out) == (192, 192)
        for t in (3, 6):
            hidden = t * into
            for k in (3, 5, 7):
                yield Case(
                    "expand_depthwise",
                    f"{height}x{into} t{t} k{k} s{stride}",
                    _node("expand_depthwise", height, into, hidden, k, stride),
                    quick and (t, k) == (3, 3),
                )
            yield Case(
                "project",
                f"{small}x{hidden} to {out}",
                _node("project", small, hidden, out),
                quick and t == 3,
            )
            yield Case("squeeze", f"{small}x{hidden}", _node("squeeze", small, hidden), quick and t == 3)
            for channels, units in ((hidden, UNITS), (out, UNITS)):
                yield Case(
                    "norm_affine",
                    f"{channels} of {units} units",
                    _node("norm_affine", units, channels, images_each=None),
                    quick and t == 3 and channels == out,
                )
            yield Case(
                "pointwise_affine",
                f"{into} to {hidden}",
                _node("pointwise_affine", into, hidden, images_each=None),
                quick and t == 3,
            )
        for residual in (False, True) if stride == 1 and into == out else (False,):
            yield Case(
                "finish_map",
                f"{small}x{out}" + " residual" * residual,
                _node("finish_map", small, out, residual),
                quick and not residual,
            )
        if stride > 1:
            yield Case(
                "strided_conv",
                f"{height}x{into} to {out} s{stride}",
                _node("strided_conv", height, into, out, stride),
                height == 14,
            )
    # Of units: operations of DARTS for images of 32x32, and ShuffleNetV2's ends of units.
    for size, channels in UNIT_MAPS:
        for pooling, number in (("maximum", MAXIMUM), ("mean", MEAN)):
            yield Case("pool", f"{size}x{channels} {pooling} 3", _node("pool", size, channels, 3, number), size == 8)
        for k in (3, 5):
            node = _node("depthwise_conv", size, channels, k)
            yield Case("depthwise_conv", f"{size}x{channels} k{k} s1", node, (size, k) == (8, 3))
    yield Case("depthwise_conv", "32x36 k3 s2", _node("depthwise_conv", 32, 36, 3, 2))
    for size, channels in SHUFFLED_MAPS:
        for words, shuffled in (("joined", False), ("shuffled", True)):
            node = _node("arrange_channels", size, channels, shuffled)
            yield Case("arrange_channels", f"{size}x{channels} {words}", node, size == 14)
    yield Case("stem_conv", "224x3 to 32 k3 s2", _node("stem_conv", 224, 32))
    yield Case("stem_conv", "32x3 to 32 k3 s2", _node("stem_conv", 32, 32), True)
    yield Case("pointwise_affine", "320 to 1280", _node("pointwise_affine", 320, 1280, images_each=None))
    yield Case("head_pool", "7x320 to 1280", _node("head_pool", 7, 320, 1280))
    yield Case("head_pool", "7x40 to 256", _node("head_pool", 7, 40, 256), True)
    yield Case("linear", "1280 to 1000", _node("linear", 1280, 1000, images_each=16))
    yield Case("linear", "40 to 100", _node("linear", 40, 100), True)
    yield Case("path_cross_entropy", "1000 classes", _node("path_cross_entropy", 1000, images_each=PARTS))
    yield Case("path_cross_entropy", "100 classes", _node("path_cross_entropy", 100), True)


def cases(quick: bool, kernels: list[str] | None) -> list[Case]:
    """Each shape once, by kernel; of some kernels quick runs have shapes of their own.

    Raises:
        ValueError: there is no such kernel.
    """
    for kernel in kernels or ():
        if kernel not in KERNELS:
            raise ValueError(f"kernels: expected some of {', '.join(KERNELS)}, got {kernel}")
    found: dict[tuple[str, str], Case] = {}
    for case in _all_cases():
        known = found.get((case.kernel, case.name))
        if case.kernel in (kernels or KERNELS) and (known is None or case.quick):
            found[case.kernel, case.name] = case
    chosen = [case for case in found.values() if (case.quick if quick else case.name not in _ONLY_QUICK)]
    return sorted(chosen, key=lambda case: KERNELS.index(case.kernel))
