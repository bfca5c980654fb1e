"""Adapt foundation models together, and prove what the result reveals."""
