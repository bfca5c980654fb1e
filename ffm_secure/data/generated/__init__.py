"""Builtin data sets that are drawn from a seed: invented payments, messages and streets."""
