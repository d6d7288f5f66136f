"""Making results readable: tables, pictures and a page of a comparison, and the record of what they were measured with."""
