"""Explanations of neurons, and what an LLM makes of them."""
