"""Raises on import, as a plugin does whose library is missing."""

raise ImportError("libacme.so.7: cannot open shared object file")
