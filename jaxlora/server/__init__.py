"""The HTTP server: OpenAI's API, and vLLM's routes for adapters, over one AsyncLLM."""

from typing import Final

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""Of the server's process and of its engine's."""
