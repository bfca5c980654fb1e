"""The second engine between machines: Flower carries bytes, and is imported here and nowhere else."""

import os

for _name, _value in (("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1")):
    os.environ[_name] = _value  # read when the engine is imported: it asks nobody outside
