from .arena import (
    Cancelled as Cancelled,
    Deadline as Deadline,
)
from .coordination import (
    Coordination as Coordination,
)
from .job import (
    SaveResult as SaveResult,
)
from .saver import (
    SaveJob as SaveJob,
    Saver as Saver,
    own_connection as own_connection,
)
from .snapshot import (
    ALL as ALL,
)
from .write_plan import (
    LARGEST_FILE_BYTES as LARGEST_FILE_BYTES,
    make_write_plan as make_write_plan,
)
