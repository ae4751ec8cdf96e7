"""Run adapters on a base: plans, hooks, attention, and one forward pass under them."""
