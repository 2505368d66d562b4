"""Serving: requests are drawn at the same time, and what their models compute shares batches.

    from diffusion_accel.serving.engine import Engine

- `engine`: what is asked: submit, stats, close
- `handle`: what whoever asked holds: a future, a way to cancel, how far it is
- `worker`, `twins`, `features`: a request's thread, its pipeline and what is switched on in it
- `baton`: threads of requests run one at a time
- `collector`, `calls`, `curve`: where calls of models wait, are stacked and computed; how many rows are worth it
"""
