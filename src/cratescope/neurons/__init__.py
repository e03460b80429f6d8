"""Neurons: where they live, what they do on text, what an LLM says of them, and how well that predicts them."""
