"""Less memory: quantised weights, parts and blocks that wait on the host, budgets."""
