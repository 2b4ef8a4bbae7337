"""Loading ahead of the consumer in a background thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def prefetched(load: Callable[[Key], Value], keys: Iterable[Key], depth: int) -> Iterator[Value]:
    """Yield load(key) for each key in order, up to `depth` of them loaded ahead of the consumer.

    One background thread does the loading, so `load` is never run twice at once. An error of `load` is raised where its
    value would have been yielded. Leaving the iterator early waits for the load that is under way and drops the rest.

    Args:
        load: what makes a value of a key.
        keys: may be endless.
        depth: how many values wait in memory at most; 0 loads in the caller's thread.
    """
    if depth == 0:
        yield from map(load, keys)
        return
    pending: deque[Future[Value]] = deque()
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="greedynas-prefetch")
    try:
        for key in keys:
            pending.append(executor.submit(load, key))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
