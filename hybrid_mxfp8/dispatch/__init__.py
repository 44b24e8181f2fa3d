"""Which kernels run a call, and how. May import: ``errors``, ``env``, ``core``, ``reference``."""
