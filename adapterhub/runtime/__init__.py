"""Run adapters on a base: plans, hooks, attention, one forward pass. Floor 4, runtime."""
