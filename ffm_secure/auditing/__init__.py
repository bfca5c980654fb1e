"""Attack a run: the only room that imports attacks."""
