"""How much the formats keep of real operands: the ``accuracy`` command."""
