"""How many blocks of a kernel a multiprocessor holds."""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 1 << 16  # of a multiprocessor, on every architecture here
_WARP_REGISTERS = 256  # warps get them in such portions
_SHARED_PORTION = 128  # bytes
_PARTITIONS = 4  # of a multiprocessor; a warp's registers are those of one


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").

    Attributes:
        warps: resident ones.
        blocks: resident ones.
        shared: bytes.
        block_shared: bytes that a block can have at most.
        reserved: bytes of shared memory that the system takes of each block.
    """

    warps: int
    blocks: int
    shared: int
    block_shared: int
    reserved: int = 1024


MULTIPROCESSORS = {
    "7.5": Multiprocessor(warps=32, blocks=16, shared=64 << 10, block_shared=64 << 10, reserved=0),
    "8.0": Multiprocessor(warps=64, blocks=32, shared=164 << 10, block_shared=163 << 10),
    "8.6": Multiprocessor(warps=48, blocks=16, shared=100 << 10, block_shared=99 << 10),
    "8.9": Multiprocessor(warps=48, blocks=24, shared=100 << 10, block_shared=99 << 10),
    "9.0": Multiprocessor(warps=64, blocks=32, shared=228 << 10, block_shared=227 << 10),
    "10.0": Multiprocessor(warps=64, blocks=32, shared=228 << 10, block_shared=227 << 10),
    "12.0": Multiprocessor(warps=48, blocks=24, shared=100 << 10, block_shared=99 << 10),
}


def resident_blocks(architecture: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of `threads` threads with `shared` bytes, static ones included; 0 if one does not fit."""
    limits = MULTIPROCESSORS[architecture]
    if shared > limits.block_shared:
        return 0
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // _WARP_REGISTERS) * _WARP_REGISTERS
    register_warps = REGISTERS // _PARTITIONS // warp_registers * _PARTITIONS
    portion = -(-(shared + limits.reserved) // _SHARED_PORTION) * _SHARED_PORTION
    by_shared = limits.shared // portion if portion else limits.blocks
    return min(limits.blocks, limits.warps // warps, register_warps // warps, by_shared)
