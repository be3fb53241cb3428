"""The parts of the tokenizer: vocabulary, lists of ids, text of CTC paths, files."""
