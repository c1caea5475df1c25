from .agreement import (
    Agreement as Agreement,
)
from .described import (
    ProgramState as ProgramState,
)
from .meeting import (
    Meeting as Meeting,
)
from .restore import (
    Restore as Restore,
)
from .staging import (
    Staging as Staging,
)
from .tensors import (
    ProgramTensor as ProgramTensor,
)
