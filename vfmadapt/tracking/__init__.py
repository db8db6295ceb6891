"""Structures followed through videos and volumes with SAM2's memory, frame by frame."""
