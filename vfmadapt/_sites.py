"""Questions about the sites that an adapter declares."""

from collections.abc import Iterable

from vfmadapt.contracts import OnImage, OnWeight, Owned, Prompts, Site, Streams
from vfmadapt.errors import UserError


def check_batchable(name: str, sites: Iterable[Site]) -> None:
    """Raises UserError unless the adapter leaves weights, sequence and batch alone, so that it can act on some rows."""
    for site in sites:
        if isinstance(site, Owned | OnWeight | Prompts | Streams):
            what = "changes the frozen weights"
            if not isinstance(site, Owned | OnWeight):
                what = f"changes the {'sequence' if isinstance(site, Prompts) else 'batch'}'s length"
            raise UserError(
                f"adapter {name} {what}, so it cannot share a batch with others: run it by itself with use()"
            )


def first_block(sites: Iterable[Site]) -> int:
    """The first block on which an adapter acts, -1 for the patch embedding; what lies before is as without it."""
    acting = [site for site in sites if not isinstance(site, OnImage)]
    return min((-1 if getattr(s, "role", "") == "patch_embed" else getattr(s, "index", 0) for s in acting), default=0)


def describe(site: Site) -> str:
    """Kind, role and block, for messages."""
    role, index = getattr(site, "role", ""), getattr(site, "index", "")
    return " ".join(filter(None, [type(site).__name__, role, f"at block {index}" if index != "" else ""]))
