from .boxes import (
    Box as Box,
    Holder as Holder,
    Layout as Layout,
    TensorSpec as TensorSpec,
    covers as covers,
    even_range as even_range,
    transfers as transfers,
    without as without,
)
from .mesh import (
    AXES as AXES,
    Axis as Axis,
    Coordinates as Coordinates,
    Mesh as Mesh,
)
from .parameters import (
    HeadRows as HeadRows,
    HeldRow as HeldRow,
    Initial as Initial,
    LayerSpec as LayerSpec,
    ParameterSpec as ParameterSpec,
    contributing_parts as contributing_parts,
    expert_count as expert_count,
    held_rows as held_rows,
)
from .slices import (
    GradientMark as GradientMark,
    LostGradient as LostGradient,
    SharePlace as SharePlace,
    SliceKey as SliceKey,
    Slices as Slices,
    slices_of as slices_of,
)
from .stage_boundary import (
    boundary_routes as boundary_routes,
    unit_rows as unit_rows,
)
from .stage_replicas import (
    StageReplica as StageReplica,
    StageReplicas as StageReplicas,
)
