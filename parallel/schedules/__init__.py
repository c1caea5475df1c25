"""Pipeline schedules as data: orders, messages, checker, simulator, list scheduler, text form.

`holdfast.parallel.schedule` is the entrance; nothing here imports torch.
"""
