"""An HTTP server with OpenAI's interface, over one model on one GPU (extra ``[serve]``).

    app.py          the routes
    schema.py       what requests may say, and what that means to the model
    pictures.py     pictures in requests, and in answers
    worker.py       the thread that owns the model: a bounded queue, batches, cancellation
    protection.py   keys, sizes of bodies, errors without traces
    measures.py     what /metrics tells
"""
