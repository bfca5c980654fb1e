"""NVFlare as an engine: mutual TLS between machines, one job after another, and no code or row in it."""
