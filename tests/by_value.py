"""Modules that workers take as a test has patched them."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

from ray import cloudpickle


@contextlib.contextmanager
def sent_by_value(module: ModuleType) -> Iterator[None]:
    """While in it, what is pickled of a module is sent whole, not by its name.

    Tune unpickles such classes in this process, too, which makes their methods copies with globals of their own: a
    later test would have them. They are put back.
    """
    kept = {each: dict(vars(each)) for each in vars(module).values() if isinstance(each, type)}
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)
        for each, before in kept.items():
            for name, value in before.items():
                if vars(each).get(name) is not value:
                    setattr(each, name, value)
