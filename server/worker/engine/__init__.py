"""From rows of numbers through a forward pass to rows of numbers."""
