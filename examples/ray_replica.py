"""The server as a deployment of Ray Serve: a replica a GPU, each with an engine and a queue of its own.

    pip install '.[serve,ray]'
    MEGAKERNEL_MODEL=meta-llama/Llama-3.2-1B-Instruct serve run examples.ray_replica:app

Ray's proxy answers on port 8000 and hands each request to a replica; the paths are those of docs/server.md.  It runs from a
checkout, on a machine without a GPU with MEGAKERNEL_GPUS=0.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from ray import serve

from megakernel.command import EngineOptions, chosen_model, loaded, open_text, sampling_of
from serving.app import make_app
from serving.command import Options, identity_of
from serving.decoder import EngineDecoder
from serving.metrics import Metrics
from serving.scheduler import Scheduler
from serving.service import Service

GPUS = float(os.environ.get("MEGAKERNEL_GPUS", "1"))  # of each replica
REPLICAS = int(os.environ.get("MEGAKERNEL_REPLICAS", "1"))


def build() -> FastAPI:
    """One replica's application, with its engine loaded; called in the replica's process."""
    options = Options()
    model, _ = chosen_model(options)
    checkpoint, text = open_text(model)
    sampling = sampling_of(options, checkpoint.sampling)
    engine = loaded(EngineOptions(), model, checkpoint)
    metrics = Metrics()
    scheduler = Scheduler(EngineDecoder(engine), options.limits.queue, metrics.faults.inc)
    metrics.watch(scheduler, engine.capacity)
    sizes = (engine.config.vocab_size, engine.capacity)
    service = Service(text, scheduler, identity_of(options, model, engine, sampling), options.limits, metrics, sizes)
    service.warm()
    return make_app(service)


class Replica:
    """All of its paths are the application's."""


deployment = serve.deployment(num_replicas=REPLICAS, ray_actor_options={"num_gpus": GPUS}, max_ongoing_requests=64)
app = deployment(serve.ingress(build)(Replica)).bind()
