"""Data sets by how they are laid out: a file of classes each, and the registry of them."""
