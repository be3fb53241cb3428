"""Jobs over many recordings: their input, their tables, and what lets a killed one go on."""
