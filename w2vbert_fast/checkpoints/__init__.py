"""Checkpoints: files of a folder or of the hub, the weights in them, and the original's layout."""
