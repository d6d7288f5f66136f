"""Making results readable: plots, and the record of what they were measured with."""
