from .loader import (
    LoadStatistics as LoadStatistics,
    Target as Target,
    boxes_of as boxes_of,
    load as load,
)
from .read_plan import (
    ChunkRead as ChunkRead,
    check_coverage as check_coverage,
    requests_of as requests_of,
)
from .readers import (
    ByteReader as ByteReader,
    FolderReader as FolderReader,
    RemoteReader as RemoteReader,
)
