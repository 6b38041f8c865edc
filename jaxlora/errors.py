"""Everything jaxlora raises on purpose.

::

    JaxloraError
    ├── ConfigError (ValueError)       an engine or model option that cannot be honoured
    ├── ModelLoadError (ValueError)    a checkpoint that does not fit its configuration
    ├── AdapterError
    │   ├── AdapterNotFoundError       no adapter under this name or path
    │   ├── AdapterRefusedError (ValueError)  an adapter that cannot be served exactly
    │   └── AdapterCapacityError       every slot is in use or pinned
    ├── RequestError (ValueError)      a request that can never run (too long, bad ids)
    ├── GenerationError                a request that ran and could not be continued
    │   └── ConstraintError            because of what it constrains its text to
    └── EngineDeadError                the engine stopped after a failure

Each message names the value, the limit it met and what to change.
"""

from __future__ import annotations

import traceback


class JaxloraError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(JaxloraError, ValueError):
    """An engine or model option that cannot be honoured."""


class ModelLoadError(JaxloraError, ValueError):
    """A checkpoint that cannot be read or does not fit its configuration."""


class AdapterError(JaxloraError):
    """Base of what can be wrong with an adapter."""


class AdapterNotFoundError(AdapterError):
    """No adapter under this name or path."""


class AdapterRefusedError(AdapterError, ValueError):
    """An adapter that jaxlora cannot serve exactly, refused with the reason."""


class AdapterCapacityError(AdapterError):
    """Every slot is in use or pinned."""


class RequestError(JaxloraError, ValueError):
    """A request that can never run, whatever the load."""


class GenerationError(JaxloraError):
    """A request that ran and could not be continued; it alone has ended, with reason "error"."""


class ConstraintError(GenerationError):
    """What a request constrains its text to turned out to be too costly, or to leave nothing."""


class EngineDeadError(JaxloraError):
    """The engine stopped after a failure; its cause is chained."""


def forget_frames(error: BaseException) -> None:
    """Lets go of what the functions had at hand that an error, or a cause of it, came through: who
    keeps the error would else keep the memory of the adapter that it is about."""
    known: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is not None and id(each) not in known:
            known.add(id(each))
            traceback.clear_frames(each.__traceback__)
            todo += [each.__cause__, each.__context__]
