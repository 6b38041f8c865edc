"""Causal attention over a shared pool of KV pages."""
