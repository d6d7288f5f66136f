"""Measurements and sweeps that anybody can run again; `python -m hfpos.bench.<name>`."""
