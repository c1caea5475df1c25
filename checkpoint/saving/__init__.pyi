from .arena import (
    Cancelled as Cancelled,
    Deadline as Deadline,
)
from .coordination import (
    Coordination as Coordination,
    Members as Members,
    numbered as numbered,
)
from .job import (
    SaveJob as SaveJob,
    SaveResult as SaveResult,
)
from .saver import (
    Saver as Saver,
)
from .write_plan import (
    LARGEST_FILE_BYTES as LARGEST_FILE_BYTES,
    make_write_plan as make_write_plan,
)
