"""An OpenAI-compatible HTTP server over one model on one GPU (extra ``[serve]``).

run.py         uvicorn around the application
app.py         the routes
schema.py      request bodies, and the model's requests made from them
images.py      decode, fetch and encode images
worker.py      jobs of the model thread that deliver to the event loop
responses.py   response bodies and streams
middleware.py  API key, size limits, error responses
limits.py      bounds of requests
metrics.py     counters of /metrics
replicas.py    one server on each of several GPUs, under Ray Serve
"""
