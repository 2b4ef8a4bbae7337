"""`adapt`: the chain view of a supernet that already exists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from greedynas_ext import arguments
from greedynas_ext.adapt_build import chain_of
from greedynas_ext.adapt_cut import NotAChain, cut
from greedynas_ext.adapt_elastic import Elastic, channels_of
from greedynas_ext.adapt_find import NotFound, Traces, by_argument, by_attribute
from greedynas_ext.adapt_select import ByArgument, ByFunction, Selection, kept_attributes
from greedynas_ext.adapt_switches import by_attributes, by_function
from greedynas_ext.adapt_told import ToldLayer, told_layers
from greedynas_ext.adapt_trace import Supernet
from greedynas_ext.adapted import AdaptedSupernet
from greedynas_ext.arguments import SupernetLike
from greedynas_ext.fx_trace import Untraceable


def adapt(
    module: nn.Module,
    *,
    choices: Sequence[Any] | Callable[..., Any] | None = None,
    select: str | Callable[[nn.Module, list[Any]], Any] | None = None,
    output: int | str | Callable[[Any], Any] | None = None,
    example: Tensor | None = None,
    verify: bool = True,
) -> AdaptedSupernet:
    """The view of a supernet that `evaluate_paths` takes, for one that has no `stem`, `choices` and `head`.

    The supernet's forward is traced, on a symbol and without running any candidate: with one path, with each option of
    each layer, and with random paths. What an option changes is the layer; what is common stands before, between and
    after the layers as fixed blocks. So it does not matter where the candidates are kept (lists, dictionaries,
    attributes), how many a layer has, what classes they have, or what the forward does around them, such as adding a
    shortcut. Elastic networks, in which a function (`select=`) says what blocks are, and forwards slice and transform
    weights, are chains too: of the blocks that paths run. A forward that cannot be cut into a chain is called for each
    path.

    Nothing is copied: training goes on with `module`, and the next evaluation sees its weights. Its structure may not
    change; where it did, evaluation raises RuntimeError.

    Args:
        module: the supernet. How it chooses is found if a path is an argument of its forward or one of its attributes,
            with a position for each layer (or the key, where an nn.ModuleDict holds the candidates), or if modules that
            hold candidates have an attribute that says which of them runs. Layers stand in the order of the path; of
            attributes in the order in which the modules are registered.
        choices: the layers, where they are not found or others are: names of the modules that hold candidates; or a
            function of (name, module), true for those; or the candidates of each layer, or a function of `module` that
            returns them; or, with `select`, for each layer the values that stand for its options, or their number.
        select: how a choice is set: the name of the argument or attribute; or a function of (module, values), with a
            value for each layer, that sets it. What it returns is given to forward beside the images, a tuple as
            arguments and a dict as keyword arguments. It is also called on a shadow of the module, and whatever
            attributes it sets are put back after each call.
        output: which part of what forward returns are the logits [N, classes]: an index or key, or a function of it.
        example: floating [N, C, H, W]: compare chain and supernet on these images now, instead of on the first that
            are evaluated.
        verify: whether to compare them, and what is recognised with the modules, at all.

    Returns:
        AdaptedSupernet; `reason` says why the supernet is called path by path, where it is.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; where the way in which the
            supernet chooses is not found; and where chain and supernet differ on `example`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if select is not None and not isinstance(select, str) and not callable(select):
        raise TypeError(f"select: expected a name or a function, got {type(select).__name__}")
    supernet = Supernet(module, _picked(output))
    told = told_layers(choices, supernet)
    with kept_attributes(module):
        selection, traces, reason = _selection(supernet, told, select)
        found, traced = None, reason is None
        if traced:
            try:
                found = cut(selection, traces)
            except (NotAChain, Untraceable) as error:
                reason = str(error)
        elastic = None
        if found is None and callable(select) and traced:
            try:
                elastic, reason = Elastic(supernet, selection, channels_of(supernet, example)), None
            except (NotAChain, Untraceable) as error:
                reason = str(error)
    chain, inlined = (None, None) if found is None else chain_of(found, selection, supernet)
    adapted = AdaptedSupernet(supernet, selection, traces, found, chain, reason, verify, inlined, elastic)
    if example is not None and verify:
        adapted.verify(arguments.check_images("example", example, None))
    return adapted


def _selection(
    supernet: Supernet, told: tuple[ToldLayer, ...] | None, select: str | Callable[..., Any] | None
) -> tuple[Selection, Traces, str | None]:
    """How the supernet chooses; a reason where that cannot be traced, but is known."""
    if callable(select):
        if told is None:
            raise ValueError(
                "choices: expected the values of each layer's options beside a function as select, got None"
            )
        try:
            return *by_function(supernet, told, select), None
        except Untraceable as error:
            selection = ByFunction(tuple(layer.options for layer in told), select)
            return selection, Traces(supernet), f"select on a shadow: {error}"
    tried = []
    try:
        return *by_argument(supernet, told, select), None
    except NotFound as error:
        tried.append(str(error))
    except Untraceable as error:
        parameter = _only_parameter(supernet.module, select)
        if told is not None and parameter is not None:
            return ByArgument(tuple(layer.options for layer in told), parameter), Traces(supernet), str(error)
        raise ValueError(f"module: {error}{_advice(supernet.module)}") from error
    for find in (by_attributes, by_attribute):
        try:
            return *find(supernet, told, select), None
        except NotFound as error:
            tried.append(str(error))
    raise ValueError(
        f"module: expected a forward, or modules in it, with something that chooses; found none "
        f"({'; '.join(filter(None, tried))}){_advice(supernet.module)}"
    )


def _advice(module: nn.Module) -> str:
    if isinstance(module, SupernetLike):
        return "; it has stem, choices and head: evaluate_paths takes it as it is"
    return "; choices= says what the layers are, select= how a choice is set"


def _only_parameter(module: nn.Module, name: str | None) -> str | None:
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    if name is not None:
        return name if name in named else None
    return named[0] if len(named) == 1 else None


def _picked(output: Any) -> Callable[[Any], Any]:
    if output is None:
        return lambda returned: returned
    if callable(output):
        return output  # type: ignore[no-any-return]
    if isinstance(output, int | str) and not isinstance(output, bool):
        return lambda returned: returned[output]
    raise TypeError(f"output: expected an index, a key or a function, got {type(output).__name__}")
