"""Knows another library: lm_eval, the adapter for lm-evaluation-harness."""
