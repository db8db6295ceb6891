"""Depth learnt from video without labels: what the frames of a moving camera must have in common."""
