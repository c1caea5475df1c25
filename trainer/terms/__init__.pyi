from .exchange import (
    compare_terms as compare_terms,
    require_equal_terms as require_equal_terms,
)
from .own_terms import (
    own_terms as own_terms,
)
from .terms import (
    Terms as Terms,
    TermsDiffer as TermsDiffer,
    Verdict as Verdict,
    config_terms as config_terms,
    judge as judge,
    software_versions as software_versions,
)
