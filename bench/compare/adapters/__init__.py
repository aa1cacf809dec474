"""One small class an engine, each the only place that knows its engine.  Named in `bench.compare.engines`."""
