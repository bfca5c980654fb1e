"""Invented notes of invented hospitals: data for examples and tests that nobody wrote about anybody."""
