"""Attacks that rebuild inputs, labels or tokens from an observed update."""
