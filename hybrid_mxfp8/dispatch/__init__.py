"""Which kernels run a call, and how they are launched. May import: ``core``, ``reference``."""
