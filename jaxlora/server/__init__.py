"""The HTTP server: OpenAI's API, and vLLM's routes for adapters, over one AsyncLLM."""
