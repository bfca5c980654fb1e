"""Backbones: loaded, built in code, named by what they hold."""
