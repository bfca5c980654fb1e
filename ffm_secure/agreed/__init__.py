"""What all parties of a run agree on: its terms, the model and the spec both sides compute; no data."""
