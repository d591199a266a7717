"""Noise schedules, the noising process, parameterisations, samplers, guidance and losses."""
