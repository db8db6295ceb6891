"""Which device a tool computes on."""

from vfmadapt.errors import UserError


def choose_device(name: str) -> str:
    """The name "auto" gives "cuda" where there is a GPU, else "cpu"; any other is checked and given back.

    Raises:
        UserError: the device does not exist here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device={name} is not usable here ({reason}); allowed: auto, cpu, cuda, cuda:0, mps"
        ) from error
    return name
