"""The public functions, a file each: check, plan, allocate, run.

May import: ``errors``, ``env``, ``core``, ``reference``, ``dispatch``.
"""
