from .arrays import (
    Bits as Bits,
    GrowingMemory as GrowingMemory,
    bits as bits,
    cast as cast,
    combine as combine,
    load_torch as load_torch,
    needs_torch as needs_torch,
    number as number,
    strided as strided,
    use_one_thread as use_one_thread,
)
from .block_scales import (
    EIGHT_BITS as EIGHT_BITS,
    BlockScale as BlockScale,
    BlockScales as BlockScales,
)
from .crc32 import (
    combine_crc32 as combine_crc32,
)
from .output import (
    FLOATS as FLOATS,
    UNIT_BYTES as UNIT_BYTES,
    Checksum as Checksum,
    Output as Output,
    Unit as Unit,
    row_boxes as row_boxes,
    units_of as units_of,
)
from .pieces import (
    Location as Location,
    LogicalTensor as LogicalTensor,
    SourcePiece as SourcePiece,
    SourceTensor as SourceTensor,
    ZipRecord as ZipRecord,
    check_complete as check_complete,
    fragment_pieces as fragment_pieces,
    moved as moved,
    overlay as overlay,
    row_major as row_major,
    stored as stored,
)
from .regions import (
    Region as Region,
    region_of as region_of,
)
