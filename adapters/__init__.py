"""vfmadapt.adapters."""

if __name__ != "vfmadapt.adapters":  # the checkout's root is on sys.path, so this folder hides a package of that name
    raise ImportError(
        "adapters/ is vfmadapt.adapters; set PYTHONSAFEPATH=1 or leave the checkout's root to import another one"
    )
