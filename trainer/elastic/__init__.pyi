from .loop import (
    train_seat as train_seat,
)
