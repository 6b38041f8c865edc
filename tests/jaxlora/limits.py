"""The small limits of the engines that tests share, so that their programs are compiled once."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 4,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 24,
}
"""As ``LLM`` and ``EngineArgs`` take them."""
LIMITS = [
    argument
    for name, value in OPTIONS.items()
    for argument in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
]
"""The same as flags."""
