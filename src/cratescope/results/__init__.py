"""What was measured on some runs, and every mean, gain, interval and comparison of it, computed once from the rows."""
