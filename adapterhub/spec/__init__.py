"""What is written down: names, manifests, requirements, expressions and addresses."""
