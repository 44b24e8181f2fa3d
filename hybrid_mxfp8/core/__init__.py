"""What MXFP8 is, and argument checks. No kernel, no GPU. May import: ``errors``, ``env``."""
