"""Joules of a forward as a model: a prior, later a fit to this machine."""
