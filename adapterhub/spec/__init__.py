"""What is written down: names, manifests, requirements, expressions, addresses. Floor 1, manager."""
