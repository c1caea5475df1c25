from .family import (
    FAMILY as FAMILY,
)
