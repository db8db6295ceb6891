"""Questions about the sites that an adapter declares."""

from collections.abc import Container, Iterable, Sequence

from vfmadapt.contracts import OnImage, OnLinear, OnWeight, Owned, Prompts, Site, Streams
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


def check_patchwise(name: str, sites: Iterable[Site]) -> None:
    """Raises UserError unless the adapter acts on each patch by itself, so that others can be hidden."""
    if not all(isinstance(site, Owned) or (isinstance(site, OnLinear) and not site.spatial) for site in sites):
        raise UserError(f"adapter {name} needs the whole grid, so patches cannot be hidden; take explora or full")


def check_called(name: str, sites: Sequence[Site], called: Container[tuple[str, int]], backbone: str) -> None:
    """Raises UserError unless each (name, number of the site) was called; `OnImage` and `Owned` are not hooks."""
    declared = [i for i, s in enumerate(sites) if not isinstance(s, OnImage | Owned)]
    if missed := [i for i in declared if (name, i) not in called]:
        raise UserError(
            f"adapter {name}: {len(missed)} of {len(declared)} sites are never called by {backbone}, "
            f"the first is {_describe(sites[missed[0]])}; this pair does not work together"
        )


def first_block(sites: Iterable[Site]) -> int:
    """The first block on which an adapter acts, -1 for the patch embedding; what lies before is as without it."""
    acting = [site for site in sites if not isinstance(site, OnImage)]
    return min((-1 if getattr(s, "role", "") == "patch_embed" else getattr(s, "index", 0) for s in acting), default=0)


def _describe(site: Site) -> str:
    """Kind, role and block, for messages."""
    role, index = getattr(site, "role", ""), getattr(site, "index", "")
    return " ".join(filter(None, [type(site).__name__, role, f"at block {index}" if index != "" else ""]))
