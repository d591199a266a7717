"""Attacks with seeds: what the programs must survive, and say. Long ones by hand, quick ones in the suite."""
