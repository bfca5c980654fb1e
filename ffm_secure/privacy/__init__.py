"""From a run file to a mechanism, and from events to statements."""
