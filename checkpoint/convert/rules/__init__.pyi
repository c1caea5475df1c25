from .inverse import (
    Joined as Joined,
    Typed as Typed,
    cut as cut,
    map_back as map_back,
    state_name as state_name,
)
from .mapping import (
    map_tensors as map_tensors,
)
from .patterns import (
    Pattern as Pattern,
)
from .rules import (
    Rule as Rule,
    RuleBook as RuleBook,
    RulePart as RulePart,
    Skip as Skip,
    StateRule as StateRule,
    Strip as Strip,
    builtin_rules as builtin_rules,
    find_values as find_values,
    load_rules as load_rules,
    rules_text as rules_text,
)
