"""Let an error leave a site without the variables of the code that raised it: a crash report shows those by
name.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def without_locals(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap a function that works on private rows.

    Guarantee: an error that leaves it, and each error behind that one, holds no local variable and no
    argument of it or of what it called; where the error arose stays to be seen.
    """

    @wraps(function)
    def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return function(*arguments, **options)
        except BaseException as error:
            for cause in _causes(error):
                traceback.clear_frames(cause.__traceback__)
            raise
        finally:
            del arguments, options

    return call


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all it came from, each once."""
    visited: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or id(cause) in visited:
            continue
        visited.add(id(cause))
        yield cause
        waiting += [cause.__cause__, cause.__context__]
        if isinstance(cause, BaseExceptionGroup):
            waiting += cause.exceptions
