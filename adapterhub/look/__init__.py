"""Looking at adapters without running them: what they touch, how strongly, and whether an expression would run."""
