"""The run file: what it may say, and which choices go together."""
