"""What a program is given, while it is on the host."""

from __future__ import annotations

from typing import Any

import numpy as np


def leaf(values: Any, dtype: type[np.generic] | None = None) -> Any:
    """A numpy array; Any, since fields are declared as what they are within a program."""
    return np.asarray(values, dtype)
