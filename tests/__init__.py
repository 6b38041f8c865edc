"""The tests. ``check`` is their run-time type checker: beartype, an int passing for a float."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
