"""Independent pieces of work, each on a thread of its own, with the results in order.

PyTorch's own threads wait for one another, spinning, at the end of every operator, which costs most
on busy cores. Threads that each work on a block of rows of their own don't wait.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result, None, None]:
    """``work(item)`` of each item, in their order, at most ``threads + 1`` of them in memory.
    While it runs each operator has one thread. Close the iterator if it is not used up."""
    if threads == 1:
        yield from map(work, items)
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            pending: deque[Future[Result]] = deque()
            for item in items:
                pending.append(pool.submit(contextvars.copy_context().run, work, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(before)  # the workers' calls count for threads that start later
