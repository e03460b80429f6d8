"""Scores of explanations, and their statistics."""
