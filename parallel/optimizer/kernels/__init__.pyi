from .contribution_digests import (
    ContributionDigests as ContributionDigests,
)
from .dispatch import operations_of as operations_of
from .operations import (
    NONFINITE as NONFINITE,
    OUT_OF_RANGE as OUT_OF_RANGE,
)
