"""Evaluation: log-likelihoods with shared prefixes, generation up to stop strings, the standard harness on both."""
