"""From records to a page that an officer reads."""
