"""Several processes of one gateway on one host: ``serve --workers N``.

Each worker is a whole gateway with its own gRPC address, which Envoy lists as an endpoint. The modules: seat (what
each worker has of its own), worker (one worker's program), supervisor (starts, ends and replaces them), front (the
one admin address) and merge (one page out of several). With one worker there is no supervisor, and none of this runs.
"""
