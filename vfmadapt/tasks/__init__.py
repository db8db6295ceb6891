"""Lightning modules and data modules, one file per task."""
