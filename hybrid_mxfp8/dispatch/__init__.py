"""Which kernels run a call, and how they are launched. May import: ``errors``, ``env``, ``core``,
``reference``."""
