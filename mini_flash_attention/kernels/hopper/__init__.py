"""Algorithm 1 of FlashAttention-2 for Hopper, where copies and matrix products are asynchronous.

`forward.py` holds the kernel; its parts are `scheduler.py`, `producer.py` and
`consumer.py`, which runs `mma.py` and `epilogue.py`, on top of `pipeline.py` and `softmax.py`.
"""
