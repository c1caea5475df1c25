from .dispatch import (
    Arriving as Arriving,
    dispatch as dispatch,
)
from .lost_gradients import (
    add_lost_gradients as add_lost_gradients,
)
from .products import (
    expert_products as expert_products,
)
from .routing import (
    LOAD_UNIT as LOAD_UNIT,
    Choices as Choices,
    Router as Router,
    add_gradient as add_gradient,
    add_loss as add_loss,
    balance_loss as balance_loss,
    logits_of as logits_of,
)
