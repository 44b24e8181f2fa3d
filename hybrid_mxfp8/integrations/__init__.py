"""Plug-ins for other libraries. May import: all below it, up to ``ops``, and ``checkpoint``."""
