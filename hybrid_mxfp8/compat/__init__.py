"""Other libraries' signatures over this one. May import: all below it, up to ``ops``."""
