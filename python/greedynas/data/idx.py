"""The IDX format of MNIST and its relatives (http://yann.lecun.com/exdb/mnist): a magic number, dimensions, bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped where its name ends in .gz.

    Args:
        path: the file.
        dimensions: expected number of dimensions: 1 for labels, 3 for greyscale images.

    Returns:
        uint8 tensor of the shape that the file's header gives, e.g. [n, H, W].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another kind; the message names it.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    header_size = 4 + 4 * dimensions
    if len(content) < header_size:
        raise ValueError(f"{path}: expected an IDX header of {header_size} bytes, got a file of {len(content)} bytes")
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    expected_magic = UNSIGNED_BYTE << 8 | dimensions
    if magic != expected_magic:
        raise ValueError(
            f"{path}: expected the IDX magic number {expected_magic:#010x} (unsigned bytes, {dimensions} dimensions), "
            f"got {magic:#010x}"
        )
    values = math.prod(shape)
    if len(content) != header_size + values:
        raise ValueError(
            f"{path}: the header promises {' x '.join(map(str, shape))} = {values} bytes of values, "
            f"got {len(content) - header_size}"
        )
    if values == 0:
        raise ValueError(f"{path}: holds no values (its dimensions are {' x '.join(map(str, shape))})")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header_size).reshape(shape)
