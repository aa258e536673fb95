"""An OpenAI-compatible HTTP server over one model on one GPU (extra ``[serve]``).

run.py         uvicorn around the application
app.py         the routes
schema.py      request bodies
neutral.py     fields that are accepted only with no-op values
bodies.py      read JSON bodies and forms
model_requests.py  the model's requests, made from request bodies
errors.py      errors with OpenAI's code and param, and the responses to them
request_log.py  ids, log lines and counts of requests
openapi.py     the OpenAPI document
stops.py       texts that end before a stop string
images.py      fetch and encode images
decoder.py     the process that decodes images; decoder_pool.py starts and stops such processes
worker.py      jobs of the model thread that deliver to the event loop
responses.py   response bodies and streams
protocol.py    HTTP/1.1 with limits of connections and headers
middleware.py  API key and size limits
admission.py   counts of requests and bytes, in all and for each client
limits.py      bounds of requests
metrics.py     counters of /metrics
replicas.py    one server on each of several GPUs, under Ray Serve
"""
