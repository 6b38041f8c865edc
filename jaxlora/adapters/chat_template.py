"""The chat template that an adapter may bring along."""

from __future__ import annotations

from jaxlora.adapters.folder import AdapterFolder
from jaxlora.adapters.sources import resolve
from jaxlora.errors import AdapterRefusedError

_MAX_TEMPLATE_BYTES = 1 << 20


def chat_template_of(lora_path: str, download_dir: str | None) -> str | None:
    """The chat template an adapter's folder brings along, None if it has none.

    Raises AdapterNotFoundError, and AdapterRefusedError if a file that may have it is damaged, or a
    link out of the folder.
    """
    # Who loads it judges how large the weights are, before they are fetched.
    folder = AdapterFolder(resolve(lora_path, download_dir=download_dir, with_weights=False))
    template = folder.text("chat_template.jinja")
    if template is None:
        template = folder.tokenizer_settings().get("chat_template")
    if not isinstance(template, str):
        return None
    if len(template) > _MAX_TEMPLATE_BYTES:
        raise AdapterRefusedError(
            f"the adapter's chat template has {len(template)} characters, more than "
            f"{_MAX_TEMPLATE_BYTES}"
        )
    return template
