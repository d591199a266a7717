"""Noise schedules, the noising process, predictions, samplers, guidance and losses."""
