"""The cost ledger: what the encoder asks of a GPU, counted without one. See docs/inside/ledger.md."""
