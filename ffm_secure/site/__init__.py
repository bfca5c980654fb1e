"""One data owner: the only room that touches private rows."""
