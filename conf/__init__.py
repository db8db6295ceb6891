"""vfmadapt.conf."""

if __name__ != "vfmadapt.conf":  # the checkout's root is on sys.path, so this folder hides a package of that name
    raise ImportError("conf/ is vfmadapt.conf; set PYTHONSAFEPATH=1 or leave the checkout's root to import another one")
