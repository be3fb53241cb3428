"""Launch configurations: frozen dataclasses from pure functions of shape, dtype and
architecture."""
