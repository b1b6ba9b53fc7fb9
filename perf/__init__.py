"""Measurements. Import this as `triton_lstm.perf`."""
