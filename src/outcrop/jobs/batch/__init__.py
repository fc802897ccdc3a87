"""Batch inference: the input's records, the journal of answers, the outputs, and the attempt."""
