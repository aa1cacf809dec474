"""Time stamps of a step, simulated or measured, and what can be seen in them.  docs/pictures.md says how to read the results.

`measured_trace` takes what a kernel wrote, `simulated_trace` asks the simulator; everything else works on the `Trace` that
either gives.
"""

from scheduler.timeline.measured import measured_trace
from scheduler.timeline.simulated import simulated_trace
from scheduler.timeline.trace import Point, Trace, TraceError, from_stamps, load_trace

__all__ = ["Point", "Trace", "TraceError", "from_stamps", "load_trace", "measured_trace", "simulated_trace"]
