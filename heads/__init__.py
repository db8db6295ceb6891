"""vfmadapt.heads."""

if __name__ != "vfmadapt.heads":  # the checkout's root is on sys.path, so this folder hides a package of that name
    raise ImportError(
        "heads/ is vfmadapt.heads; set PYTHONSAFEPATH=1 or leave the checkout's root to import another one"
    )
