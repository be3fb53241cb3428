"""CTC: times, forced alignment, beam search, chunks of long recordings, subtitles."""
