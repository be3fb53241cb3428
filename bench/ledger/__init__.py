"""The cost ledger: what the encoder asks of a GPU, counted. See docs/inside/ledger.md."""
