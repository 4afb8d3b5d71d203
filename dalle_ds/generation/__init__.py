"""Drawing pictures from a trained prior."""
