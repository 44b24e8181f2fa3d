"""A function run in a forked child, which costs no import of torch and may be killed; or in a
spawned one, which may use a GPU."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


class Child:
    """Starts at once, in a session of its own, so that what it starts can be killed with it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, spawned: bool = False) -> None:
        context: Any = multiprocessing.get_context("spawn" if spawned else "fork")
        self._mine, theirs = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_run, args=(theirs, function, arguments))
        self.process.start()
        theirs.close()

    def result(self, seconds: float = 60) -> Any:
        """What the function returned, or the traceback as a string; None if it was killed,
        as it is after so many ``seconds``."""
        if not self._mine.poll(seconds):
            self.process.kill()  # else its parent would wait for it at the end
        try:
            answer = self._mine.recv()
        except EOFError:
            answer = None
        self.process.join(seconds)
        assert self.process.exitcode is not None
        return answer


def _run(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    try:
        pipe.send(function(*arguments))
    except BaseException:
        pipe.send(traceback.format_exc())
