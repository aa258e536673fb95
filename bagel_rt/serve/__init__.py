"""An HTTP server with OpenAI's interface, over one model on one GPU (extra ``[serve]``).

run.py          the HTTP server around the application
app.py          the routes
schema.py       what requests may say, and what that means to the model
pictures.py     pictures in requests, and in answers
worker.py       the thread that owns the model: a bounded queue, batches, cancellation
answers.py      what clients get
protection.py   keys, sizes of bodies, errors without traces
limits.py       what is accepted
measures.py     what /metrics tells
"""
