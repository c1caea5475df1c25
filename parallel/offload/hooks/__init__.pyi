from .offloader import (
    Offloader as Offloader,
)
from .program import (
    SavedOfProgram as SavedOfProgram,
)
