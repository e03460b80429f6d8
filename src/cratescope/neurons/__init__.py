"""Neurons: where they live, what they do on text, how an LLM explains them, and how well that predicts them."""
