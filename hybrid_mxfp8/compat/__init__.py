"""Other systems' signatures over this package's kernels."""
