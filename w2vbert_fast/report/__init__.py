"""Pages about many rows, each in one file that opens without a server."""

from w2vbert_fast.report.page import Chart, Column, Fact, Findings, Page, Row, write_page

__all__ = ["Chart", "Column", "Fact", "Findings", "Page", "Row", "write_page"]
