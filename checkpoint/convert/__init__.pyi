from .elements import (
    FLOATS as FLOATS,
)
from .work import (
    Conversion as Conversion,
    Converted as Converted,
    convert as convert,
)
