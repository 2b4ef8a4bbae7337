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


def _case(kernel: str, name: str, *numbers: int, quick: bool = False, images_each: int | None = 1) -> Case:
    """Of the method of Nodes that is called as the kernel.

    Its arguments are `images_each` times the images, unless that is None, and `numbers`.
    """

    def make(nodes: Nodes, images: int) -> Node:
        first = [] if images_each is None else [images * images_each]
        made: Node = getattr(nodes, kernel)(*first, *numbers)
        return made

    return Case(kernel, name, make, quick)


def _all_cases() -> Iterator[Case]:
    """Every kernel at every shape, some of them more than once."""
    for height, into, out, stride in LAYERS:
        small = -(-height // stride)
        quick = (into, out) == (192, 192)
        for t in (3, 6):
            hidden = t * into
            for k in (3, 5, 7):
                yield _case(
                    "expand_depthwise",
                    f"{height}x{into} t{t} k{k} s{stride}",
                    height,
                    into,
                    hidden,
                    k,
                    stride,
                    quick=quick and (t, k) == (3, 3),
                )
            yield _case("project", f"{small}x{hidden} to {out}", small, hidden, out, quick=quick and t == 3)
            yield _case("squeeze", f"{small}x{hidden}", small, hidden, quick=quick and t == 3)
            for channels, units in ((hidden, UNITS), (out, UNITS)):
                yield _case(
                    "norm_affine",
                    f"{channels} of {units} units",
                    units,
                    channels,
                    quick=quick and t == 3 and channels == out,
                    images_each=None,
                )
            yield _case(
                "pointwise_affine", f"{into} to {hidden}", into, hidden, quick=quick and t == 3, images_each=None
            )
        for residual in (False, True) if stride == 1 and into == out else (False,):
            yield _case(
                "finish_map",
                f"{small}x{out}" + " residual" * residual,
                small,
                out,
                residual,
                quick=quick and not residual,
            )
        if stride > 1:
            yield _case(
                "strided_conv", f"{height}x{into} to {out} s{stride}", height, into, out, stride, quick=height == 14
            )
    # Of units: operations of DARTS for images of 32x32, and ShuffleNetV2's ends of units.
    for size, channels in UNIT_MAPS:
        for pooling, number in (("maximum", MAXIMUM), ("mean", MEAN)):
            yield _case("pool", f"{size}x{channels} {pooling} 3", size, channels, 3, number, quick=size == 8)
        for k in (3, 5):
            yield _case("depthwise_conv", f"{size}x{channels} k{k} s1", size, channels, k, quick=(size, k) == (8, 3))
    yield _case("depthwise_conv", "32x36 k3 s2", 32, 36, 3, 2)
    for size, channels in SHUFFLED_MAPS:
        for words, shuffled in (("joined", False), ("shuffled", True)):
            yield _case("arrange_channels", f"{size}x{channels} {words}", size, channels, shuffled, quick=size == 14)
    yield _case("stem_conv", "224x3 to 32 k3 s2", 224, 32)
    yield _case("stem_conv", "32x3 to 32 k3 s2", 32, 32, quick=True)
    yield _case("pointwise_affine", "320 to 1280", 320, 1280, images_each=None)
    yield _case("head_pool", "7x320 to 1280", 7, 320, 1280)
    yield _case("head_pool", "7x40 to 256", 7, 40, 256, quick=True)
    yield _case("linear", "1280 to 1000", 1280, 1000, images_each=16)
    yield _case("linear", "40 to 100", 40, 100, quick=True)
    yield _case("path_cross_entropy", "1000 classes", 1000, images_each=PARTS)
    yield _case("path_cross_entropy", "100 classes", 100, quick=True)


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
