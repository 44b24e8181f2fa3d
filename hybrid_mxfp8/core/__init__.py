"""What MXFP8 is: formats, layouts, operands, argument checks. No kernel, no GPU. May import:
``errors``, ``env``."""
