"""The viewer: look around in neurons, type text, force them, and compare models."""
