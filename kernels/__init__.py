"""vfmadapt.kernels."""

if __name__ != "vfmadapt.kernels":  # the checkout's root is on sys.path, so this folder hides a package of that name
    raise ImportError(
        "kernels/ is vfmadapt.kernels; set PYTHONSAFEPATH=1 or leave the checkout's root to import another one"
    )
