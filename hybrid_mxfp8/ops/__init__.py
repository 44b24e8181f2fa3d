"""The public functions, a file each. May import all packages but the user-facing ones above it."""
