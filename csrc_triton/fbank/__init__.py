"""Log-mel filterbank features and their normalisation."""

from csrc_triton.fbank.forward import log_mel_filterbank, normalize_and_stack

__all__ = ["log_mel_filterbank", "normalize_and_stack"]
