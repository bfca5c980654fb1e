"""Who runs a federation of real machines: it proposes, asks and opens, and can do nothing to a site."""
