from .certificate import (
    make_certificate as make_certificate,
)
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
    certificate_note as certificate_note,
    config_terms as config_terms,
    judge as judge,
    same_work as same_work,
    software_versions as software_versions,
)
