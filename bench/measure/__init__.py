"""Clocks, limits, comparisons with the plain model, and the report."""
