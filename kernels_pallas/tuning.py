"""Configurations that were measured: a JSON file in ``tuned`` for each kind of device.

A kernel looks up its case there when an engine starts and falls back to its heuristic. The format
is in tuned/README.md; benchmarks/tuner.py writes it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).parent / "tuned"

Case = TypeVar("Case")
Config = TypeVar("Config")


def path_of(device_kind: str) -> Path:
    """Where the file of a device is, whose kind is as JAX names it ("NVIDIA H200")."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json")


def load(
    device_kind: str,
    kernel: str,
    case_type: type[Case],
    config_type: type[Config],
    check: Callable[[Config, Case], None],
) -> dict[Case, Config]:
    """A kernel's measured configurations on a device; none, where nobody measured any.

    ``case_type`` and ``config_type`` are the kernel's dataclasses, of integers, booleans and tuples
    of them; ``check`` raises ValueError for a configuration that cannot serve a case. Raises
    ValueError for a file that is not as the format says.
    """
    path = path_of(device_kind)
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["device"] != device_kind:
        raise ValueError(f'{path}: measured on "{content["device"]}", not on "{device_kind}"')
    configs: dict[Case, Config] = {}
    for entry in [entry for run in content["runs"] for entry in run["entries"]]:
        if entry["kernel"] != kernel:
            continue
        try:
            case, config = _build(case_type, entry["case"]), _build(config_type, entry["config"])
            check(config, case)
            if case in configs:
                raise ValueError(f"{case} has two entries")
            timed = [trial["config"] for trial in entry["trials"] if trial.get("microseconds")]
            if entry["config"] not in timed:
                raise ValueError(f"{config} has no timings")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        configs[case] = config
    return configs


def _build(cls: type[Any], values: dict[str, Any]) -> Any:
    """A dataclass from JSON, every field of it named and none besides."""
    names = {field.name for field in dataclasses.fields(cls)}
    if set(values) != names:
        raise ValueError(f"{cls.__name__} needs {sorted(names)}, not {sorted(values)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    flat = [x for v in values.values() for x in (v if isinstance(v, tuple) else (v,))]
    if not all(isinstance(x, int) for x in flat):
        raise ValueError(f"{cls.__name__} is of integers, not {values}")
    return cls(**values)


def near(config: Config, choices: Mapping[str, Sequence[int]], reach: int = 1) -> list[Config]:
    """For each field that ``choices`` names, configurations with its next lower and higher values,
    ``reach`` of either."""
    found = []
    for name, values in choices.items():
        now = getattr(config, name)
        close = [v for v in values if v < now][-reach:] + [v for v in values if v > now][:reach]
        found += [dataclasses.replace(config, **{name: value}) for value in close]  # type: ignore[type-var]
    return found
