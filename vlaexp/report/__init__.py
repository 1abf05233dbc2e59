"""From evidence to a comparison and its pictures."""
