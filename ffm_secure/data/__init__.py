"""From files, built-in sets and a hub to rows, and from rows to their owners."""
