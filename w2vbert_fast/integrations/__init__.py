"""Ways to use this package from other libraries, one module each; none is imported by itself."""
