"""vfmadapt.datasets."""

if __name__ != "vfmadapt.datasets":  # the checkout's root is on sys.path, so this folder hides a package of that name
    raise ImportError(
        "datasets/ is vfmadapt.datasets; set PYTHONSAFEPATH=1 or leave the checkout's root to import another one"
    )
