"""Converting checkpoints between formats: by byte ranges, in bounded memory, checked before it is done."""
