"""Other libraries with MXFP8 experts inside; each is imported only when it is used."""
