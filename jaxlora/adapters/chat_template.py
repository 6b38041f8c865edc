"""The chat template that an adapter may bring along."""

from __future__ import annotations

import json

from jaxlora.adapters.sources import resolve
from jaxlora.errors import AdapterRefusedError

_MAX_TEMPLATE_BYTES = 1 << 20


def chat_template_of(lora_path: str, download_dir: str | None) -> str | None:
    """The chat template an adapter's folder brings along, None if it has none.

    Raises AdapterNotFoundError, and AdapterRefusedError if a file that may have it is damaged.
    """
    folder = resolve(lora_path, download_dir=download_dir)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        if file.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise AdapterRefusedError(f"{name} has more than {_MAX_TEMPLATE_BYTES} bytes")
        try:
            text = file.read_text(encoding="utf-8")
            template = text if name.endswith(".jinja") else json.loads(text)["chat_template"]
        except KeyError:
            continue
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise AdapterRefusedError(f"{name} cannot be read: {type(error).__name__}") from error
        if isinstance(template, str):
            return template
    return None
