"""Language models that explain, simulate and judge: here or behind a server."""
