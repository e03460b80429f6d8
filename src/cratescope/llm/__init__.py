"""Language models that explain, simulate and judge: here or on a server."""
