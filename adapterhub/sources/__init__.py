"""Where releases come from: one protocol for a bundle, a hub, a registry and the Hub. Floor 3, manager."""
