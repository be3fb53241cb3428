"""What is made of recordings: transcripts, hidden states, classes."""
