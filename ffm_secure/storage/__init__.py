"""What is on disk: the only room that writes a run directory."""
