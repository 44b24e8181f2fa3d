"""``python -m hybrid_mxfp8``."""

from hybrid_mxfp8.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
