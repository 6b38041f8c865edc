"""The chat templates that an adapter may bring along."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxlora.adapters.folder import AdapterFolder
from jaxlora.adapters.sources import TOOL_USE_FILE, resolve
from jaxlora.errors import AdapterRefusedError

_MAX_TEMPLATE_BYTES = 1 << 20


class ChatTemplates(NamedTuple):
    """The templates of one tokenizer, of which transformers may save several."""

    default: str
    tool_use: str | None = None

    def template_for(self, tools: Any) -> str:
        """The one that transformers would take for a conversation with these tools."""
        return self.default if tools is None or self.tool_use is None else self.tool_use


def chat_templates_of(lora_path: str, download_dir: str | None) -> ChatTemplates | None:
    """The chat templates an adapter's folder brings along, None if it has none.

    Raises AdapterNotFoundError, and AdapterRefusedError if a file that may have them is damaged, or
    a link out of the folder, or if they are of no kind that transformers saves.
    """
    # Who loads it judges how large the weights are, before they are fetched.
    folder = AdapterFolder(resolve(lora_path, download_dir=download_dir, with_weights=False))
    files = {"default": "chat_template.jinja", "tool_use": TOOL_USE_FILE}
    found = {name: folder.text(file) for name, file in files.items()}
    templates = {name: text for name, text in found.items() if text is not None} or _by_name(
        folder.tokenizer_settings().get("chat_template")
    )
    longest = max(map(len, templates.values()), default=0)
    if longest > _MAX_TEMPLATE_BYTES:
        raise AdapterRefusedError(
            f"the adapter's chat template has {longest} characters, more than {_MAX_TEMPLATE_BYTES}"
        )
    if not templates:
        return None
    if "default" not in templates:
        raise AdapterRefusedError("none of the adapter's chat templates is the default one")
    return ChatTemplates(templates["default"], templates.get("tool_use"))


def _by_name(setting: Any) -> dict[str, str]:
    """What tokenizer_config.json calls chat_template: one, or by older versions a list of them."""
    if setting is None:
        return {}
    if isinstance(setting, str):
        return {"default": setting}
    named = {}
    for entry in setting if isinstance(setting, list) else [setting]:
        match entry:
            case {"name": str(name), "template": str(template)}:
                named[name] = template
            case _:
                raise AdapterRefusedError(
                    "the adapter's tokenizer_config.json has a chat_template that is neither text "
                    "nor a list of names and templates"
                )
    return named
