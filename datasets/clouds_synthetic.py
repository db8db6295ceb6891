"""Procedural satellite scenes with clouds, thin clouds and shadows."""
from vfmadapt.datasets._clouds_scene import VERSION, Scene, render_scene
