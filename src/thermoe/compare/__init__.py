"""Comparisons: arms on the same stream, paired statistics, verdicts."""
