"""The server: from here no private row, no ledger and no secret of a site can be reached."""
