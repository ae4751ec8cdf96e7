"""Where releases come from: a bundle, another hub on disk, a registry, the Hub. One protocol."""
