"""Measurements of some runs, with every mean, gain, interval and comparison computed once from the rows."""
