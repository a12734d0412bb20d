"""Other libraries that the zoo's models plug into; each needs an extra of its own."""
