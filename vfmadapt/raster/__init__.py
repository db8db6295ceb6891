"""GeoTIFF in, georeferenced map out."""
