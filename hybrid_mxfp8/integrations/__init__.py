"""Other libraries with MXFP8 experts inside; each module imports its library only when it is asked to do something."""
