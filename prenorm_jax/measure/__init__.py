"""Equivalence against the float64 oracle, drift, and step times with their controls."""
