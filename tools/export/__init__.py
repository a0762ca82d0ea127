"""A trained network as one small file for a phone or a browser: ``python -m tools.export``."""
