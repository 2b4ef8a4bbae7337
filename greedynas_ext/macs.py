"""Multiply-accumulates of the torch functions that do the arithmetic on weights, from shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# (output, positional arguments, keyword arguments) of a call -> its multiply-accumulates
Count: TypeAlias = Callable[[Any, Sequence[Any], dict[str, Any]], int]


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, *names: str) -> Tensor:
    value = args[position] if len(args) > position else next(kwargs[name] for name in names if name in kwargs)
    assert isinstance(value, Tensor)
    return value


def _convolution(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return output.numel() * _argument(args, kwargs, 1, "weight").shape[1:].numel()


def _transposed_convolution(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return _argument(args, kwargs, 0, "input").numel() * _argument(args, kwargs, 1, "weight").shape[1:].numel()


def _linear(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return output.numel() * _argument(args, kwargs, 1, "weight").shape[-1]


def _bilinear(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return output.numel() * _argument(args, kwargs, 2, "weight").shape[1:].numel()


def _product(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return output.numel() * _argument(args, kwargs, 0, "input").shape[-1]


def _added_product(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return output.numel() * _argument(args, kwargs, 1, "mat1", "batch1").shape[-1]


def _dot_product_attention(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    query, key = _argument(args, kwargs, 0, "query"), _argument(args, kwargs, 1, "key")
    return output.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + output.shape[-1])


def _multi_head_attention(output: tuple[Tensor, Any], args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    query, key, value = (_argument(args, kwargs, i, name) for i, name in enumerate(("query", "key", "value")))
    projections = 2 * query.numel() + key.numel() + value.numel()
    return query.shape[-1] * (projections + 2 * query.shape[:-1].numel() * key.shape[0])


def _einsum(output: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Operands are contracted from the left, as torch does; products without a sum are not counted."""
    operands: Sequence[Tensor] = args[1] if isinstance(args[1], list | tuple) else args[1:]
    inputs, arrow, result = args[0].replace(" ", "").partition("->")
    terms = [_labels(term, x.dim()) for term, x in zip(inputs.split(","), operands, strict=True)]
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for label, size in zip(term, operand.shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    if arrow:
        kept = set(_labels(result, output.dim()))
    else:
        times = Counter(label for term in terms for label in term)
        kept = {label for label, count in times.items() if count == 1 or label.isdigit()}
    macs, so_far = 0, set(terms[0])
    for position, term in enumerate(terms[1:], 1):
        later = kept.union(*terms[position + 1 :])
        # What only one of the two has, and nobody after them, is summed before they are multiplied.
        both = (so_far & (later | set(term))) | (set(term) & (later | so_far))
        so_far = both & later
        if so_far != both:
            macs += math.prod(sizes[label] for label in both)
    return macs


def _labels(term: str, dimensions: int) -> list[str]:
    """A letter for each dimension; those of an ellipsis are numbered from the right."""
    before, ellipsis, after = term.partition("...")
    count = dimensions - len(before) - len(after) if ellipsis else 0
    return [*before, *(str(number) for number in reversed(range(count))), *after]


COUNTS: dict[Callable[..., Any], Count] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed_convolution),
    F.linear: _linear,
    F.bilinear: _bilinear,
    **dict.fromkeys(
        (torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm), _product
    ),
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm, Tensor.__rmatmul__), _added_product),
    torch.einsum: _einsum,
    F.scaled_dot_product_attention: _dot_product_attention,
    F.multi_head_attention_forward: _multi_head_attention,
}
