"""The seams of the project: what a backbone, an adapter, a head and a data set promise one another.

Every method is written against this package alone. B batch, C channels, H W pixels, h w cells of the token grid, P
prefix tokens, K classes, N tokens.
"""

from vfmadapt.contracts.adapter import Adapter, Merger
from vfmadapt.contracts.backbone import (
    LINEAR_ROLES,
    ROLES,
    Backbone,
    BackboneSpec,
    Blank,
    Features,
    PatchBackbone,
    Place,
    joined,
)
from vfmadapt.contracts.clips import Clips, ClipSample, ClipSource
from vfmadapt.contracts.data import (
    IGNORE_INDEX,
    ClassSpec,
    DataSource,
    DataSpec,
    Sample,
    Samples,
    UnlabelledSource,
    ValueSpec,
)
from vfmadapt.contracts.head import Head, Instances
from vfmadapt.contracts.prompts import MaskPrompts, PointGrid, PromptedMasks, PromptHead
from vfmadapt.contracts.sites import (
    AfterBlock,
    GridFn,
    Instead,
    OnImage,
    OnInput,
    OnLinear,
    OnOutput,
    OnWeight,
    Owned,
    ParallelMLP,
    Prompts,
    Site,
    Streams,
    TokenFn,
)
from vfmadapt.contracts.values import DepthSample, FrameTriple, ValueSample, ValueSamples, ValueSource
from vfmadapt.errors import UserError

__all__ = [
    "IGNORE_INDEX",
    "LINEAR_ROLES",
    "ROLES",
    "Adapter",
    "AfterBlock",
    "Backbone",
    "BackboneSpec",
    "Blank",
    "ClassSpec",
    "ClipSample",
    "ClipSource",
    "Clips",
    "DataSource",
    "DataSpec",
    "DepthSample",
    "Features",
    "FrameTriple",
    "GridFn",
    "Head",
    "Instances",
    "Instead",
    "MaskPrompts",
    "Merger",
    "OnImage",
    "OnInput",
    "OnLinear",
    "OnOutput",
    "OnWeight",
    "Owned",
    "ParallelMLP",
    "PatchBackbone",
    "Place",
    "PointGrid",
    "PromptHead",
    "PromptedMasks",
    "Prompts",
    "Sample",
    "Samples",
    "Site",
    "Streams",
    "TokenFn",
    "UnlabelledSource",
    "UserError",
    "ValueSample",
    "ValueSamples",
    "ValueSource",
    "ValueSpec",
    "joined",
]
